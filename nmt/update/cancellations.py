"""Which updates were cancelled because their gradient was not finite, and by which examples.

The flags of an update are read one update late, when the device has computed them, so that the host need not wait:

    host      queue update 1 | queue update 2, read the flags of 1 | queue update 3, read the flags of 2 | ...
    device         compute update 1        |     compute update 2            |     compute update 3
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
    """Training examples of the batches whose loss was not finite; of all batches if every loss was finite."""
    is_overflow: bool = False
    """The losses were finite, but float16's loss scale was too high. It has been lowered, and nothing is wrong."""


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
        """Take in an update, and read the flags of the one before. Every rank must call this.

        Args:
            update: Its number.
            is_cancelled: Scalar bool on the device, the same on every rank.
            outputs: The losses of this rank's micro-batches.
            micro_batches: This rank's micro-batches.
            can_lower_scale: Scalar bool on the device: the gradient may have been finite at a lower loss scale.
        """
        self._read()
        losses = torch.stack([output.loss.detach().reshape(()).float() for output in outputs])
        flags = torch.cat([torch.stack([is_cancelled, can_lower_scale]), ~losses.isfinite()])
        batches = [micro_batch.indices if micro_batch.weight else () for micro_batch in micro_batches]
        self._unread = _Unread(update, Late(flags), batches)

    def num_in_a_row(self) -> int:
        """Return how many updates in a row, up to the last one, were bad. It waits for the device.

        An update is bad if it was cancelled for another reason than an overflow. An overflow neither counts nor
        ends the row.
        """
        self._read()
        return self._num_in_a_row

    def known_in_a_row(self) -> int:
        """Return the same number up to the last update but one, without waiting."""
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
        # Every rank has the same flag, so all ranks come here and can exchange.
        mine = [(is_bad, list(batch)) for is_bad, batch in zip(bad, unread.batches, strict=True)]
        everywhere = [pair for rank in self._world.gather(mine) for pair in rank]
        blamed = [batch for is_bad, batch in everywhere if is_bad]
        is_overflow = can_lower_scale and not blamed
        self._num_in_a_row += not is_overflow
        examples = sorted(index for batch in blamed or [batch for _, batch in everywhere] for index in batch)
        self._found.append(Cancelled(unread.update, examples, is_overflow))
