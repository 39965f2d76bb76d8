"""The least that is a translation model: the mean of the source's embeddings, and a GRU that begins with it.

It has no attention, so it can tell no alignments; all else works as with any model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from custom_model_options import MeanOptions
from torch import Tensor, nn


class MeanMemory:
    def __init__(self, mean: Tensor) -> None:
        self.mean = mean  # (B, D)

    def select(self, sentences: Tensor) -> MeanMemory:
        return MeanMemory(self.mean[sentences])

    keep = select


class MeanState:
    hidden: Tensor | None = None  # (1, R, D)

    def reorder_(self, rows: Tensor) -> None:
        assert self.hidden is not None
        self.hidden = self.hidden[:, rows]


class MeanModel(nn.Module):
    logit_offset = 0.0

    def __init__(
        self, options: MeanOptions, source_vocabulary_size: int, target_vocabulary_size: int, pad_id: int
    ) -> None:
        super().__init__()
        dim = options.hidden_size
        self.pad_id = pad_id
        self.max_source_positions = options.max_source_positions
        self.max_target_positions = options.max_target_positions
        self.source_embedding = nn.Embedding(source_vocabulary_size, dim)
        self.target_embedding = nn.Embedding(target_vocabulary_size, dim)
        self.decoder = nn.GRU(dim, dim, batch_first=True)
        self.output_weight = nn.Parameter(torch.randn(target_vocabulary_size, dim) * dim**-0.5)

    @property
    def dtype(self) -> torch.dtype:
        return self.output_weight.dtype

    def forward(self, source: Tensor, target_input: Tensor) -> Tensor:
        return self._run(target_input, self.encode(source).mean[None])[0]

    def encode(self, source: Tensor) -> MeanMemory:
        is_token = (source != self.pad_id)[:, :, None]
        return MeanMemory((self.source_embedding(source) * is_token).sum(dim=1) / is_token.sum(dim=1))

    def start_state(self) -> MeanState:
        return MeanState()

    def step(self, tokens: Tensor, memory: MeanMemory, state: MeanState) -> Tensor:
        hidden = state.hidden
        if hidden is None:
            hidden = memory.mean.repeat_interleave(tokens.size(0) // memory.mean.size(0), dim=0)[None]
        features, state.hidden = self._run(tokens[:, None], hidden)
        return features.squeeze(1)

    def project(self, features: Tensor) -> Tensor:
        return F.linear(features, self.output_weight)

    def _run(self, target_input: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return self.decoder(self.target_embedding(target_input), hidden)
