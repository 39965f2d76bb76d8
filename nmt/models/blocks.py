"""The parts of a Transformer layer besides attention: embeddings, feed-forward, residual connections.

Shapes: R rows, T length, D model, F feed-forward, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from nmt.models.options import TransformerOptions
from nmt.models.training_ops import Dropout, Linear, embed


class Residual(nn.Module):
    """The connection around a block, with dropout and layer normalisation.

    Post-norm (Vaswani et al., 2017): norm(x + dropout(block(x))).
    Pre-norm: x + dropout(block(norm(x))); the stack then ends in a normalisation of its own.
    """

    def __init__(self, dim: int, *, pre_norm: bool, options: TransformerOptions) -> None:
        super().__init__()
        self.norm = make_norm(dim, options)
        self.dropout = Dropout(options.dropout)
        self.pre_norm = pre_norm

    def forward(self, x: Tensor, block: Callable[[Tensor], Tensor]) -> Tensor:
        """(R, T, D) -> (R, T, D); the block has the same shapes."""
        if self.pre_norm:
            return x + self.dropout(block(self.norm(x)))
        return self.norm(x + self.dropout(block(x)))


class FeedForward(nn.Module):
    """Two linear layers with an activation between them, applied to each position separately."""

    def __init__(self, dim: int, ffn_dim: int, *, options: TransformerOptions) -> None:
        super().__init__()
        self.expand = Linear(dim, ffn_dim)
        self.contract = Linear(ffn_dim, dim)
        self.activation: Callable[[Tensor], Tensor] = F.relu if options.activation_fn == "relu" else F.gelu
        self.dropout = Dropout(options.activation_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(R, T, D) -> (R, T, D)."""
        return self.contract(self.dropout(self.activation(self.expand(x))))


class GatedFeedForward(nn.Module):
    """A feed-forward block with a gate, SwiGLU (Shazeer, "GLU Variants Improve Transformer", 2020)."""

    def __init__(self, dim: int, ffn_dim: int, *, options: TransformerOptions) -> None:
        super().__init__()
        self.expand = Linear(dim, 2 * ffn_dim)  # the first half of the outputs are the gates
        self.contract = Linear(ffn_dim, dim)
        self.dropout = Dropout(options.activation_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(R, T, D) -> (R, T, D)."""
        gates, values = self.expand(x).chunk(2, dim=-1)
        return self.contract(self.dropout(F.silu(gates) * values))


# The choices for each kind of part. The plain one comes first; kernels and exporters know only that one.
NORMS: tuple[type[nn.Module], ...] = (nn.LayerNorm, nn.RMSNorm)
FEED_FORWARDS: tuple[type[nn.Module], ...] = (FeedForward, GatedFeedForward)
RESIDUALS: tuple[type[nn.Module], ...] = (Residual,)


def make_norm(dim: int, options: TransformerOptions) -> Any:
    """Make the normalisation of (..., D) that the options name, one of `NORMS`."""
    if options.norm_fn == "rms":
        return nn.RMSNorm(dim, eps=1e-6)  # torch's default depends on the type: 0.008 in bfloat16, too large
    return nn.LayerNorm(dim)


def make_feed_forward(dim: int, ffn_dim: int, options: TransformerOptions) -> Any:
    """Make the feed-forward block that the options name, one of `FEED_FORWARDS`."""
    kind = GatedFeedForward if options.activation_fn == "swiglu" else FeedForward
    return kind(dim, ffn_dim, options=options)


def make_residual(dim: int, *, pre_norm: bool, options: TransformerOptions) -> Any:
    """Make the connection around a block, of `RESIDUALS`."""
    return Residual(dim, pre_norm=pre_norm, options=options)


def left_in(layers: nn.ModuleList, probability: float) -> Iterator[tuple[int, nn.Module]]:
    """Yield layers with their numbers; leave each out with this probability (LayerDrop, Fan et al., 2020).

    The draw uses the CPU's generator on every device, because that generator is seeded for each update.
    """
    draws = torch.rand(len(layers)).tolist() if probability else [1.0] * len(layers)
    for number, (layer, draw) in enumerate(zip(layers, draws, strict=True)):
        if draw >= probability:
            yield number, layer


def recomputed(layer: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """Call a layer and keep only its inputs; the backward pass computes the layer a second time.

    Dropout draws the same masks the second time. The weights must be the same, too. Low-precision copies that
    now stand in place of the parameters are gone by then, so they are kept here. Parameters need no such care:
    they stay, or FSDP gathers them again.
    """
    copies: dict[str, Tensor] = {
        name: weight for name, weight in layer.named_parameters() if not isinstance(weight, nn.Parameter)
    }

    def call(*args: Any) -> Tensor:
        return functional_call(layer, copies, args, kwargs)

    return checkpoint(call, *args, use_reentrant=False)


class Embedding(nn.Module):
    """Token embeddings plus positions, sinusoidal or learned.

    The conventions are fairseq's, so that its models load: tokens are scaled by sqrt(D), and the first position is
    row pad_id + 1 of the table of positions.
    """

    def __init__(
        self,
        vocabulary_size: int,
        dim: int,
        *,
        pad_id: int,
        max_positions: int,
        learned_positions: bool,
        options: TransformerOptions,
    ) -> None:
        super().__init__()
        self.scale = 1.0 if options.no_scale_embedding else math.sqrt(dim)
        self.first_position = pad_id + 1
        self.max_positions = max_positions
        self.tokens = nn.Embedding(vocabulary_size, dim, padding_idx=pad_id)
        nn.init.normal_(self.tokens.weight, std=dim**-0.5)
        nn.init.zeros_(self.tokens.weight[pad_id])
        num_rows = self.first_position + max_positions
        if learned_positions:
            self.positions = nn.Parameter(torch.empty(num_rows, dim).normal_(std=dim**-0.5))
        else:
            self.register_buffer("positions", sinusoids(num_rows, dim), persistent=False)
        self.norm = make_norm(dim, options) if options.layernorm_embedding else nn.Identity()
        self.dropout = Dropout(options.dropout)

    def forward(self, token_ids: Tensor, start: int = 0, positions: Tensor | None = None) -> Tensor:
        """Embed tokens with their positions.

        Args:
            token_ids: (R, T) integers.
            start: The position of the first token of each row, from 0; the others follow.
            positions: (T,) integers, used instead of `start` for a packed row: the position of each token.

        Returns:
            (R, T, D).
        """
        tokens = embed(token_ids, self.tokens.weight, pad_id=self.first_position - 1)
        if positions is None:
            assert start + token_ids.size(1) <= self.max_positions, "longer than the table of positions"
            first = self.first_position + start
            table = self.positions[first : first + token_ids.size(1)]
        else:
            # A packed row ends with filling, which may be longer than the table; its result is not used.
            rows = (positions + self.first_position).clamp(max=self.positions.size(0) - 1)
            table = F.embedding(rows, self.positions)
        positions = table.to(tokens.dtype)
        return self.dropout(self.norm(torch.add(positions, tokens, alpha=self.scale)))


def sinusoids(num_positions: int, dim: int) -> Tensor:
    """Return a (num_positions, dim) float32 table: for each position its sines, then its cosines.

    The layout is that of fairseq's modules/sinusoidal_positional_embedding.py. The frequencies fall from 1 to
    1/10000 in dim/2 geometric steps. Sines fill the first half of a row, cosines the second (not interleaved).
    """
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float64) * -(math.log(10000) / max(half - 1, 1)))
    angles = torch.arange(num_positions, dtype=torch.float64)[:, None] * frequencies  # (positions, half)
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()
