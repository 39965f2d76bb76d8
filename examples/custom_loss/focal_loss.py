"""Translation with the focal loss (Lin et al., 2017): what is predicted well already counts less."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch.nn.functional as F

from nmt.data.parallel_dataset import TranslationBatch
from nmt.models.transformer import Transformer
from nmt.task import LossOutput
from nmt.translation.loss import target_features
from nmt.translation.options import TranslationOptions
from nmt.translation.task import TranslationTask


@dataclass(frozen=True)
class FocalOptions:
    """Translation with the focal loss."""

    train_defaults: ClassVar = {"label_smoothing": 0.0}  # which this loss does not know
    translation: TranslationOptions
    """All options of the translation task."""
    focal_gamma: float = 2.0
    """How fast a token's weight, (1 - p) to this power, falls with its probability p; 0 for none."""

    def build(self, assets: Path | None) -> TranslationTask:
        return self.translation.build(assets, loss=partial(focal_loss, gamma=self.focal_gamma))


def focal_loss(model: Transformer, batch: TranslationBatch, *, gamma: float) -> LossOutput:
    """Return -sum (1 - p)^gamma log p over the target tokens."""
    features, target = target_features(model, batch)  # (N, D), (N,): padding is left out
    logits = F.linear(features, model.output_weight).float()  # (N, V)
    log_p = -F.cross_entropy(logits, target, reduction="none")  # (N,)
    loss = -((1 - log_p.exp()) ** gamma * log_p).sum()
    return LossOutput(loss, {"nll": -log_p.sum().detach()})
