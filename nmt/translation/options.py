"""The options of the translation task. Imports no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from nmt.config.mapping import Positional
from nmt.config.ranges import check_limits, check_ranges, limits
from nmt.errors import UserError
from nmt.generation.options import MOST_HYPOTHESES
from nmt.models.options import ModelOptions, TransformerOptions

if TYPE_CHECKING:
    from nmt.translation.loss import TranslationLoss
    from nmt.translation.task import TrainSides, TranslationTask


ModelOptionsT = TypeVar("ModelOptionsT", bound=ModelOptions)


@dataclass(frozen=True)
class TranslationOptions(Generic[ModelOptionsT]):
    """Translation from one language to another.

    Filled in, as in `TranslationOptions[OtherOptions]`, it is a task with another model than the Transformer.
    """

    data: Positional[Path]
    """The data directory that nmt-preprocess made."""
    model: ModelOptionsT = field(default_factory=TransformerOptions)  # type: ignore[assignment]
    label_smoothing: float = field(default=0.1, metadata=limits(least=0, below=1))
    """Probability that is spread over the other classes of the vocabulary."""
    r_drop: float = field(default=0.0, metadata=limits(least=0.0))
    """R-Drop: weight of the divergence between two passes with different dropout; 0 for one pass."""
    word_dropout: float = field(default=0.0, metadata=limits(least=0, below=1))
    """Probability with which training replaces a token that encoder or decoder reads by the unknown one."""
    eval_bleu: bool = True
    """Translate the validation set at each validation and score it with sacreBLEU."""
    eval_beam: int | None = None
    """Beam size of these translations; 5 unless given."""

    def check(self) -> None:
        """Raise `UserError` for values that make no sense."""
        check_limits(self)
        if self.r_drop and not _has_dropout(self.model):
            raise UserError("`r-drop` must have some dropout, but there is none. Raise `dropout`.")
        if self.eval_beam is not None:
            if not self.eval_bleu:
                raise UserError(
                    "`eval-beam` must not be given with `no-eval-bleu`, which translates nothing. Leave one out."
                )
            check_ranges(self, {"eval_beam": (1, MOST_HYPOTHESES)})

    def build(
        self,
        assets: Path | None,
        *,
        loss: TranslationLoss | None = None,
        train_sides: TrainSides | None = None,
    ) -> TranslationTask:
        """Make the task, with the vocabularies of a model folder, or of the data directory if there is none.

        Args:
            assets: The model folder.
            loss: Another loss instead of the label-smoothed cross-entropy, for a task that is built on this one.
            train_sides: Opens the training pairs instead of the directory's `train`, for such a task.

        Raises:
            UserError: An option of the cross-entropy is given together with another loss.
        """
        for name, value in (("label-smoothing", self.label_smoothing), ("r-drop", self.r_drop)):
            if loss is not None and value:
                raise UserError(
                    f"`{name}` must be 0 with a loss of the task's own, but is {value}. Give --{name} 0."
                )
        from nmt.data.data_directory import DataDirectory
        from nmt.translation.assets import TranslationAssets
        from nmt.translation.task import TranslationTask

        found = (
            TranslationAssets.of_data(DataDirectory(self.data))
            if assets is None
            else TranslationAssets.of_model(assets)
        )
        return TranslationTask(self, found, loss=loss, train_sides=train_sides)


def _has_dropout(model: Any) -> bool:
    """Return whether any of the model's kinds of dropout is on."""
    return any(getattr(model, own.name) for own in dataclasses.fields(model) if own.name.endswith("dropout"))
