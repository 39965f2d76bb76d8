"""The Transformer for inference alone: the same results, sooner. `Transformer` is its plain twin.

What makes it faster, in a decoder that takes one position at a time: products packed for the CPU, in float32,
bfloat16 or 8-bit integers (`inference_int8.py`); a past that stays where it was written (`inference_state.py`), so
that attention is one product for all K hypotheses of a sentence; and a first position that is computed once for a
sentence.

Shapes: B sentences, K beam size, R = B*K rows, S source length, N columns of the past, L layers, D model, H heads,
E head size, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nmt.models.attention import CrossAttention, SelfAttention
from nmt.models.blocks import Embedding, FeedForward, Residual
from nmt.models.inference_int8 import Inputs, decoder_inputs, int8_feed_forward, int8_map, ranges
from nmt.models.inference_state import BeamState, InferenceMemory, Past, multiplied_by_onednn
from nmt.models.known_parts import CONTAINERS, LINEAR, find_stranger, is_as_its_class, is_known
from nmt.models.training_ops import LEAST_WIDTH
from nmt.models.transformer import DecoderLayer, Transformer
from nmt.system import onednn

_Map = Callable[[Tensor], Tensor]

_TOKENS_AT_ONCE = 1024  # of the source, on a CPU
_MANY_SENTENCES = 64  # from so many on, attention is faster in bfloat16 than in float32 on a CPU


class InferenceTransformer:
    """Encode sources, then decode position by position, with a trained model's weights as they are now."""

    def __init__(self, model: Transformer, dtype: torch.dtype | None = None, *, packs: bool = True) -> None:
        """Take over the weights of a model in evaluation mode, which is not changed.

        Args:
            model: The model, whose parts are known (`search_form`).
            dtype: Of weights and hidden states; the model's own if it is left out. With `torch.int8` most of
                the decoder's products are of 8-bit integers, all others of bfloat16; hidden states are float32.
            packs: Whether to pack weights for faster products. Without it few are copied.
        """
        assert not model.training
        in_integers = dtype == torch.int8
        self.plain = model
        self.pad_id = model.pad_id
        self.max_source_positions = model.max_source_positions
        self.max_target_positions = model.max_target_positions
        self.dtype = torch.float32 if in_integers else dtype or model.output_weight.dtype
        self.product_dtype = torch.bfloat16 if in_integers else self.dtype
        self.encoder = copy.deepcopy(
            model.encoder, memo={id(weight): weight for weight in model.parameters()}
        )
        _replace_products_(self.encoder, self.product_dtype, packs=packs)
        self.embedding = model.decoder.embedding
        layers = [cast(DecoderLayer, layer) for layer in model.decoder.layers]
        self.num_heads = layers[0].cross_attention.num_heads
        memory_maps = [layer.cross_attention.kv_proj for layer in layers]
        self.project_memory = linear_map(
            torch.cat([x.weight for x in memory_maps]),
            torch.cat([x.bias for x in memory_maps]),
            self.product_dtype,
            packs=packs,
        )
        inputs: Sequence[Inputs | None] = [None] * len(layers)
        last_ranges = None
        if in_integers:
            inputs, last_input = decoder_inputs(model.decoder)
            last_ranges = ranges(last_input)
        # Of parts, such as another normalisation: they are run as they are.
        self.has_variants = find_stranger(model, within_encoder=False) is not None
        self.layers = [
            _Layer(layer, self.product_dtype, self.dtype, x, packs=packs)
            for layer, x in zip(layers, inputs, strict=True)
        ]
        self.final_norm = _norm(model.decoder.final_norm, self.dtype)
        offset = None
        if self.dtype.itemsize < 4:
            offset = torch.tensor(
                _typical_normalizer(model), dtype=self.dtype, device=model.output_weight.device
            )
        self.logit_offset = 0.0 if offset is None else offset.item()
        bias = None if offset is None else (-offset).repeat(model.output_weight.size(0))
        # (..., D) -> (..., V)
        self.project = linear_map(
            model.output_weight, bias, self.dtype, input_ranges=last_ranges, packs=packs
        )

    @property
    def widest_product(self) -> int:
        """How many numbers a row has at most in what a step makes anew, logits aside."""
        widest = max(x.out_features for x in self.plain.modules() if isinstance(x, nn.Linear))
        return max(
            widest, 2 * len(self.layers) * self.plain.output_weight.size(1)
        )  # the memory of all layers

    def encode(self, source: Tensor) -> InferenceMemory:
        """Encode sources (B, S); see `Transformer.encode`."""
        num_sentences, length = source.shape
        padding_mask = source == self.pad_id
        width = max(length, LEAST_WIDTH)
        head_size = self.embedding.tokens.embedding_dim // self.num_heads
        dtype = self.product_dtype
        # (L, 2, B, H, S, E)
        shape = (len(self.layers), 2, num_sentences, self.num_heads, width, head_size)
        if multiplied_by_onednn(dtype, source.device) and num_sentences < _MANY_SENTENCES:
            dtype = torch.float32
        parts = torch.empty(shape, dtype=dtype, device=source.device)
        for some, longest in _groups(padding_mask):
            encoded = self.encoder(source[some, :longest], padding_mask[some, :longest])
            projected = self.project_memory(encoded.to(self.product_dtype))
            by_layer = projected.unflatten(2, (len(self.layers), 2, self.num_heads, head_size))
            parts[:, :, some, :, :longest] = by_layer.permute(2, 3, 0, 4, 1, 5)
            parts[:, :, some, :, longest:] = 0.0
        padding_mask = F.pad(padding_mask, (0, width - length), value=True)
        mask_dtype = torch.float32 if multiplied_by_onednn(dtype, source.device) else dtype
        return InferenceMemory(parts, _additive(padding_mask, mask_dtype))

    def start_state(self) -> BeamState:
        """Return the state of rows of which nothing has been decoded."""
        return BeamState()

    def step(self, tokens: Tensor, memory: InferenceMemory, state: BeamState) -> Tensor:
        """Take one new token a row into the state.

        Args:
            tokens: (R,) int64; the K rows of a sentence lie side by side.
            memory: The encoded sources of B sentences.
            state: What has been decoded before.

        Returns:
            (R, D), the last hidden states.
        """
        beam_size = tokens.size(0) // memory.padding.size(0)
        if state.length > 0 or beam_size == 1:
            return self._step(tokens, memory, state, beam_size, later=beam_size)
        first = tokens[::beam_size]
        if not torch.equal(tokens, first.repeat_interleave(beam_size)):
            return self._step(tokens, memory, state, beam_size, later=beam_size)
        # All rows of a sentence are alike, as a search begins: one is computed.
        features = self._step(first, memory, state, 1, later=beam_size)
        state.branch(beam_size)
        return features.repeat_interleave(beam_size, dim=0)

    def _step(
        self, tokens: Tensor, memory: InferenceMemory, state: BeamState, beam_size: int, *, later: int
    ) -> Tensor:
        past, past_mask = state.add_columns(memory, beam_size, later=later)
        x = self.embedding(tokens[:, None], start=state.length - 1)[:, 0].to(self.dtype)  # (R, D)
        for layer, own_past, own_memory in zip(self.layers, past, memory.tables, strict=True):
            x = layer.forward(x, own_memory, attention_mask=memory.mask, state=(own_past, past_mask))
        return self.final_norm(x)


def _groups(padding_mask: Tensor) -> Iterator[tuple[slice, int]]:
    """Cut a batch (B, S) into groups: yield their sentences, and how many columns the longest of each takes.

    On a CPU they have few tokens, so that what lies between layers stays in its caches. Of sentences that are
    sorted by length, hardly any padding remains in them.
    """
    num_sentences, length = padding_mask.shape
    if padding_mask.device.type != "cpu":
        yield slice(num_sentences), length
        return
    num_groups = max(1, -(-padding_mask.numel() // _TOKENS_AT_ONCE))
    at_once = max(1, -(-num_sentences // num_groups))
    # The last place that is no padding: a piece in the middle may have its id.
    ends = ((~padding_mask) * torch.arange(1, length + 1)).amax(dim=1).clamp_(min=1)
    for first in range(0, num_sentences, at_once):
        some = slice(first, first + at_once)
        yield some, int(ends[some].max())


class _Layer:
    """A decoder layer whose parts are in their forms for one new position a row.

    What it does with them is written once, in the plain layer.
    """

    forward: Callable[..., Tensor] = DecoderLayer.forward
    feed_forward: _Map

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
            dtype: Of products.
            hidden_dtype: Of hidden states.
            inputs: Where inputs come from whose products shall be of 8-bit integers, which takes float32.
            packs: Whether to pack weights.
        """
        for name, part in layer.named_children():
            source = None if inputs is None else getattr(inputs, name, None)
            form: Callable[..., Tensor]
            if isinstance(part, SelfAttention):
                form = _PastAttention(part, dtype, source, packs=packs)
            elif isinstance(part, CrossAttention):
                form = _MemoryAttention(part, dtype, source, packs=packs)
            elif isinstance(part, Residual):
                form = _residual(part, hidden_dtype)
            else:
                form = _feed_forward(part, dtype, input_norm=source, packs=packs)
            setattr(self, name, form)


class _PastAttention:
    """`SelfAttention` to tables that stay where they were written."""

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
        # Queries are divided by sqrt(E) beforehand, by their weights.
        scales = torch.cat(
            [weight.new_full((dim,), (dim // attention.num_heads) ** -0.5), weight.new_ones(2 * dim)]
        )
        input_ranges = None if source is None else ranges(source)
        self.qkv = make(weight * scales[:, None], bias * scales, input_ranges=input_ranges)
        self.out = make(attention.out_proj.weight, attention.out_proj.bias)

    def __call__(self, y: Tensor, *, is_causal: bool, state: tuple[Past, Tensor | None]) -> Tensor:
        """(R, D) -> (R, D). The newest columns of the past are filled; the mask (B, 1, K, N) goes with it."""
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
        scale = (weight.size(0) // attention.num_heads) ** -0.5  # as there
        input_ranges = None if source is None else ranges(source)
        self.query = make(weight * scale, bias * scale, input_ranges=input_ranges)
        self.out = make(attention.out_proj.weight, attention.out_proj.bias)

    def __call__(self, y: Tensor, keys: Tensor, values: Tensor, *, attention_mask: Tensor) -> Tensor:
        """(R, D) -> (R, D). Keys and values are (B, H, S, E), the mask (B, 1, 1, S) is added to scores."""
        num_sentences, num_heads, _, head_size = keys.shape
        query = self.query(y).view(num_sentences, -1, num_heads, head_size).transpose(1, 2)
        return self.out(_attend(query, keys, values, attention_mask))


@torch.inference_mode()
def _typical_normalizer(model: Transformer) -> float:
    """Return about how large log(sum(exp(logits))) is, by tokens from all over the vocabularies as sentences.

    A logit of 11 in bfloat16 stands for all between 10.97 and 11.03. What is subtracted before it is rounded
    changes no probability, and leaves the likely tokens, which decide, near 0, where numbers lie close.
    """
    vocabularies = (model.encoder.embedding.tokens.weight, model.output_weight)
    source, prefix = (
        torch.linspace(0, len(x) - 1, 64, device=x.device).long()[:, None] for x in vocabularies
    )
    sources = source.masked_fill(source == model.pad_id, int(source[-1]))
    normalizers = model.decode(prefix, model.encode(sources)).logsumexp(dim=2)
    sound = normalizers[normalizers.isfinite()]
    return sound.mean().item() if sound.numel() else 0.0


def _attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Attend with scaled queries (B, H, K, E) to keys and values (B, H, N, E), whose type may be another.

    Plain products: for a handful of queries they are faster on a CPU than the fused attention.

    Returns:
        (R, D), of the queries' type.
    """
    if multiplied_by_onednn(keys.dtype, keys.device):
        # It takes keys as they lie on the left of a product; on the right it would first reorder them.
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
) -> _Map:
    """Return the map of a feed-forward block; of 8-bit integers if the normalisation of its inputs is given."""
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
    activation: _Map | None = None,
    input_ranges: Tensor | None = None,
    packs: bool = True,
) -> _Map:
    """Return the map x -> activation(x W^T + b) for weights (out, in) and inputs of a type.

    With ranges of the inputs (in,) it is made of 8-bit integers; then the type is that of the result, and inputs
    are float32.

    On a CPU oneDNN's packed products are used, where this build of PyTorch has them: those of few rows gain most.
    """
    if input_ranges is not None:
        linear: _Map = int8_map(weight, bias, input_ranges, dtype=dtype)
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
    """A linear map, or a feed-forward block, that computes in another type than it takes and returns."""

    def __init__(self, function: _Map, dtype: torch.dtype) -> None:
        super().__init__()
        self.function = function
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return self.function(x.to(self.dtype)).to(x.dtype)


def _replace_products_(module: nn.Module, dtype: torch.dtype, *, packs: bool) -> None:
    """Put `_Product`s in the places of an encoder's linear maps and feed-forward blocks, where these are known."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear) and is_known(child, LINEAR):
            setattr(module, name, _Product(linear_map(child.weight, child.bias, dtype, packs=packs), dtype))
        elif isinstance(child, FeedForward) and is_known(child, (FeedForward,)):
            transform = _feed_forward(child, dtype, input_norm=None, packs=packs)
            setattr(module, name, _Product(transform, dtype))
        elif is_as_its_class(child, CONTAINERS):
            _replace_products_(child, dtype, packs=packs)


def _copied(part: nn.Module, dtype: torch.dtype, *, packs: bool) -> nn.Module:
    """Return a copy of a part that is run as it is, in another type, with faster products."""
    part = copy.deepcopy(part)
    _replace_products_(part, dtype, packs=packs)
    return part.to(dtype)


def _norm(norm: nn.Module, dtype: torch.dtype) -> _Map:
    """Return layer normalisation, or what stands in its place, in another type."""
    if not isinstance(norm, nn.LayerNorm):
        return _copied(norm, dtype, packs=False)
    weight, bias = norm.weight.detach().to(dtype), norm.bias.detach().to(dtype)
    return lambda x: F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)


def _residual(residual: Residual, dtype: torch.dtype) -> Callable[[Tensor, _Map], Tensor]:
    """Return the connection around a block without its dropout; see `Residual`."""
    norm = _norm(residual.norm, dtype)
    if residual.pre_norm:
        return lambda x, block: x + block(norm(x))
    # What a block returns is not needed any more. It may be of lower precision, to which the sum is not rounded.
    return lambda x, block: norm(_sum(block(x), x))


def _sum(y: Tensor, x: Tensor) -> Tensor:
    """Return y + x, of the type of x, in the place of y if it has that type."""
    return y.add_(x) if y.dtype == x.dtype else y + x


def _additive(padding_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return -inf at padding and else 0: as attention takes masks, so that it need not convert them."""
    return torch.zeros_like(padding_mask, dtype=dtype).masked_fill_(padding_mask, -torch.inf)
