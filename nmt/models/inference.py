"""A faster Transformer for inference only, with the same results. `Transformer` is the plain form.

Its decoder takes one position at a time. Three things make it faster:

- Products are packed for the CPU, in float32, bfloat16 or 8-bit integers (`inference_int8.py`).
- Keys and values stay where they were written (`inference_state.py`), so that attention is one product for all K
  hypotheses of a sentence.
- The first position is computed once for a sentence.

Shapes: B sentences, K beam size, R = B*K rows, S source length, N columns of the past, L layers, D model, H heads,
E head size, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nmt.models.inference_int8 import Inputs, decoder_inputs, ranges
from nmt.models.inference_parts import FastLayer, fast_norm, linear_map, replace_products_
from nmt.models.inference_state import BeamState, InferenceMemory, multiplied_by_onednn
from nmt.models.known_parts import find_stranger
from nmt.models.training_ops import LEAST_WIDTH
from nmt.models.transformer import DecoderLayer, Transformer

_TOKENS_AT_ONCE = 1024  # source tokens that are encoded at once on a CPU
_MANY_SENTENCES = 64  # from this number on, attention on a CPU is faster in bfloat16 than in float32


class InferenceTransformer:
    """Encode sources, then decode position by position, with a trained model's weights as they are now."""

    def __init__(self, model: Transformer, dtype: torch.dtype | None = None, *, packs: bool = True) -> None:
        """Take over the weights of a model in evaluation mode. The model is not changed.

        Args:
            model: The model. Its parts must be known (`search_form`).
            dtype: The type of weights and hidden states; the model's own type if left out. With `torch.int8` most
                of the decoder's products use 8-bit integers and all others bfloat16; hidden states are float32.
            packs: Whether to pack weights for faster products. Without packing, few weights are copied.
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
        replace_products_(self.encoder, self.product_dtype, packs=packs)
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
        # Whether a part is a variant, such as another normalisation. Variants run as they are.
        self.has_variants = find_stranger(model, within_encoder=False) is not None
        self.layers = [
            FastLayer(layer, self.product_dtype, self.dtype, x, packs=packs)
            for layer, x in zip(layers, inputs, strict=True)
        ]
        self.final_norm = fast_norm(model.decoder.final_norm, self.dtype)
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
        """The most numbers a row has in any new tensor of a step, except in the logits."""
        widest = max(x.out_features for x in self.plain.modules() if isinstance(x, nn.Linear))
        of_memory = 2 * len(self.layers) * self.plain.output_weight.size(1)  # keys and values of all layers
        return max(widest, of_memory)

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
        """Return the state before anything has been decoded."""
        return BeamState()

    def step(self, tokens: Tensor, memory: InferenceMemory, state: BeamState) -> Tensor:
        """Decode one new token for each row, and add it to the state.

        Args:
            tokens: (R,) int64; the K rows of a sentence lie side by side.
            memory: The encoded sources of B sentences.
            state: The tokens decoded before; changed in place.

        Returns:
            (R, D), the last hidden states.
        """
        beam_size = tokens.size(0) // memory.padding.size(0)
        if state.length > 0 or beam_size == 1:
            return self._step(tokens, memory, state, beam_size, later=beam_size)
        first = tokens[::beam_size]
        if not torch.equal(tokens, first.repeat_interleave(beam_size)):
            return self._step(tokens, memory, state, beam_size, later=beam_size)
        # All rows of a sentence are equal when a search begins, so only one is computed.
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
    """Cut a batch (B, S) into groups: yield the sentences of each group, and the length of its longest sentence.

    On a CPU a group has few tokens, so that hidden states stay in the CPU's caches. If the sentences are sorted by
    length, a group has hardly any padding.
    """
    num_sentences, length = padding_mask.shape
    if padding_mask.device.type != "cpu":
        yield slice(num_sentences), length
        return
    num_groups = max(1, -(-padding_mask.numel() // _TOKENS_AT_ONCE))
    at_once = max(1, -(-num_sentences // num_groups))
    # The last place that is not padding. Places cannot be counted: a token in the middle may have the pad id.
    ends = ((~padding_mask) * torch.arange(1, length + 1)).amax(dim=1).clamp_(min=1)
    for first in range(0, num_sentences, at_once):
        some = slice(first, first + at_once)
        yield some, int(ends[some].max())


@torch.inference_mode()
def _typical_normalizer(model: Transformer) -> float:
    """Estimate log(sum(exp(logits))), from one-token sentences with tokens from all over the vocabularies.

    It is subtracted from logits before they are rounded to bfloat16, where 11 stands for all numbers from 10.97 to
    11.03. Subtracting the same number from all logits changes no probability. It moves the logits of likely
    tokens, which decide the search, near 0, where bfloat16 is finer.
    """
    vocabularies = (model.encoder.embedding.tokens.weight, model.output_weight)
    source, prefix = (
        torch.linspace(0, len(x) - 1, 64, device=x.device).long()[:, None] for x in vocabularies
    )
    sources = source.masked_fill(source == model.pad_id, int(source[-1]))
    normalizers = model.decode(prefix, model.encode(sources)).logsumexp(dim=2)
    sound = normalizers[normalizers.isfinite()]
    return sound.mean().item() if sound.numel() else 0.0


def _additive(padding_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return -inf at padding and else 0: the form in which attention adds masks, so nothing is converted later."""
    return torch.zeros_like(padding_mask, dtype=dtype).masked_fill_(padding_mask, -torch.inf)
