"""What a run remembers of its validations and checkpoints."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

Direction = Literal["min", "max"]


@dataclass
class Progress:
    """What a run remembers besides the trainer's state and its place in the data.

    Attributes:
        values: The value of `best-checkpoint-metric` after each update that was validated.
        num_without_better: Validations since the best one, by the metric that patience follows.
        kept: Updates whose checkpoints are kept for good.
        measured: All metrics of each validation, by its update; checkpoints of older releases have none.
    """

    values: dict[int, float] = field(default_factory=dict)
    num_without_better: int = 0
    kept: list[int] = field(default_factory=list)
    measured: dict[int, dict[str, float]] = field(default_factory=dict)

    def note(
        self,
        update: int,
        value: float,
        *,
        better: Direction,
        measured: Mapping[str, float] | None = None,
        patience: tuple[str, Direction] | None = None,
    ) -> None:
        """Take in a validation.

        Args:
            update: The update after which it was made.
            value: The value of `best-checkpoint-metric`.
            better: Which way that metric is better.
            measured: All metrics of the validation.
            patience: The metric that patience follows, and which way it is better; that of `value` unless given.
        """
        self.values[update] = value
        if measured is not None:
            self.measured[update] = dict(measured)
        ranking = self.ranking(better) if patience is None else self.ranking(patience[1], metric=patience[0])
        self.num_without_better = 0 if ranking[0] == update else self.num_without_better + 1

    def ranking(self, better: Direction, *, metric: str | None = None) -> list[int]:
        """Return the validated updates, best first; of equal ones the earlier first, NaN last.

        Args:
            better: Which way is better.
            metric: The metric to rank by; `best-checkpoint-metric` unless given.
        """
        values = self.values
        if metric is not None:
            values = {update: found[metric] for update, found in self.measured.items() if metric in found}
        sign = 1 if better == "min" else -1

        def rank(update: int) -> tuple[bool, float, int]:
            value = values[update]
            return (True, 0.0, update) if math.isnan(value) else (False, sign * value, update)

        return sorted(values, key=rank)

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Self:
        """Undo `asdict` and JSON, whose keys are all text."""
        by_update = {
            name: {int(update): value for update, value in state.get(name, {}).items()}
            for name in ("values", "measured")
        }
        return cls(**{**state, **by_update})
