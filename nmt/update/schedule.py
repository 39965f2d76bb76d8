"""The learning rate: schedules as functions of update and epoch, and the one that looks at the validation.

Every schedule is a warm-up, update / warmup_updates up to 1, and then one of these, where n counts updates or
epochs (`lr_unit`) from 1 on, w is the warm-up and N the end of training in the same unit:

- inverse_sqrt: sqrt(w / n), as fairseq's inverse_square_root_schedule.py;
- cosine: half a cosine from 1 to the end: (1 + cos(pi p)) / 2 with p = (n - 1 - w) / (N - w);
- polynomial: (1 - p) ** power;
- milestones: lr_shrink for each milestone m < n;
- plateau, constant: 1; what a plateau does is up to `Plateau`.

So the update or epoch after the warm-up is the first at the full rate, and none is wasted on a rate of 0.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from nmt.options import OptimizationOptions

Schedule = Callable[[int, int], float]
"""(update, epoch), both from 1 on -> the factor by which the peak learning rate is multiplied."""

_WARMUP_UPDATES = 4000  # fairseq's, for Transformers


def num_warmup_updates(options: OptimizationOptions, *, updates_per_epoch: int) -> int:
    """Return the length of the warm-up in updates."""
    if options.warmup_epochs is not None and not options.warmup_updates:
        return round(options.warmup_epochs * updates_per_epoch)
    return _WARMUP_UPDATES if options.warmup_updates is None else options.warmup_updates


def num_updates(options: OptimizationOptions, *, updates_per_epoch: int) -> int | None:
    """Return the update at which `max_update` or `max_epoch`, whichever is first, ends training, if any does."""
    ends = [] if options.max_update is None else [options.max_update]
    if options.max_epoch is not None:
        ends.append(options.max_epoch * updates_per_epoch)
    return min(ends, default=None)


def build_schedule(options: OptimizationOptions, *, updates_per_epoch: int) -> Schedule:
    """Return the factor of the learning rate for each update.

    Args:
        options: The schedule, its warm-up, and the end of training.
        updates_per_epoch: To convert between the two.
    """
    warmup_updates = num_warmup_updates(options, updates_per_epoch=updates_per_epoch)
    by_epoch = options.lr_unit == "epoch"
    unit = updates_per_epoch if by_epoch else 1
    warmup = math.ceil(warmup_updates / unit)
    last_update = num_updates(options, updates_per_epoch=updates_per_epoch)
    end = None if last_update is None else math.ceil(last_update / unit)
    lowest = options.end_learning_rate / options.lr

    def done(n: int) -> float:
        """Return the share of the way from the end of the warm-up to the end of training, in [0, 1]."""
        assert end is not None
        return min(max(n - 1 - warmup, 0) / max(end - warmup, 1), 1.0)

    def decay(n: int) -> float:
        if options.lr_scheduler == "inverse_sqrt":
            return math.sqrt(max(warmup, 1) / max(n, warmup, 1))
        if options.lr_scheduler == "cosine":
            return lowest + (1.0 - lowest) * 0.5 * (1.0 + math.cos(math.pi * done(n)))
        if options.lr_scheduler == "polynomial":
            return lowest + (1.0 - lowest) * (1.0 - done(n)) ** options.power
        if options.lr_scheduler == "milestones":
            return options.lr_shrink ** sum(n > milestone for milestone in options.lr_milestones)
        return 1.0

    def factor(update: int, epoch: int) -> float:
        ramp = update / warmup_updates if update < warmup_updates else 1.0
        return ramp * decay(epoch if by_epoch else update)

    return factor


@dataclass
class Plateau:
    """Multiplies the learning rate by `lr_shrink` when validations have stopped becoming better.

    As torch's ReduceLROnPlateau with a relative threshold.

    Attributes:
        factor: What the learning rate is multiplied by now.
        best: The best value so far; None before the first.
        num_without_better: Validations since then, or since the last reduction.
    """

    factor: float = 1.0
    best: float | None = None
    num_without_better: int = 0

    def note(self, value: float, options: OptimizationOptions, *, better: Literal["min", "max"]) -> None:
        """Take in the value of a validation."""
        sign = 1.0 if better == "min" else -1.0
        margin = 0.0 if self.best is None else options.lr_threshold * abs(self.best)
        if not math.isnan(value) and (self.best is None or sign * value < sign * self.best - margin):
            self.best, self.num_without_better = value, 0
            return
        self.num_without_better += 1
        if self.num_without_better > options.lr_patience:
            self.factor, self.num_without_better = self.factor * options.lr_shrink, 0
