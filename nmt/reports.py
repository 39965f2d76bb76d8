"""What a run says while it goes on: what the scopes have seen, how fast it is, and how long it will take."""

import time
from dataclasses import dataclass
from typing import Any

from nmt.data.batch_iterator import BatchIterator
from nmt.forecast import duration
from nmt.options import OptimizationOptions
from nmt.run_log import RunLog
from nmt.trainer import Trainer

_FIRST_UPDATES = 10  # until the speed is steady, and then as many to measure it by
_NUM_SHOWN = 20  # examples of a cancelled update that are named in a line


@dataclass
class Clock:
    """How long a run has taken, through all its resumes.

    Attributes:
        seconds_before: Time spent on the run before this process, or before the last checkpoint taken up.
        training_seconds: Time spent in updates since the last report, up to `last_read`.
    """

    seconds_before: float = 0.0
    training_seconds: float = 0.0

    def __post_init__(self) -> None:
        self._start = self.last_read = time.monotonic()

    @property
    def seconds(self) -> float:
        """Time spent on the run: training, validation and checkpoints."""
        return self.seconds_before + time.monotonic() - self._start

    @property
    def hours(self) -> float:
        """The same in hours, to some milliseconds."""
        return round(self.seconds / 3600, 6)

    def start_training(self) -> None:
        """Begin to count time as time of training; reports, validation and checkpoints are none."""
        self.last_read = time.monotonic()

    def count_training(self) -> None:
        """Count what has passed since then, or since the last call."""
        now = time.monotonic()
        self.training_seconds += now - self.last_read
        self.last_read = now

    def take_training_seconds(self) -> float:
        """Return the time of training since the last call of this, and begin anew."""
        self.count_training()
        seconds, self.training_seconds = self.training_seconds, 0.0
        return max(seconds, 1e-9)


class Reports:
    """Writes to the log of a run what its trainer's metrics have seen."""

    def __init__(
        self, log: RunLog, trainer: Trainer, batches: BatchIterator, options: OptimizationOptions
    ) -> None:
        self.log = log
        self.trainer = trainer
        self.batches = batches
        self.options = options
        self._num_updates = 0  # made by this process
        self._measured_from = 0.0

    def scope(self, scope: str, *, epoch: int, clock: Clock) -> None:
        """Log what a scope has seen, then empty it; every rank must call this."""
        metrics = self.trainer.metrics
        sums = metrics.sums(scope, self.trainer.world)  # waits for the device
        record: dict[str, Any] = {"update": self.trainer.update, "epoch": epoch}
        if sums["num_targets"]:  # none where every update was cancelled
            record.update(self.trainer.task.summarize(sums))
        if scope == "train":
            record["targets/s"] = sums["num_targets"] / clock.take_training_seconds()
            record.update(metrics.gauges(scope))
        record["hours"] = clock.hours
        if sums.get("num_cancelled"):  # not known to the first checkpoints
            record["cancelled updates"] = round(sums["num_cancelled"])
        self.log.report(scope, record)
        metrics.reset(scope)

    def update(self, *, epoch: int, clock: Clock) -> None:
        """Move the progress bar after an update, name cancelled ones, and say once how long the rest will take."""
        last_update = self._last_update()
        self.log.progress(self.trainer.update, epoch=epoch, total=last_update)
        self.cancelled()
        self._num_updates += 1
        if self._num_updates == _FIRST_UPDATES:
            self._measured_from = clock.last_read
        if self._num_updates == 2 * _FIRST_UPDATES and last_update is not None:
            seconds = (clock.last_read - self._measured_from) / _FIRST_UPDATES
            left = duration(seconds * max(last_update - self.trainer.update, 0))
            self.log.say(
                f"time: {seconds:.2g} s an update; {left} to update {last_update:,}, validation apart"
            )

    def cancelled(self) -> None:
        """Log the updates that are newly known to have been cancelled."""
        for cancelled in self.trainer.cancellations.take():
            if cancelled.is_overflow:
                self.log.say(
                    f"update {cancelled.update} cancelled: an overflow in fp16; the loss scale is halved"
                )
                continue
            shown = " ".join(map(str, cancelled.examples[:_NUM_SHOWN]))
            more = f" and {left:,} more" if (left := len(cancelled.examples) - _NUM_SHOWN) > 0 else ""
            self.log.say(
                f"update {cancelled.update} cancelled: the gradient is not finite; training examples {shown}{more}"
            )

    def _last_update(self) -> int | None:
        """Estimate the update at which the run will end."""
        ends = [] if self.options.max_update is None else [self.options.max_update]
        if self.options.max_epoch is not None:
            share = self.batches.examples_consumed / self.batches.num_examples
            epochs_done = self.batches.epoch - 1 + share
            ends.append(round(self.trainer.update * self.options.max_epoch / max(epochs_done, 1e-9)))
        return min(ends, default=None)
