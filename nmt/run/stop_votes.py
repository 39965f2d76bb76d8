"""Whether a run stops before its end: the wish of this rank, and what all ranks have agreed on.

A signal may reach one rank alone, but all ranks must end at the same update. So wishes are summed over the ranks
with the number of targets of each update (`Trainer.train_step`), and every rank acts on the sum:

    wants_stop (this rank) --> train_step --> num_wanting_stop (all ranks) --> note --> is_agreed (all ranks)
"""

import torch

from nmt.data.batch_iterator import BatchIterator
from nmt.distributed import World
from nmt.system.signals import StopRequest


class StopVotes:
    """The wishes of the ranks. A rank wishes to stop at a request, or when it cannot read its batch."""

    def __init__(self, stop: StopRequest, batches: BatchIterator, world: World) -> None:
        self.is_agreed = False
        """Whether the run stops: the same on every rank."""
        self._stop = stop
        self._batches = batches
        self._world = world

    @property
    def wants_stop(self) -> bool:
        """Whether this rank wishes to stop; the others may not know of it yet."""
        return self._stop.reason is not None or self._batches.refusal is not None

    def note(self, num_wanting_stop: float) -> None:
        """Take in how many ranks wished to stop when an update began; a single rank knows by itself."""
        self.is_agreed = self.wants_stop if self._world.size == 1 else num_wanting_stop > 0

    def agree(self) -> None:
        """Ask all ranks, and wait for their answers."""
        wishes = torch.tensor([float(self.wants_stop)], device=self._world.device)
        self.is_agreed = self._world.sum_(wishes).item() > 0

    def raise_refusals(self) -> None:
        """Raise `UnreadableExamplesError` on every rank if one of them could not read its batch."""
        for refusal in self._world.gather(self._batches.refusal):
            if refusal is not None:
                raise refusal.error()

    def reason(self) -> str:
        """Return who asked, in words; every rank must call this."""
        reasons = self._world.gather(self._stop.reason)
        return next((reason for reason in reasons if reason is not None), "a request")
