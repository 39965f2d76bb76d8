"""How long the rest of a run takes, told from what its updates and validations have taken so far."""

import time
from collections import deque

import torch

from nmt.data.batch_iterator import BatchIterator
from nmt.trainer import Trainer

# Updates or seconds, whichever comes first, until the speed is steady. Slow updates are steady early, since the
# extra cost of the first ones does not grow with their length.
_NUM_FIRST, _FIRST_SECONDS = 10, 3.0
_NUM_KNOWN, _KNOWN_SECONDS = 10, 6.0  # then the same until the speed is known, but at least two updates,
_ONE_IS_ENOUGH_SECONDS = 15.0  # or a single one that takes this long
_NUM_REMEMBERED = 200  # updates over which the speed is a mean


class Pace:
    """The speed of a run, as it goes."""

    def __init__(self) -> None:
        self._num_first, self._first_seconds = 0, 0.0
        self._last: deque[float] = deque(maxlen=_NUM_REMEMBERED)
        self._seconds = 0.0  # sum of all remembered updates
        self.validation_seconds: float | None = None
        """Time of the last validation and the checkpoint after it."""

    def note_update(self, seconds: float) -> None:
        """Take in the time of an update, including the reading of its batches."""
        if self._num_first < _NUM_FIRST and self._first_seconds < _FIRST_SECONDS:
            self._num_first += 1
            self._first_seconds += seconds
            return
        if len(self._last) == _NUM_REMEMBERED:
            self._seconds -= self._last[0]
        self._last.append(seconds)
        self._seconds += seconds

    @property
    def is_known(self) -> bool:
        """Whether enough updates have been made to tell the speed."""
        enough = _KNOWN_SECONDS if len(self._last) > 1 else _ONE_IS_ENOUGH_SECONDS
        return len(self._last) >= _NUM_KNOWN or self._seconds >= enough

    @property
    def seconds_per_update(self) -> float:
        """The mean over the last updates."""
        return self._seconds / max(len(self._last), 1)

    def seconds_left(self, num_updates: int, num_validations: float) -> float:
        """Return how long `num_updates` take, with `num_validations` if the time of one is known."""
        return self.seconds_per_update * num_updates + (self.validation_seconds or 0.0) * num_validations


def try_updates(trainer: Trainer, batches: BatchIterator) -> float:
    """Return the seconds of an update, from some real updates, including the reading of their batches.

    The trainer cannot be used afterwards, since these updates change it. Every rank must call this.
    """
    pace = Pace()
    while True:
        epoch, start = batches.epoch, time.perf_counter()
        for micro_batches in batches:
            trainer.train_step(micro_batches, epoch=epoch)
            if trainer.world.device.type == "cuda":
                torch.cuda.synchronize(trainer.world.device)
            start, before = time.perf_counter(), start
            pace.note_update(start - before)
            if trainer.world.broadcast(pace.is_known):  # rank 0's clock counts for all
                return pace.seconds_per_update
