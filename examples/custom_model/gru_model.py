"""An encoder-decoder of GRUs with attention (Luong et al., 2015, "dot"): no Transformer at all.

Shapes: B sentences, K beam size, R = B*K rows, S source length, T target length, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from custom_model_options import GruOptions
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


@dataclass
class GruMemory:
    """What the encoder knows of B sentences."""

    encoded: Tensor  # (B, S, D)
    is_padding: Tensor  # (B, S) bool
    first: Tensor  # (B, D): the decoder's first state

    def select(self, sentences: Tensor) -> GruMemory:
        return GruMemory(self.encoded[sentences], self.is_padding[sentences], self.first[sentences])

    keep = select  # nothing can be saved where sentences leave for good


@dataclass
class GruState:
    """What the decoder remembers of the tokens of R rows."""

    hidden: Tensor | None = None  # (1, R, D); None before the first step

    def reorder_(self, rows: Tensor) -> None:
        assert self.hidden is not None
        self.hidden = self.hidden[:, rows]


class GruModel(nn.Module):
    logit_offset = 0.0  # `project` returns the logits as they are
    num_attention_layers = 1

    def __init__(
        self, options: GruOptions, source_vocabulary_size: int, target_vocabulary_size: int, pad_id: int
    ) -> None:
        super().__init__()
        dim = options.hidden_size
        self.pad_id = pad_id
        self.max_source_positions = options.max_source_positions
        self.max_target_positions = options.max_target_positions
        self.source_embedding = nn.Embedding(source_vocabulary_size, dim, padding_idx=pad_id)
        self.target_embedding = nn.Embedding(target_vocabulary_size, dim, padding_idx=pad_id)
        for table in (self.source_embedding, self.target_embedding):
            nn.init.normal_(table.weight, std=dim**-0.5)
        self.encoder = nn.GRU(dim, dim // 2, bidirectional=True, batch_first=True)
        self.bridge = nn.Linear(dim, dim)
        self.decoder = nn.GRU(dim, dim, batch_first=True)
        self.combine = nn.Linear(2 * dim, dim)
        self.dropout = nn.Dropout(options.dropout)
        self.output_weight = self.target_embedding.weight  # one matrix for both

    @property
    def dtype(self) -> torch.dtype:
        return self.output_weight.dtype

    def forward(self, source: Tensor, target_input: Tensor) -> Tensor:
        """(B, S), (B, T) -> (B, T, D): what a loss asks."""
        return self._decode(target_input, self.encode(source), None)[0]

    def encode(self, source: Tensor) -> GruMemory:
        """(B, S) -> what the decoder reads."""
        is_token = source != self.pad_id
        embedded = self.dropout(self.source_embedding(source))
        # Packed, so that the way back does not begin in the padding: a sentence does not depend on its neighbours.
        places = torch.arange(1, source.size(1) + 1, device=source.device)
        lengths = (is_token * places).amax(dim=1).cpu()
        packed = pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
        outputs, last = self.encoder(packed)
        encoded, _ = pad_packed_sequence(outputs, batch_first=True, total_length=source.size(1))
        first = torch.tanh(self.bridge(last.transpose(0, 1).flatten(1)))  # (2, B, D/2) -> (B, D)
        return GruMemory(encoded, ~is_token, first)

    def start_state(self) -> GruState:
        return GruState()

    def step(self, tokens: Tensor, memory: GruMemory, state: GruState) -> Tensor:
        """(R,) -> (R, D): what a search asks; the state takes the tokens in."""
        features, state.hidden = self._decode(tokens[:, None], memory, state.hidden)
        return features.squeeze(1)

    def project(self, features: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        return F.linear(features, self.output_weight)

    def attention_weights(self, source: Tensor, target_input: Tensor, *, layer: int) -> Tensor:
        """(B, S), (B, T) -> (B, T, S): what alignments are told from. A model without it tells none."""
        memory = self.encode(source)
        outputs, _ = self._run(target_input, memory, None)
        return self._attend(outputs, memory).float()

    def _decode(
        self, target_input: Tensor, memory: GruMemory, hidden: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        outputs, hidden = self._run(target_input, memory, hidden)  # (R, T, D), (1, R, D)
        context = (self._attend(outputs, memory) @ memory.encoded).view_as(outputs)
        features = torch.tanh(self.combine(torch.cat([outputs, context], dim=2)))
        return self.dropout(features), hidden

    def _run(self, target_input: Tensor, memory: GruMemory, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        if hidden is None:
            beam_size = target_input.size(0) // memory.first.size(0)
            hidden = memory.first.repeat_interleave(beam_size, dim=0)[None]
        return self.decoder(self.dropout(self.target_embedding(target_input)), hidden)

    def _attend(self, outputs: Tensor, memory: GruMemory) -> Tensor:
        """(R, T, D) -> (B, K*T, S): the rows of a sentence are just more queries to it."""
        num_sentences, _, dim = memory.encoded.shape
        scores = outputs.reshape(num_sentences, -1, dim) @ memory.encoded.transpose(1, 2)
        return scores.masked_fill(memory.is_padding[:, None], -torch.inf).softmax(dim=2)
