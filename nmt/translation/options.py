"""The options of the translation task. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from nmt.errors import UserError
from nmt.models.options import TransformerOptions

if TYPE_CHECKING:
    from nmt.translation.loss import TranslationLoss
    from nmt.translation.task import TranslationTask


@dataclass(frozen=True)
class TranslationOptions:
    """Translation: a Transformer from one language to another."""

    data: tyro.conf.Positional[Path]
    """The data directory that nmt-preprocess made."""
    model: TransformerOptions = field(default_factory=TransformerOptions)
    label_smoothing: float = 0.1
    """Probability that is spread over the other classes of the vocabulary."""
    eval_bleu: bool = True
    """Translate the validation set at each validation and score it with sacreBLEU."""
    eval_beam: int | None = None
    """Beam size of these translations; 5 unless given."""

    def check(self) -> None:
        """Raise `UserError` for values that make no sense."""
        if not 0.0 <= self.label_smoothing < 1.0:
            raise UserError(
                f"`label-smoothing` must be at least 0 and below 1, but is {self.label_smoothing}."
            )
        if self.eval_beam is not None:
            if not self.eval_bleu:
                raise UserError(
                    "`eval-beam` must not be given with `no-eval-bleu`, which translates nothing."
                )
            if self.eval_beam < 1:
                raise UserError(f"`eval-beam` must be at least 1, but is {self.eval_beam}.")

    def build(self, assets: Path | None, *, loss: TranslationLoss | None = None) -> TranslationTask:
        """Make the task, with the vocabularies of a model folder, or of the data directory if there is none.

        Args:
            assets: The model folder.
            loss: A loss of one's own instead of the label-smoothed cross-entropy, for a task made of this one.

        Raises:
            UserError: An option of the cross-entropy is given together with another loss.
        """
        if loss is not None and self.label_smoothing:
            raise UserError(
                f"`label-smoothing` must be 0 with a loss of the task's own, but is {self.label_smoothing}. "
                "Give --label-smoothing 0."
            )
        from nmt.data.data_directory import DataDirectory
        from nmt.translation.assets import TranslationAssets
        from nmt.translation.task import TranslationTask

        if assets is None:
            return TranslationTask(self, TranslationAssets.of_data(DataDirectory(self.data)), loss=loss)
        return TranslationTask(self, TranslationAssets.of_model(assets), loss=loss)
