"""How long a run has taken."""

import time
from dataclasses import dataclass, replace
from typing import Self


@dataclass
class Clock:
    """How long a run has taken, through all its resumes.

    Attributes:
        seconds_before: Time spent on the run before this process, or before the last checkpoint taken up.
        training_seconds: Time spent in updates since the last report, up to `last_read`.
        trained: Time that this process has spent in updates, up to `last_read`.
    """

    seconds_before: float = 0.0
    training_seconds: float = 0.0

    def __post_init__(self) -> None:
        self._start = self.last_read = time.monotonic()
        self.trained = 0.0

    @property
    def seconds(self) -> float:
        """Time spent on the run: training, validation and checkpoints."""
        return self.seconds_before + time.monotonic() - self._start

    @property
    def hours(self) -> float:
        """The same in hours, to some milliseconds."""
        return round(self.seconds / 3600, 6)

    def start_training(self) -> None:
        """Begin to count time of training. Reports, validation and checkpoints do not count as such."""
        self.last_read = time.monotonic()

    def count_training(self) -> None:
        """Count what has passed since then, or since the last call."""
        now = time.monotonic()
        self.training_seconds += now - self.last_read
        self.trained += now - self.last_read
        self.last_read = now

    def take_training_seconds(self) -> float:
        """Return the time of training since the last call of this, and begin anew."""
        self.count_training()
        seconds, self.training_seconds = self.training_seconds, 0.0
        return max(seconds, 1e-9)

    def stopped(self) -> Self:
        """Return a clock that goes on from here, for a resumed run."""
        return replace(self, seconds_before=self.seconds)
