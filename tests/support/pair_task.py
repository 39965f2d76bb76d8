"""Eleven pairs and the translation loss of a small Transformer in float64, without a corpus around them."""

from typing import Any

import numpy as np
import torch
from torch import nn

from nmt.data.parallel_dataset import TranslationBatch
from nmt.distributed import World
from nmt.models.options import TransformerOptions
from nmt.models.transformer import Transformer
from nmt.task import LossOutput
from nmt.translation.loss import translation_loss

PAD, EOS = 1, 2
SIZES = TransformerOptions(
    encoder_layers=1,
    decoder_layers=2,
    encoder_embed_dim=8,
    decoder_embed_dim=8,
    encoder_ffn_embed_dim=16,
    decoder_ffn_embed_dim=16,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    share_all_embeddings=True,
    dropout=0.0,
)
# Eleven pairs of uneven lengths, from a fixed generator; batches of uneven sizes out of them.
RANDOM = np.random.default_rng(5)
PAIRS = [
    tuple(RANDOM.integers(4, 15, size=n).tolist() for n in RANDOM.integers(1, 9, size=2)) for _ in range(11)
]
ALL = list(range(11))
UNEVEN = [ALL[:1], ALL[1:6], ALL[6:8], ALL[8:]]


class PairTask:
    """The translation loss without anything around it, in float64."""

    metrics = {"loss": "min"}

    def build_model(self) -> nn.Module:
        torch.manual_seed(3)
        return Transformer(SIZES, source_vocabulary_size=15, target_vocabulary_size=15, pad_id=PAD).double()

    def compute_loss(self, model: Transformer, batch: TranslationBatch) -> LossOutput:
        return translation_loss(model, batch, label_smoothing=0.1)

    def summarize(self, sums: dict[str, float]) -> dict[str, float]:
        return {"loss": sums["loss"] / sums["num_targets"], "nll": sums["nll"] / sums["num_targets"]}

    def evaluate(self, model: nn.Module, examples: Any, world: World) -> dict[str, float]:
        return {}


def collate(indices: list[int]) -> TranslationBatch:
    def pad(rows: list[list[int]]) -> torch.Tensor:
        width = max(map(len, rows))
        return torch.tensor([row + [PAD] * (width - len(row)) for row in rows])

    sources = [PAIRS[i][0] + [EOS] for i in indices]
    targets = [PAIRS[i][1] + [EOS] for i in indices]
    return TranslationBatch(
        source=pad(sources),
        target_input=pad([[EOS, *row[:-1]] for row in targets]),
        target=pad(targets),
        num_examples=len(indices),
        num_targets=sum(map(len, targets)),
    )
