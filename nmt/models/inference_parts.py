"""The parts of the Transformer for inference, which `inference.py` uses in place of a model's own parts.

Shapes: B sentences, K beam size, R = B*K rows, S source length, N columns of the past, D model, H heads,
E head size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nmt.models.attention import CrossAttention, SelfAttention
from nmt.models.blocks import Embedding, FeedForward, Residual
from nmt.models.inference_int8 import Inputs, int8_feed_forward, int8_map, ranges
from nmt.models.inference_state import Past, multiplied_by_onednn
from nmt.models.known_parts import CONTAINERS, is_as_its_class, is_known
from nmt.models.training_ops import LINEARS
from nmt.models.transformer import DecoderLayer
from nmt.system import onednn

Map = Callable[[Tensor], Tensor]


class FastLayer:
    """A decoder layer made of the fast parts, for one new position a row.

    Its `forward` is that of the plain layer, so that the order of the parts is written only once.
    """

    forward: Callable[..., Tensor] = DecoderLayer.forward
    feed_forward: Map

    def __init__(
        self,
        layer: DecoderLayer,
        dtype: torch.dtype,
        hidden_dtype: torch.dtype,
        inputs: Inputs | None,
        *,
        packs: bool = True,
    ) -> None:
        """Take over a layer's weights.

        Args:
            layer: The layer.
            dtype: The type of products.
            hidden_dtype: The type of hidden states.
            inputs: For products of 8-bit integers, the parts that the inputs come from; hidden states are float32.
            packs: Whether to pack weights.
        """
        for name, part in layer.named_children():
            source = None if inputs is None else getattr(inputs, name, None)
            form: Callable[..., Tensor]
            if isinstance(part, SelfAttention):
                form = _PastAttention(part, dtype, source, packs=packs)
            elif isinstance(part, CrossAttention):
                form = _MemoryAttention(part, dtype, source, packs=packs)
            elif name == "feed_forward":
                form = _feed_forward(part, dtype, input_norm=source, packs=packs)
            else:
                form = _residual(part, hidden_dtype)
            setattr(self, name, form)


class _PastAttention:
    """`SelfAttention` to keys and values that stay where they were written."""

    def __init__(
        self,
        attention: SelfAttention,
        dtype: torch.dtype,
        source: nn.LayerNorm | Embedding | None,
        *,
        packs: bool,
    ) -> None:
        make = partial(linear_map, dtype=dtype, packs=packs)
        weight, bias = attention.qkv_proj.weight, attention.qkv_proj.bias
        dim = weight.size(1)
        # The weights of the queries are divided by sqrt(E) here, so that no step has to divide.
        scales = torch.cat(
            [weight.new_full((dim,), (dim // attention.num_heads) ** -0.5), weight.new_ones(2 * dim)]
        )
        input_ranges = None if source is None else ranges(source)
        self.qkv = make(weight * scales[:, None], bias * scales, input_ranges=input_ranges)
        self.out = make(attention.out_proj.weight, attention.out_proj.bias)

    def __call__(self, y: Tensor, *, is_causal: bool, state: tuple[Past, Tensor | None]) -> Tensor:
        """(R, D) -> (R, D). Fills the newest columns of the past; the mask is (B, 1, K, N)."""
        past, mask = state
        num_sentences, num_heads, _, head_size = past.keys.shape
        # (R, 3D) -> (3, B, H, K, E)
        qkv = self.qkv(y).view(num_sentences, -1, 3, num_heads, head_size).permute(2, 0, 3, 1, 4)
        past.room.copy_(qkv[1:])
        return self.out(_attend(qkv[0], past.keys, past.values, mask))


class _MemoryAttention:
    """`CrossAttention` for one position a row."""

    def __init__(
        self, attention: CrossAttention, dtype: torch.dtype, source: nn.LayerNorm | None, *, packs: bool
    ) -> None:
        make = partial(linear_map, dtype=dtype, packs=packs)
        weight, bias = attention.q_proj.weight, attention.q_proj.bias
        scale = (weight.size(0) // attention.num_heads) ** -0.5  # as in `_PastAttention`
        input_ranges = None if source is None else ranges(source)
        self.query = make(weight * scale, bias * scale, input_ranges=input_ranges)
        self.out = make(attention.out_proj.weight, attention.out_proj.bias)

    def __call__(self, y: Tensor, keys: Tensor, values: Tensor, *, attention_mask: Tensor) -> Tensor:
        """(R, D) -> (R, D). Keys and values are (B, H, S, E); the mask (B, 1, 1, S) is added to the scores."""
        num_sentences, num_heads, _, head_size = keys.shape
        query = self.query(y).view(num_sentences, -1, num_heads, head_size).transpose(1, 2)
        return self.out(_attend(query, keys, values, attention_mask))


def _attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Attend with scaled queries (B, H, K, E) to keys and values (B, H, N, E), which may have another type.

    For a handful of queries, plain products are faster on a CPU than PyTorch's fused attention.

    Returns:
        (R, D), of the queries' type.
    """
    if multiplied_by_onednn(keys.dtype, keys.device):
        # oneDNN takes keys as they are on the left of a product; on the right it would reorder them first.
        products = (keys @ query.contiguous().transpose(2, 3)).transpose(2, 3)  # (B, H, N, K) -> (B, H, K, N)
        scores = torch.empty(products.shape, dtype=torch.float32)
        torch.add(products, 0.0 if mask is None else mask, out=scores)
    else:
        scores = query.to(keys.dtype) @ keys.transpose(2, 3)  # (B, H, K, N)
        if mask is not None:
            scores += mask
    heads = scores.softmax(dim=3).to(values.dtype) @ values  # (B, H, K, E)
    rows = heads.transpose(1, 2).to(query.dtype, memory_format=torch.contiguous_format)  # (B, K, H, E)
    return rows.reshape(-1, rows.size(2) * rows.size(3))


def _feed_forward(
    feed_forward: nn.Module, dtype: torch.dtype, *, input_norm: nn.LayerNorm | None, packs: bool
) -> Map:
    """Return the map of a feed-forward block; with 8-bit integers if the normalisation before it is given."""
    if not isinstance(feed_forward, FeedForward):
        return _copied(feed_forward, dtype, packs=packs)
    expand, contract, activation = feed_forward.expand, feed_forward.contract, feed_forward.activation
    if input_norm is not None and activation is F.relu:
        return int8_feed_forward(feed_forward, input_norm)
    input_ranges = None if input_norm is None else ranges(input_norm)
    make = partial(linear_map, dtype=dtype, packs=packs)
    first = make(expand.weight, expand.bias, activation=activation, input_ranges=input_ranges)
    second = make(contract.weight, contract.bias)
    return lambda x: second(first(x))


def linear_map(
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    activation: Map | None = None,
    input_ranges: Tensor | None = None,
    packs: bool = True,
) -> Map:
    """Return the map x -> activation(x W^T + b) for weights (out, in) and inputs of type `dtype`.

    With `input_ranges` (in,), products use 8-bit integers; then `dtype` is the type of the result, and inputs are
    float32.

    On a CPU, oneDNN's packed products are used if this build of PyTorch has them. Inputs of few rows gain most.
    """
    if input_ranges is not None:
        linear: Map = int8_map(weight, bias, input_ranges, dtype=dtype)
        return linear if activation is None else lambda x: activation(linear(x))
    weight, bias = weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype)
    if packs and weight.device.type == "cpu" and onednn.has_products_in(dtype):
        if activation is F.relu:
            return onednn.packed_map(weight, bias, activation="relu")
        linear = onednn.packed_map(weight, bias)
    else:
        linear = lambda x: F.linear(x, weight, bias)  # noqa: E731
    return linear if activation is None else lambda x: activation(linear(x))


class _Product(nn.Module):
    """A linear map or a feed-forward block that computes in its own type and returns the type of its input."""

    def __init__(self, function: Map, dtype: torch.dtype) -> None:
        super().__init__()
        self.function = function
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return self.function(x.to(self.dtype)).to(x.dtype)


def replace_products_(module: nn.Module, dtype: torch.dtype, *, packs: bool) -> None:
    """Replace the known linear maps and feed-forward blocks of an encoder by `_Product`s."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear) and is_known(child, LINEARS):
            setattr(module, name, _Product(linear_map(child.weight, child.bias, dtype, packs=packs), dtype))
        elif isinstance(child, FeedForward) and is_known(child, (FeedForward,)):
            transform = _feed_forward(child, dtype, input_norm=None, packs=packs)
            setattr(module, name, _Product(transform, dtype))
        elif is_as_its_class(child, CONTAINERS):
            replace_products_(child, dtype, packs=packs)


def _copied(part: nn.Module, dtype: torch.dtype, *, packs: bool) -> nn.Module:
    """Return a copy of a part that runs as it is, but in another type and with faster products."""
    part = copy.deepcopy(part)
    replace_products_(part, dtype, packs=packs)
    return part.to(dtype)


def fast_norm(norm: nn.Module, dtype: torch.dtype) -> Map:
    """Return layer normalisation in another type, or a copy of the part that stands in its place."""
    if not isinstance(norm, nn.LayerNorm):
        return _copied(norm, dtype, packs=False)
    weight, bias = norm.weight.detach().to(dtype), norm.bias.detach().to(dtype)
    return lambda x: F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)


def _residual(residual: nn.Module, dtype: torch.dtype) -> Callable[[Tensor, Map], Tensor]:
    """Return the connection around a block without its dropout, or what stands in its place; see `Residual`."""
    if not isinstance(residual, Residual):
        return _copied(residual, dtype, packs=False)
    norm = fast_norm(residual.norm, dtype)
    if residual.pre_norm:
        return lambda x, block: x + block(norm(x))
    # The block's output may be overwritten. If it is bfloat16 and x float32, the sum stays float32.
    return lambda x, block: norm(_sum(block(x), x))


def _sum(y: Tensor, x: Tensor) -> Tensor:
    """Return y + x; computed in place of y if both have the same type."""
    return y.add_(x) if y.dtype == x.dtype else y + x
