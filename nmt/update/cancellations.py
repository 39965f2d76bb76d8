"""Which updates were cancelled because their gradient was not finite, and by which examples.

The trainer learns of it one update later, when the device has got there anyway, so that it never waits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nmt.data.batch_iterator import MicroBatch
from nmt.distributed import World
from nmt.system.deferred import Late
from nmt.task import LossOutput


@dataclass(frozen=True)
class Cancelled:
    """An update that was not made."""

    update: int
    examples: list[int]
    """Training examples of the batches whose loss was not finite; of all of the update's if every loss was."""
    is_overflow: bool = False
    """The losses were finite, and the loss scale of float16 was too high: it has been lowered, and all is well."""


@dataclass(frozen=True)
class _Unread:
    update: int
    flags: Late
    """(2 + micro-batches,) bool: is the update cancelled, can the scale be lowered, is each loss not finite."""
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
        *,
        can_lower_scale: Tensor,
    ) -> None:
        """Take in an update; what is known of the one before is read now. Every rank must call this.

        Args:
            update: Its number.
            is_cancelled: Scalar bool on the device, the same on every rank.
            outputs: The losses of this rank's micro-batches.
            micro_batches: What they are of.
            can_lower_scale: Scalar bool on the device: the gradient may have been finite at a lower loss scale.
        """
        self._read()
        losses = torch.stack([output.loss.detach().reshape(()).float() for output in outputs])
        flags = torch.cat([torch.stack([is_cancelled, can_lower_scale]), ~losses.isfinite()])
        batches = [micro_batch.indices if micro_batch.weight else () for micro_batch in micro_batches]
        self._unread = _Unread(update, Late(flags), batches)

    def num_in_a_row(self) -> int:
        """Return how many updates up to the last one were bad, waiting for the device.

        Bad is what was cancelled for another reason than an overflow; an overflow neither counts nor ends the row.
        """
        self._read()
        return self._num_in_a_row

    def known_in_a_row(self) -> int:
        """Return the same of the updates up to the last but one."""
        return self._num_in_a_row

    def take(self) -> list[Cancelled]:
        """Return what has been found since the last call."""
        found, self._found = self._found, []
        return found

    def _read(self) -> None:
        unread, self._unread = self._unread, None
        if unread is None:
            return
        is_cancelled, can_lower_scale, *bad = unread.flags.read()
        if not is_cancelled:
            self._num_in_a_row = 0
            return
        # Every rank has the same gradient, so all of them are here.
        mine = [(is_bad, list(batch)) for is_bad, batch in zip(bad, unread.batches, strict=True)]
        everywhere = [pair for rank in self._world.gather(mine) for pair in rank]
        blamed = [batch for is_bad, batch in everywhere if is_bad]
        is_overflow = can_lower_scale and not blamed
        self._num_in_a_row += not is_overflow
        examples = sorted(index for batch in blamed or [batch for _, batch in everywhere] for index in batch)
        self._found.append(Cancelled(unread.update, examples, is_overflow))
