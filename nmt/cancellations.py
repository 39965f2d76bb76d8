"""Which updates were cancelled because their gradient was not finite, and by which examples.

The trainer learns of it one update later, when the device has got there anyway, so that it never waits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nmt.data.batch_iterator import MicroBatch
from nmt.distributed import World
from nmt.task import LossOutput


@dataclass(frozen=True)
class Cancelled:
    """An update that was not made."""

    update: int
    examples: list[int]
    """Training examples of the batches whose loss was not finite; of all of the update's if every loss was."""


@dataclass(frozen=True)
class _Unread:
    update: int
    flags: Tensor
    """(1 + micro-batches,) bool, on its way to the CPU: is the update cancelled, is each loss not finite."""
    copied: torch.cuda.Event | None
    batches: list[Sequence[int]]


class Cancellations:
    """Watches the updates of all ranks."""

    def __init__(self, world: World, *, num_in_a_row: int = 0) -> None:
        self._world = world
        self._num_in_a_row = num_in_a_row
        self._unread: _Unread | None = None
        self._found: list[Cancelled] = []

    def note(
        self,
        update: int,
        is_cancelled: Tensor,
        outputs: Sequence[LossOutput],
        micro_batches: Sequence[MicroBatch],
    ) -> None:
        """Take in an update; what is known of the one before is read now. Every rank must call this."""
        self._read()
        losses = torch.stack([output.loss.detach().reshape(()).float() for output in outputs])
        flags = torch.cat([is_cancelled.reshape(1), ~losses.isfinite()])
        copied = None
        if flags.is_cuda:
            flags = flags.to("cpu", non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        batches = [micro_batch.indices if micro_batch.weight else () for micro_batch in micro_batches]
        self._unread = _Unread(update, flags, copied, batches)

    def num_in_a_row(self) -> int:
        """Return how many updates up to the last one were cancelled, waiting for the device."""
        self._read()
        return self._num_in_a_row

    def known_in_a_row(self) -> int:
        """Return how many updates up to the last but one were cancelled."""
        return self._num_in_a_row

    def take(self) -> list[Cancelled]:
        """Return what has been found since the last call."""
        found, self._found = self._found, []
        return found

    def _read(self) -> None:
        unread, self._unread = self._unread, None
        if unread is None:
            return
        if unread.copied is not None:
            unread.copied.synchronize()
        is_cancelled, *bad = unread.flags.tolist()
        if not is_cancelled:
            self._num_in_a_row = 0
            return
        self._num_in_a_row += 1
        # Every rank has the same gradient, so all of them are here.
        mine = [(is_bad, list(batch)) for is_bad, batch in zip(bad, unread.batches, strict=True)]
        everywhere = [pair for rank in self._world.gather(mine) for pair in rank]
        blamed = [batch for is_bad, batch in everywhere if is_bad] or [batch for _, batch in everywhere]
        self._found.append(Cancelled(unread.update, sorted(index for batch in blamed for index in batch)))
