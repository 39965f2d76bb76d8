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
        num_without_better: Validations since the best one.
        kept: Updates whose checkpoints are kept for good.
    """

    values: dict[int, float] = field(default_factory=dict)
    num_without_better: int = 0
    kept: list[int] = field(default_factory=list)

    def note(self, update: int, value: float, *, better: Direction) -> None:
        """Take in a validation."""
        self.values[update] = value
        self.num_without_better = 0 if self.ranking(better)[0] == update else self.num_without_better + 1

    def ranking(self, better: Direction) -> list[int]:
        """Return the validated updates, best first; the earlier of equals first, what is not a number last."""
        sign = 1 if better == "min" else -1

        def rank(update: int) -> tuple[bool, float, int]:
            value = self.values[update]
            return (True, 0.0, update) if math.isnan(value) else (False, sign * value, update)

        return sorted(self.values, key=rank)

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Self:
        """Undo `asdict` and JSON, which has only text for keys."""
        return cls(**{**state, "values": {int(update): value for update, value in state["values"].items()}})
