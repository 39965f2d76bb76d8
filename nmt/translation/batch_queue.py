"""Batches of sentences that wait for the same work, and the choice of the next batch to run.

Sentences in a batch have similar lengths. The longest run first, so that the last batches to end are short. A
batch may give up stragglers, which take much longer than its other sentences. These go into batches of their own
at the end, and so do the longest sentences if they are too few for a batch. This file runs and locks nothing;
`engine.py` does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nmt.data.batching import cut_batches, padded_size
from nmt.errors import UserError

Run = Callable[[list[Any], bool], Sequence[Any | None]]
"""Takes items, and whether it may give up those that take much longer than the others. Returns a result for each
item, or None for an item that it gave up."""


class Limits(NamedTuple):
    """The limits of a batch."""

    max_tokens: int  # its padded size
    max_sentences: int | None = None


@dataclass(eq=False)
class Job:
    """One or more items whose results belong together."""

    items: Sequence[Any]
    finish: Callable[[list[Any]], Any]  # makes the result of the job from the results of all items
    future: Future[Any] = field(default_factory=Future)
    results: dict[int, Any] = field(default_factory=dict)  # by the place of the item
    is_withdrawn: bool = False

    @property
    def is_wanted(self) -> bool:
        """Whether anybody still waits for the job."""
        return not (self.is_withdrawn or self.future.done())


@dataclass(frozen=True, eq=False)
class Ticket:
    """An item that waits or runs."""

    job: Job
    place: int  # of the item in its job
    lengths: tuple[int, ...]  # of each side of the item (source, target)

    @property
    def item(self) -> Any:
        """The item itself."""
        return self.job.items[self.place]


@dataclass(frozen=True, eq=False)
class Batch:
    """Items that run at once."""

    queue: BatchQueue
    tickets: list[Ticket]
    may_drop: bool

    @property
    def size(self) -> int:
        """Its padded size."""
        lengths = _lengths(self.tickets)
        return padded_size(lengths, np.arange(len(lengths)))


class BatchQueue:
    """The batches that wait, and the largest size that the memory allows."""

    def __init__(self, run: Run, limits: Limits) -> None:
        """Take the function that runs a batch, and the limits of batches."""
        self.run = run
        self.largest: float = np.inf  # no batch of a larger padded size is tried
        self.num_halved = 0
        self._limits = limits
        self._waiting: deque[list[Ticket]] = deque()
        self._dropped: list[Ticket] = []
        self._given_up: set[Ticket] = set()  # items that were given up once; they are not given up again
        self._may_drop = False

    @property
    def num_batches(self) -> int:
        """The number of batches that wait; all sentences that were given up count as one batch."""
        return len(self._waiting) + bool(self._dropped)

    @property
    def is_waiting(self) -> bool:
        """Whether there is a batch to take."""
        return bool(self._waiting)

    def add(self, tickets: Sequence[Ticket], *, is_running: bool) -> None:
        """Cut new batches from new sentences and from those that wait already.

        Args:
            tickets: At least one.
            is_running: Whether a batch of this queue is running now.
        """
        together = [ticket for batch in self._waiting for ticket in batch] + list(tickets)
        self._waiting = deque(self._cut(together))
        # If this is the only batch, there are no other sentences that stragglers could be joined with.
        self._may_drop = len(self._waiting) > 1 or is_running or bool(self._dropped)
        if len(self._waiting) > 1:
            longest, next_longest = (Batch(self, self._waiting[i], True).size for i in (0, 1))
            if 2 * longest <= next_longest:
                # These few are the longest sentences, and may take as long as stragglers.
                self._dropped += self._waiting.popleft()

    def plan(self, *, num_free: int, num_at_once: int) -> None:
        """Make batches of the sentences that were given up, if it is time for it.

        Such a batch is a long search for few sentences. So it begins while the other cores still have other work.
        After that work there are no new stragglers, and the cores share those that are left.
        """
        if not self._dropped or num_free <= 0:
            return
        if self._waiting and not (self._may_drop and len(self._waiting) < num_at_once):
            return
        batches = _share(self._cut(self._dropped), num_free - len(self._waiting))
        self._waiting.extendleft(reversed(batches))
        self._dropped, self._may_drop = [], False

    def take(self) -> Batch | None:
        """Take the next batch out of the queue, without items that nobody waits for; None if no batch waits."""
        while self._waiting:
            tickets = [ticket for ticket in self._waiting.popleft() if _begins(ticket.job)]
            if tickets:
                may_drop = self._may_drop and self._given_up.isdisjoint(tickets)
                self._given_up.difference_update(tickets)
                return Batch(self, tickets, may_drop)
        return None

    def give_back(self, tickets: Sequence[Ticket]) -> None:
        """Take back sentences that a batch has given up."""
        self._dropped += tickets
        self._given_up.update(tickets)

    def put_first(self, tickets: list[Ticket]) -> None:
        """Take back a batch that was not run, and put it first."""
        self._waiting.appendleft(tickets)

    def halve(self, tickets: list[Ticket]) -> None:
        """Take back a batch as two halves."""
        self.num_halved += 1
        half = len(tickets) // 2
        self._waiting.extendleft((tickets[half:], tickets[:half]))

    def purge(self) -> None:
        """Drop all items that nobody waits for any more."""
        kept = ([ticket for ticket in batch if ticket.job.is_wanted] for batch in self._waiting)
        self._waiting = deque(batch for batch in kept if batch)
        self._dropped = [ticket for ticket in self._dropped if ticket.job.is_wanted]
        self._given_up = {ticket for ticket in self._given_up if ticket.job.is_wanted}

    def _cut(self, tickets: Sequence[Ticket]) -> list[list[Ticket]]:
        lengths = _lengths(tickets)
        batches = cut_batches(
            lengths, max_tokens=self._limits.max_tokens, max_sentences=self._limits.max_sentences
        )
        ordered = sorted(batches, key=lambda batch: -int(lengths[batch].max()))
        return [[tickets[i] for i in batch.tolist()] for batch in ordered]


def failed_job(error: Exception) -> Job:
    """Return a job that has failed before anything was run."""

    def fail(_: list[Any]) -> Any:
        raise error

    return Job([], fail)


def no_memory_for(ticket: Ticket) -> UserError:
    """Return the error for a single sentence that does not fit into memory."""
    return UserError(
        f"The memory must suffice for one sentence, but does not for one of {max(ticket.lengths)} pieces. "
        "Lower `beam`, or `max-len-a` and `max-len-b`, or compute with `--device cpu`."
    )


def _begins(job: Job) -> bool:
    """Mark a job as running, unless nobody waits for it any more."""
    if not job.is_wanted:
        return False
    return job.future.running() or job.future.set_running_or_notify_cancel()


def _lengths(tickets: Sequence[Ticket]) -> NDArray[np.int64]:
    return np.array([ticket.lengths for ticket in tickets])


def _share(batches: list[list[Ticket]], num_parts: int) -> list[list[Ticket]]:
    """If there are fewer than `num_parts` batches, cut each of them into `num_parts`."""
    if len(batches) >= num_parts:
        return batches
    return [batch[i::num_parts] for batch in batches for i in range(min(num_parts, len(batch)))]
