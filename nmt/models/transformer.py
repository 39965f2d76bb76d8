"""The encoder-decoder Transformer (Vaswani et al., "Attention Is All You Need", 2017).

Shapes: B sentences, K beam size, R = B*K rows, S source length, T target length, D model, H heads,
E head size, F feed-forward, V vocabulary. Sequences are padded on the right.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nmt.models import packed_layers
from nmt.models.attention import CrossAttention, SelfAttention
from nmt.models.blocks import Embedding, left_in, make_feed_forward, make_norm, make_residual, recomputed
from nmt.models.decoder_state import DecoderState, LayerState, Memory
from nmt.models.options import TransformerOptions
from nmt.models.packed import PackedTokens, Spans, have_kernels


class Transformer(nn.Module):
    """Encode a source once, then decode a target in one pass (`forward`) or token by token (`step`)."""

    logit_offset = 0.0  # `project` returns the logits unshifted

    def __init__(
        self,
        options: TransformerOptions,
        *,
        source_vocabulary_size: int,
        target_vocabulary_size: int,
        pad_id: int,
    ) -> None:
        super().__init__()
        assert not options.share_all_embeddings or source_vocabulary_size == target_vocabulary_size
        self.pad_id = pad_id
        # Whether each pass runs all layers.
        self.is_whole = not (options.encoder_layerdrop or options.decoder_layerdrop)
        self.max_source_positions = options.max_source_positions
        self.max_target_positions = options.max_target_positions
        self.encoder = Encoder(options, vocabulary_size=source_vocabulary_size, pad_id=pad_id)
        self.decoder = Decoder(options, vocabulary_size=target_vocabulary_size, pad_id=pad_id)
        if options.share_all_embeddings:
            self.decoder.embedding.tokens.weight = self.encoder.embedding.tokens.weight
        if options.share_all_embeddings or options.share_decoder_input_output_embed:
            self.output_weight = self.decoder.embedding.tokens.weight
        else:
            self.output_weight = nn.Parameter(torch.empty(target_vocabulary_size, options.decoder_embed_dim))
            nn.init.normal_(self.output_weight, std=options.decoder_embed_dim**-0.5)

    @property
    def dtype(self) -> torch.dtype:
        """The type of weights and hidden states."""
        return self.output_weight.dtype

    def forward(self, source: Tensor, target_input: Tensor) -> Tensor:
        """Encode sources (B, S) and decode their targets (B, T), as in training: (B, T, D) hidden states."""
        return self.features(target_input, self.encode(source))

    def encode(self, source: Tensor) -> Memory:
        """Encode sources, and project them to the keys and values of each decoder layer.

        Args:
            source: (B, S) int64 token ids, each sentence ending in eos and padded on the right.
        """
        padding_mask = source == self.pad_id
        return self.decoder.project_memory(self.encoder(source, padding_mask), padding_mask)

    def features(self, target_input: Tensor, memory: Memory, state: DecoderState | None = None) -> Tensor:
        """Return the decoder's last hidden states (R, T, D); arguments as in `decode`."""
        return self.decoder(target_input, memory, state)

    def step(self, tokens: Tensor, memory: Memory, state: DecoderState) -> Tensor:
        """Decode one new token for each row, (R,) int64, and add it to the state: (R, D) hidden states."""
        return self.features(tokens[:, None], memory, state).squeeze(1)

    def packed_features(self, source: PackedTokens, target_input: PackedTokens) -> Tensor:
        """Encode sources and decode their targets, each side packed into one row, as in training on a GPU.

        Args:
            source: N tokens; each sentence ends in eos.
            target_input: M tokens, the targets shifted right; part i belongs to part i of the source.

        Returns:
            (M, D): the decoder's last hidden states.
        """
        return self.decoder.packed(target_input, self.encoder.packed(source), source)

    def decode(self, target_input: Tensor, memory: Memory, state: DecoderState | None = None) -> Tensor:
        """Predict the token that follows each position.

        Args:
            target_input: (R, T) int64, the target shifted right. With a state, only the tokens that are new
                since the last call (usually one); they are added to the state.
            memory: The encoded sources of B sentences; the K rows of a sentence lie side by side.
            state: What has been decoded before, from `start_state`; None if `target_input` is the whole target.

        Returns:
            (R, T, V) logits.
        """
        return self.project(self.features(target_input, memory, state))

    def project(self, features: Tensor) -> Tensor:
        """(..., D) -> (..., V): hidden states to logits."""
        return F.linear(features, self.output_weight)

    def start_state(self) -> DecoderState:
        """Return the state before anything has been decoded."""
        return DecoderState([LayerState() for _ in self.decoder.layers])

    @property
    def num_attention_layers(self) -> int:
        """The number of decoder layers, each of which has attention weights."""
        return len(self.decoder.layers)

    def attention_weights(self, source: Tensor, target_input: Tensor, *, layer: int) -> Tensor:
        """Run sources (B, S) and targets (B, T) through the model; return the attention of a layer to the source.

        Returns:
            (B, T, S) float32, the mean over the heads; each row sums to 1, and source padding has weight 0.
        """
        attention = cast(DecoderLayer, self.decoder.layers[layer]).cross_attention
        inputs: list[Tensor] = []
        handle = attention.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
        try:
            memory = self.encode(source)
            self.features(target_input, memory)
        finally:
            handle.remove()
        return attention.weights(inputs[0], memory.keys[layer], padding_mask=memory.padding_mask)


class Encoder(nn.Module):
    """Token ids to hidden states of the same length."""

    def __init__(self, options: TransformerOptions, *, vocabulary_size: int, pad_id: int) -> None:
        super().__init__()
        dim = options.encoder_embed_dim
        self.head_size = dim // options.encoder_attention_heads
        self.embedding = Embedding(
            vocabulary_size,
            dim,
            pad_id=pad_id,
            max_positions=options.max_source_positions,
            learned_positions=options.encoder_learned_pos,
            options=options,
        )
        self.layers = nn.ModuleList(EncoderLayer(options) for _ in range(options.encoder_layers))
        self.layerdrop = options.encoder_layerdrop
        self.activation_checkpointing = options.activation_checkpointing
        self.final_norm = make_norm(dim, options) if options.encoder_normalize_before else nn.Identity()

    def forward(self, source: Tensor, padding_mask: Tensor) -> Tensor:
        """(B, S) int64 and its padding mask -> (B, S, D)."""
        attention_mask = ~padding_mask[:, None, None, :]  # (B, 1, 1, S)
        return self._run_layers(self.embedding(source), attention_mask)

    def packed(self, source: PackedTokens) -> Tensor:
        """Encode a packed row of N tokens: (1, N, D)."""
        x = self.embedding(source.ids[None], positions=source.positions)
        spans = Spans(source, source, **_kernels_for(x, self.head_size))
        if not self.activation_checkpointing and packed_layers.can_run_all(
            self.layers, EncoderLayer, x, spans
        ):
            layers = [cast(EncoderLayer, layer).sublayers(spans) for layer in self.layers]
            return self.final_norm(packed_layers.run(x, layers))
        return self._run_layers(x, spans)

    def _run_layers(self, x: Tensor, attention_mask: Tensor | Spans) -> Tensor:
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        for _, layer in left_in(self.layers, self.layerdrop if self.training else 0.0):
            x = recomputed(layer, x, attention_mask) if recompute else layer(x, attention_mask)
        return self.final_norm(x)


class Decoder(nn.Module):
    """Target prefixes and the memory of their sources to hidden states that predict the next tokens."""

    def __init__(self, options: TransformerOptions, *, vocabulary_size: int, pad_id: int) -> None:
        super().__init__()
        dim = options.decoder_embed_dim
        self.head_size = dim // options.decoder_attention_heads
        self.embedding = Embedding(
            vocabulary_size,
            dim,
            pad_id=pad_id,
            max_positions=options.max_target_positions,
            learned_positions=options.decoder_learned_pos,
            options=options,
        )
        self.layers = nn.ModuleList(DecoderLayer(options) for _ in range(options.decoder_layers))
        self.layerdrop = options.decoder_layerdrop
        self.activation_checkpointing = options.activation_checkpointing
        self.final_norm = make_norm(dim, options) if options.decoder_normalize_before else nn.Identity()

    def project_memory(self, encoded: Tensor, padding_mask: Tensor) -> Memory:
        """Project the encoder's output (B, S, D) to the keys and values of each layer."""
        projected = [
            cast(DecoderLayer, layer).cross_attention.project_memory(encoded) for layer in self.layers
        ]
        return Memory([keys for keys, _ in projected], [values for _, values in projected], padding_mask)

    def forward(self, target_input: Tensor, memory: Memory, state: DecoderState | None) -> Tensor:
        """(R, T) int64 -> (R, T, D); see `Transformer.decode`."""
        # The memory and its mask have B sentences, but x has R = B*K rows: CrossAttention takes the K rows of a
        # sentence as more queries.
        attention_mask = ~memory.padding_mask[:, None, None, :]  # (B, 1, 1, S)
        x = self.embedding(target_input, start=0 if state is None else state.length)
        recompute = self.activation_checkpointing and torch.is_grad_enabled() and state is None
        for i, layer in left_in(self.layers, self.layerdrop if self.training else 0.0):
            layer_state = None if state is None else state.layers[i]
            inputs = (x, (memory.keys[i], memory.values[i]))
            context: dict[str, Any] = {"attention_mask": attention_mask, "state": layer_state}
            x = recomputed(layer, *inputs, **context) if recompute else layer(*inputs, **context)
        return self.final_norm(x)

    def packed(self, target_input: PackedTokens, encoded: Tensor, source: PackedTokens) -> Tensor:
        """Decode a packed row of M tokens from its encoded source (1, N, D): (M, D)."""
        x = self.embedding(target_input.ids[None], positions=target_input.positions)
        kernels = _kernels_for(x, self.head_size)
        spans = (
            Spans(target_input, target_input, is_causal=True, **kernels),
            Spans(target_input, source, **kernels),
        )
        if not self.activation_checkpointing and packed_layers.can_run_all(
            self.layers, DecoderLayer, x, spans[0]
        ):
            layers = [cast(DecoderLayer, layer).sublayers(encoded, spans) for layer in self.layers]
            return self.final_norm(packed_layers.run(x, layers)).squeeze(0)
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        for layer in self.layers:
            x = recomputed(layer, x, encoded, spans=spans) if recompute else layer(x, encoded, spans=spans)
        return self.final_norm(x).squeeze(0)


class EncoderLayer(nn.Module):
    """Self-attention, then feed-forward."""

    def __init__(self, options: TransformerOptions) -> None:
        super().__init__()
        dim = options.encoder_embed_dim
        self.self_attention = SelfAttention(
            dim, options.encoder_attention_heads, dropout=options.attention_dropout
        )
        self.feed_forward = make_feed_forward(dim, options.encoder_ffn_embed_dim, options)
        pre_norm = options.encoder_normalize_before
        self.around_attention = make_residual(dim, pre_norm=pre_norm, options=options)
        self.around_feed_forward = make_residual(dim, pre_norm=pre_norm, options=options)

    def forward(self, x: Tensor, attention_mask: Tensor | Spans) -> Tensor:
        """(B, S, D) -> (B, S, D); the mask is True where attention is allowed. Packed rows have spans instead."""
        if isinstance(attention_mask, Spans) and packed_layers.can_run(self, x, attention_mask):
            return packed_layers.run(x, [self.sublayers(attention_mask)])
        x = self.around_attention(x, lambda y: self.self_attention(y, attention_mask=attention_mask))
        return self.around_feed_forward(x, self.feed_forward)

    def sublayers(self, spans: Spans) -> list[packed_layers.Sublayer]:
        """Return the layer's blocks for a packed row, in the form that runs in our own kernels."""
        return [
            (self.around_attention, packed_layers.self_attention(self.self_attention, spans)),
            (self.around_feed_forward, packed_layers.feed_forward(self.feed_forward)),
        ]


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to the source, then feed-forward.

    The fast form of the decoder (`inference_parts.py`) uses this `forward`, too; its parts have the same names.
    """

    def __init__(self, options: TransformerOptions) -> None:
        super().__init__()
        dim, num_heads = options.decoder_embed_dim, options.decoder_attention_heads
        self.self_attention = SelfAttention(dim, num_heads, dropout=options.attention_dropout)
        self.cross_attention = CrossAttention(
            dim, options.encoder_embed_dim, num_heads, dropout=options.attention_dropout
        )
        self.feed_forward = make_feed_forward(dim, options.decoder_ffn_embed_dim, options)
        pre_norm = options.decoder_normalize_before
        self.around_self_attention = make_residual(dim, pre_norm=pre_norm, options=options)
        self.around_cross_attention = make_residual(dim, pre_norm=pre_norm, options=options)
        self.around_feed_forward = make_residual(dim, pre_norm=pre_norm, options=options)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | tuple[Tensor, Tensor],
        *,
        attention_mask: Tensor | None = None,
        state: LayerState | None = None,
        spans: tuple[Spans, Spans] | None = None,
    ) -> Tensor:
        """Compute a layer's output.

        Args:
            x: (R, T, D).
            memory: The keys and values of the source for this layer, from `project_memory`; for packed rows the
                encoder's output itself.
            attention_mask: That of the memory.
            state: That of this layer.
            spans: For packed rows, instead of the mask: of the target row to itself, and to its source row.

        Returns:
            (R, T, D).
        """
        if spans is not None and isinstance(memory, Tensor) and packed_layers.can_run(self, x, spans[0]):
            return packed_layers.run(x, [self.sublayers(memory, spans)])

        def attend_to_past(y: Tensor) -> Tensor:
            if spans is not None:
                return self.self_attention(y, attention_mask=spans[0])
            # No padding mask is needed. Padding is on the right, so no real token sees it; the outputs at padding
            # do not count.
            return self.self_attention(y, is_causal=True, state=state)

        def attend_to_source(y: Tensor) -> Tensor:
            if isinstance(memory, Tensor):
                assert spans is not None
                return self.cross_attention.attend_packed(y, memory, spans[1])
            return self.cross_attention(y, *memory, attention_mask=attention_mask)

        x = self.around_self_attention(x, attend_to_past)
        x = self.around_cross_attention(x, attend_to_source)
        return self.around_feed_forward(x, self.feed_forward)

    def sublayers(self, memory: Tensor, spans: tuple[Spans, Spans]) -> list[packed_layers.Sublayer]:
        """Return the layer's blocks for a packed row, in the form that runs in our own kernels."""
        to_past = packed_layers.self_attention(self.self_attention, spans[0])
        to_source = packed_layers.cross_attention(self.cross_attention, memory, spans[1])
        return [
            (self.around_self_attention, to_past),
            (self.around_cross_attention, to_source),
            (self.around_feed_forward, packed_layers.feed_forward(self.feed_forward)),
        ]


def _kernels_for(x: Tensor, head_size: int) -> dict[str, bool]:
    """Return, as arguments of `Spans`, which of our own kernels work for packed rows (1, N, D).

    The first call tries the kernels out.
    """
    return {
        "by_kernels": have_kernels(x.dtype, head_size, x.device),
        "has_layer_kernels": packed_layers.have_kernels(x.dtype, x.size(-1), x.device),
    }
