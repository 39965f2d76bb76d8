"""The decoder for GPUs: the shapes and addresses of a step never change, so that it can be recorded and replayed.

`inference.py` has the decoder for CPUs, and the encoder of both. As there, keys and values stay where they were
written (`inference_state.py` has a picture). The K hypotheses of a sentence share tables of K*C columns. Step t
fills the K columns from t*K on, and a mask says which columns are a hypothesis's own past. The number of the step
is a tensor, so that nothing on the host changes from step to step. A step is made of small kernels, and their
number decides its time. So there are few of them:

- One copy a layer writes keys and values, into tables that no step moves.
- With post-norm, a block's last product is added to the block's input in place. The bias of this product is
  already in that input, because the layer normalisation before has it added to its own bias. The products that
  read the input subtract its effect again, by their own biases.

Shapes: B sentences, K beam size, R = B*K rows, S source columns, C steps for which there is room, N = K*C columns,
D model, H heads, E head size, F feed-forward, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from nmt.models.inference import InferenceTransformer
from nmt.models.reserve import Reserve
from nmt.models.transformer import DecoderLayer, EncoderLayer

# Everything except cuDNN's attention, which takes half a second to prepare for every new shape.
_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class Sizes:
    """The sizes that a step is recorded for."""

    num_sentences: int  # B
    beam_size: int  # K
    source_length: int  # S
    num_steps: int  # C


@dataclass(frozen=True)
class DecoderTables:
    """What a decoder reads and writes in place, for one choice of sizes."""

    sizes: Sizes
    past: list[Tensor]  # for each layer (B, N, 2, H, E): keys and values of the hypotheses
    memory: list[Tensor]  # for each layer (B, S, 2, H, E): keys and values of the source
    # (B, 1, K, N) 0 where a column belongs to the hypothesis, else -inf; with K = 1 (1, 1, 1, N)
    mask: Tensor
    padding: Tensor  # (B, 1, 1, S) -inf at padding of the source, else 0
    places: Tensor  # (K,) int64: 0, 1, 2 ...
    diagonal: Tensor  # (B, 1, K, K) the mask of the columns that a step fills; with K = 1 (1, 1, 1, 1)


class StaticDecoder:
    """The encoder and decoder of an `InferenceTransformer`, for steps in place."""

    def __init__(self, model: InferenceTransformer) -> None:
        """Take over the weights of a model whose products and hidden states have the same type."""
        assert model.dtype == model.product_dtype
        self.model = model
        self.dtype = model.dtype
        self.logit_offset = model.logit_offset
        self.num_heads = model.num_heads
        self.max_target_positions = model.max_target_positions
        layers = [cast(DecoderLayer, layer) for layer in model.plain.decoder.layers]
        self.dim = layers[0].cross_attention.q_proj.weight.size(0)
        self._is_pre_norm = layers[0].around_feed_forward.pre_norm
        self._is_relu = layers[0].feed_forward.activation is F.relu
        self._embedding_norm = isinstance(model.plain.decoder.embedding.norm, nn.LayerNorm)
        self._final_norm = isinstance(model.plain.decoder.final_norm, nn.LayerNorm)
        self._outer, self._layers = self._weights()

    @property
    def vocabulary_size(self) -> int:
        """The vocabulary size V."""
        return self._outer.output.size(0)

    def bytes_of(self, *, source_length: int, num_columns: int) -> int:
        """Return about how many bytes a sentence takes, in the tables and while it is encoded."""
        tables = 2 * len(self._layers) * self.dim * (source_length + num_columns) * self.dtype.itemsize
        encoder = cast(EncoderLayer, self.model.plain.encoder.layers[0])
        dim, ffn_dim = encoder.feed_forward.expand.in_features, encoder.feed_forward.expand.out_features
        return tables + source_length * (10 * dim + 2 * ffn_dim) * 4

    def tables(self, reserve: Reserve, name: str, sizes: Sizes) -> DecoderTables:
        """Cut tables of some sizes out of a reserve, under names that begin with `name`."""
        num_sentences, beam_size, num_steps = sizes.num_sentences, sizes.beam_size, sizes.num_steps
        heads = (2, self.num_heads, self.dim // self.num_heads)
        num_columns = beam_size * num_steps
        num_masks = 1 if beam_size == 1 else num_sentences
        diagonal = torch.full((beam_size, beam_size), -torch.inf, dtype=self.dtype, device=reserve.device)
        return DecoderTables(
            sizes,
            past=[
                reserve.take(f"{name} past {i}", (num_sentences, num_columns, *heads), self.dtype)
                for i in range(len(self._layers))
            ],
            memory=[
                reserve.take(f"{name} memory {i}", (num_sentences, sizes.source_length, *heads), self.dtype)
                for i in range(len(self._layers))
            ],
            mask=reserve.take(f"{name} mask", (num_masks, 1, beam_size, num_columns), self.dtype),
            padding=reserve.take(f"{name} padding", (num_sentences, 1, 1, sizes.source_length), self.dtype),
            places=torch.arange(beam_size, device=reserve.device),
            diagonal=diagonal.fill_diagonal_(0.0).expand(num_masks, 1, -1, -1),
        )

    def encode_(self, tables: DecoderTables, source: Tensor) -> None:
        """Encode sources (B, S) int64 into the memory; every sentence has at least one token."""
        width = min(source.size(1), self.model.max_source_positions)
        padding_mask = source == self.model.pad_id
        with without_cudnn():
            encoded = self.model.encoder(source[:, :width], padding_mask[:, :width]).to(self.dtype)
        for layer, table in zip(self._layers, tables.memory, strict=True):
            projected = F.linear(encoded, layer.memory, layer.memory_bias)  # (B, S, 2D)
            table[:, :width].copy_(projected.view(-1, width, *table.shape[2:]))
            if width < table.size(1):
                table[:, width:].zero_()  # masked columns must hold numbers, because 0 times NaN is NaN
        tables.padding.zero_().masked_fill_(padding_mask[:, None, None], -torch.inf)

    def start_(self, tables: DecoderTables) -> None:
        """Forget the past."""
        for table in tables.past:
            table.zero_()  # masked columns must hold numbers, because 0 times NaN is NaN
        tables.mask.fill_(-torch.inf)

    def move_(self, old: DecoderTables, new: DecoderTables, sentences: Tensor | None) -> None:
        """Copy to tables of other sizes: the sentences at the places (B',), or all of them to larger tables."""
        for before, after in zip((*old.past, old.padding), (*new.past, new.padding), strict=True):
            move_(before, after, dim=0, places=sentences)
        for before, after in zip(old.memory, new.memory, strict=True):
            move_(before, after, dim=0, places=sentences)
        num_columns = old.mask.size(3)
        mask = old.mask.clone() if sentences is None or old.mask.size(0) == 1 else old.mask[sentences]
        new.mask.fill_(-torch.inf)[:, :, :, :num_columns].copy_(mask)

    def features(self, tables: DecoderTables, tokens: Tensor, step: Tensor, *, width: int) -> Tensor:
        """Decode one new token for each row, and add it to the past.

        Args:
            tables: Those of the sentences.
            tokens: (R,) int64; the K rows of a sentence lie side by side.
            step: () int64, how many tokens each row had before; less than C.
            width: Attention reads the columns of this many steps, and masks those not yet filled; above `step`.

        Returns:
            (R, D), the last hidden states.
        """
        index = step.view(1)
        beam_size = tables.sizes.beam_size
        columns = index if beam_size == 1 else torch.add(tables.places, step, alpha=beam_size)  # (K,)
        tables.mask.index_copy_(3, columns, tables.diagonal)
        mask = tables.mask[:, :, :, : beam_size * width]
        outer = self._outer
        positions = outer.positions.index_select(0, index)  # (1, D)
        x = torch.add(positions, F.embedding(tokens, outer.tokens), alpha=outer.scale)
        if self._embedding_norm:
            x = self._normalize(x, outer.embedding_norm, outer.embedding_norm_bias)
        for layer, past, memory in zip(self._layers, tables.past, tables.memory, strict=True):
            x = self._attend_to_past(x, layer, past, columns, mask)
            x = self._attend_to_source(x, layer, memory, tables.padding)
            x = self._feed_forward(x, layer)
        return self._normalize(x, outer.final_norm, outer.final_norm_bias) if self._final_norm else x

    def project(self, features: Tensor) -> Tensor:
        """(R, D) -> (R, V) logits minus `logit_offset`."""
        if self.logit_offset == 0.0:
            return F.linear(features, self._outer.output)
        return F.linear(features, self._outer.output, self._outer.output_bias)

    def reorder_(self, tables: DecoderTables, parents: Tensor, *, width: int) -> None:
        """Let each hypothesis continue its parent (B, K) in the same sentence. Not needed with K = 1."""
        mask = tables.mask[:, :, :, : tables.sizes.beam_size * width]
        mask.copy_(mask.gather(2, parents[:, None, :, None].expand_as(mask)))

    def _attend_to_past(
        self, x: Tensor, layer: _Layer, past: Tensor, columns: Tensor, mask: Tensor
    ) -> Tensor:
        y = self._normalize(x, layer.past_norm, layer.past_norm_bias) if self._is_pre_norm else x
        parts = F.linear(y, layer.qkv, layer.qkv_bias).view(past.size(0), -1, 3, *past.shape[3:])
        past.index_copy_(1, columns, parts[:, :, 1:])  # (B, K, 2, H, E)
        heads = _attend(parts[:, :, 0], past[:, : mask.size(3)], mask)
        return self._add(x, heads, layer.past_out, layer.past_out_bias, layer.past_norm, layer.past_norm_bias)

    def _attend_to_source(self, x: Tensor, layer: _Layer, memory: Tensor, padding: Tensor) -> Tensor:
        y = self._normalize(x, layer.source_norm, layer.source_norm_bias) if self._is_pre_norm else x
        query = F.linear(y, layer.query, layer.query_bias).view(memory.size(0), -1, *memory.shape[3:])
        heads = _attend(query, memory, padding)
        return self._add(
            x, heads, layer.source_out, layer.source_out_bias, layer.source_norm, layer.source_norm_bias
        )

    def _feed_forward(self, x: Tensor, layer: _Layer) -> Tensor:
        y = self._normalize(x, layer.ffn_norm, layer.ffn_norm_bias) if self._is_pre_norm else x
        if self._is_relu:
            inner = torch._addmm_activation(layer.expand_bias, y, layer.expand.t())
        else:
            inner = F.gelu(F.linear(y, layer.expand, layer.expand_bias))
        return self._add(x, inner, layer.contract, layer.contract_bias, layer.ffn_norm, layer.ffn_norm_bias)

    def _add(
        self, x: Tensor, inner: Tensor, weight: Tensor, bias: Tensor, norm: Tensor, norm_bias: Tensor
    ) -> Tensor:
        """Add a block's last product to its input x, which is overwritten; with post-norm, then normalise."""
        if self._is_pre_norm:
            return x.add_(F.linear(inner, weight, bias))
        return self._normalize(x.addmm_(inner, weight.t()), norm, norm_bias)  # x already contains the bias

    def _normalize(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, weight.shape, weight, bias, _EPS)

    @torch.inference_mode()
    def _weights(self) -> tuple[_Outer, list[_Layer]]:
        """Return the weights that a step needs, in its type."""
        decoder = self.model.plain.decoder
        layers = [_layer(cast(DecoderLayer, layer)) for layer in decoder.layers]
        embedding = decoder.embedding
        first = embedding.first_position
        output = self.model.plain.output_weight
        none = output.new_zeros(0)
        embedding_norm, final_norm = (
            (x.weight, x.bias) if isinstance(x, nn.LayerNorm) else (none, none)
            for x in (embedding.norm, decoder.final_norm)
        )
        outer = _Outer(
            tokens=embedding.tokens.weight,
            positions=embedding.positions[first : first + embedding.max_positions].to(output.dtype),
            embedding_norm=embedding_norm[0],
            embedding_norm_bias=embedding_norm[1],
            final_norm=final_norm[0],
            final_norm_bias=final_norm[1],
            output=output,
            output_bias=output.new_full((output.size(0),), -self.model.logit_offset),
            scale=embedding.scale,
        )
        if not self._is_pre_norm:
            if self._embedding_norm:
                outer.embedding_norm_bias = outer.embedding_norm_bias + layers[0].past_out_bias
            else:
                outer.positions = outer.positions + layers[0].past_out_bias
            for layer, following in zip(layers, [*layers[1:], None], strict=True):
                _move_biases(layer, following)
        every: list[_Outer | _Layer] = [outer, *layers]
        for weights in every:
            for own in fields(weights):
                value = getattr(weights, own.name)
                if isinstance(value, Tensor):
                    setattr(weights, own.name, value.detach().to(self.dtype).contiguous())
        return outer, layers


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Compute attention with any kernels except cuDNN's."""
    with sdpa_kernel(_ATTENTION):
        yield


def move_(old: Tensor, new: Tensor, *, dim: int, places: Tensor | None) -> None:
    """Copy values into another tensor, which may be larger, and may lie in the same storage.

    Args:
        old: The values.
        new: At least as large as the copied values in each dimension; the rest becomes 0.
        dim: The dimension that `places` belongs to.
        places: Which of the old places to copy; all if None.
    """
    if places is None and (old.data_ptr(), old.shape) == (new.data_ptr(), new.shape):
        return
    values = old.clone() if places is None else old.index_select(dim, places)
    corner = new
    for i, size in enumerate(values.shape):
        corner = corner.narrow(i, 0, size)
    if values.numel() < new.numel():
        new.zero_()
    corner.copy_(values)


_EPS = 1e-5  # the default of nn.LayerNorm, which the model uses


@dataclass
class _Outer:
    """The weights before and after the layers."""

    tokens: Tensor  # (V, D)
    positions: Tensor  # (positions, D), from the position of the first token on
    embedding_norm: Tensor
    embedding_norm_bias: Tensor
    final_norm: Tensor
    final_norm_bias: Tensor
    output: Tensor  # (V, D)
    output_bias: Tensor  # (V,)
    scale: float


@dataclass
class _Layer:
    """The weights of a decoder layer, as `F.linear` takes them."""

    qkv: Tensor
    qkv_bias: Tensor
    past_out: Tensor
    past_out_bias: Tensor
    past_norm: Tensor
    past_norm_bias: Tensor
    query: Tensor
    query_bias: Tensor
    memory: Tensor
    memory_bias: Tensor
    source_out: Tensor
    source_out_bias: Tensor
    source_norm: Tensor
    source_norm_bias: Tensor
    expand: Tensor
    expand_bias: Tensor
    contract: Tensor
    contract_bias: Tensor
    ffn_norm: Tensor
    ffn_norm_bias: Tensor


def _layer(layer: DecoderLayer) -> _Layer:
    past, source, inner = layer.self_attention, layer.cross_attention, layer.feed_forward
    norms = [
        x.norm for x in (layer.around_self_attention, layer.around_cross_attention, layer.around_feed_forward)
    ]
    assert all(norm.eps == _EPS for norm in norms)
    return _Layer(
        qkv=past.qkv_proj.weight,
        qkv_bias=past.qkv_proj.bias,
        past_out=past.out_proj.weight,
        past_out_bias=past.out_proj.bias,
        past_norm=norms[0].weight,
        past_norm_bias=norms[0].bias,
        query=source.q_proj.weight,
        query_bias=source.q_proj.bias,
        memory=source.kv_proj.weight,
        memory_bias=source.kv_proj.bias,
        source_out=source.out_proj.weight,
        source_out_bias=source.out_proj.bias,
        source_norm=norms[1].weight,
        source_norm_bias=norms[1].bias,
        expand=inner.expand.weight,
        expand_bias=inner.expand.bias,
        contract=inner.contract.weight,
        contract_bias=inner.contract.bias,
        ffn_norm=norms[2].weight,
        ffn_norm_bias=norms[2].bias,
    )


def _move_biases(layer: _Layer, following: _Layer | None) -> None:
    """Let the input of each block of a post-norm layer already contain the bias of the block's last product.

    The normalisation before the block adds it, and the products that read the input subtract it again.
    """
    layer.qkv_bias = layer.qkv_bias - layer.qkv @ layer.past_out_bias
    layer.query_bias = layer.query_bias - layer.query @ layer.source_out_bias
    layer.expand_bias = layer.expand_bias - layer.expand @ layer.contract_bias
    layer.past_norm_bias = layer.past_norm_bias + layer.source_out_bias
    layer.source_norm_bias = layer.source_norm_bias + layer.contract_bias
    if following is not None:
        layer.ffn_norm_bias = layer.ffn_norm_bias + following.past_out_bias


def _attend(query: Tensor, table: Tensor, mask: Tensor) -> Tensor:
    """Attend with (B, K, H, E) queries to a table (B, N, 2, H, E) of keys and values; (R, D)."""
    keys, values = table.transpose(1, 3).unbind(2)  # (B, H, N, E) each
    heads = F.scaled_dot_product_attention(query.transpose(1, 2), keys, values, attn_mask=mask)
    return heads.transpose(1, 2).reshape(-1, query.size(2) * query.size(3))
