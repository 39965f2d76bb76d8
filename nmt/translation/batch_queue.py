"""Sentences that wait for the same thing to be done to them, as batches: which one is run next.

Batches are of sentences of like length, the longest first, so that the last ones to end are short. What a batch
gives up because it takes much longer than the rest comes into batches of its own at the end, and so do the longest
sentences if they are too few for a batch. Nothing here runs, and nothing is locked: see `engine.py`.
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
"""Takes items, and whether it may give up those that take much longer than the others; returns a result for each,
or None for what it gave up."""


class Limits(NamedTuple):
    """Of a batch."""

    max_tokens: int  # its padded size
    max_sentences: int | None = None


@dataclass(eq=False)
class Job:
    """One or several items whose results belong together."""

    items: Sequence[Any]
    finish: Callable[[list[Any]], Any]  # of the results of all items makes that of the job
    future: Future[Any] = field(default_factory=Future)
    results: dict[int, Any] = field(default_factory=dict)  # by the place of the item
    is_withdrawn: bool = False

    @property
    def is_wanted(self) -> bool:
        """Whether anybody still waits for it."""
        return not (self.is_withdrawn or self.future.done())


@dataclass(frozen=True, eq=False)
class Ticket:
    """An item that waits, or runs."""

    job: Job
    place: int  # of the item in its job
    lengths: tuple[int, ...]  # on each of its sides

    @property
    def item(self) -> Any:
        """What is run."""
        return self.job.items[self.place]


@dataclass(frozen=True, eq=False)
class Batch:
    """What is run at once."""

    queue: BatchQueue
    tickets: list[Ticket]
    may_drop: bool

    @property
    def size(self) -> int:
        """Its padded size."""
        lengths = _lengths(self.tickets)
        return padded_size(lengths, np.arange(len(lengths)))


class BatchQueue:
    """The batches that wait, and what is known of the memory for them."""

    def __init__(self, run: Run, limits: Limits) -> None:
        """Take what is done to a batch, and what batches are cut by."""
        self.run = run
        self.largest: float = np.inf  # padded size that is tried
        self.num_halved = 0
        self._limits = limits
        self._waiting: deque[list[Ticket]] = deque()
        self._dropped: list[Ticket] = []
        self._given_up: set[Ticket] = set()  # once; they are not given up again
        self._may_drop = False

    @property
    def num_batches(self) -> int:
        """How many there are, those of sentences that were given up counted as one."""
        return len(self._waiting) + bool(self._dropped)

    @property
    def is_waiting(self) -> bool:
        """Whether there is a batch to take."""
        return bool(self._waiting)

    def add(self, tickets: Sequence[Ticket], *, is_running: bool) -> None:
        """Cut batches of new sentences and of those that wait already.

        Args:
            tickets: At least one.
            is_running: Whether there is a batch of this queue on its way.
        """
        together = [ticket for batch in self._waiting for ticket in batch] + list(tickets)
        self._waiting = deque(self._cut(together))
        # Else there is nothing that stragglers could be joined with.
        self._may_drop = len(self._waiting) > 1 or is_running or bool(self._dropped)
        if len(self._waiting) > 1:
            longest, next_longest = (Batch(self, self._waiting[i], True).size for i in (0, 1))
            if 2 * longest <= next_longest:
                # Few, and the longest: they may take as long as stragglers.
                self._dropped += self._waiting.popleft()

    def plan(self, *, num_free: int, num_at_once: int) -> None:
        """Make batches of what was given up, if it is time to.

        They are long searches for few sentences. So they begin while the other cores have other work, after which
        there are no new stragglers; those there still are in the end are shared by the cores.
        """
        if not self._dropped or num_free <= 0:
            return
        if self._waiting and not (self._may_drop and len(self._waiting) < num_at_once):
            return
        batches = _share(self._cut(self._dropped), num_free - len(self._waiting))
        self._waiting.extendleft(reversed(batches))
        self._dropped, self._may_drop = [], False

    def take(self) -> Batch | None:
        """Take the next batch away, or None if none waits; what nobody waits for any more is left out."""
        while self._waiting:
            tickets = [ticket for ticket in self._waiting.popleft() if _begins(ticket.job)]
            if tickets:
                may_drop = self._may_drop and self._given_up.isdisjoint(tickets)
                self._given_up.difference_update(tickets)
                return Batch(self, tickets, may_drop)
        return None

    def give_back(self, tickets: Sequence[Ticket]) -> None:
        """Take in sentences that a batch has given up."""
        self._dropped += tickets
        self._given_up.update(tickets)

    def put_first(self, tickets: list[Ticket]) -> None:
        """Take in a batch that was not run."""
        self._waiting.appendleft(tickets)

    def halve(self, tickets: list[Ticket]) -> None:
        """Take in a batch as two."""
        self.num_halved += 1
        half = len(tickets) // 2
        self._waiting.extendleft((tickets[half:], tickets[:half]))

    def purge(self) -> None:
        """Leave out what nobody waits for any more."""
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
    """Return a job that has failed before there was anything to run."""

    def fail(_: list[Any]) -> Any:
        raise error

    return Job([], fail)


def no_memory_for(ticket: Ticket) -> UserError:
    """Return what is said if the memory does not suffice for one sentence."""
    return UserError(
        f"The memory must suffice for one sentence, but does not for one of {max(ticket.lengths)} pieces. "
        "Lower `beam`, or `max-len-a` and `max-len-b`, or compute with `--device cpu`."
    )


def _begins(job: Job) -> bool:
    """Note that a job is run, unless nobody waits for it any more."""
    if not job.is_wanted:
        return False
    return job.future.running() or job.future.set_running_or_notify_cancel()


def _lengths(tickets: Sequence[Ticket]) -> NDArray[np.int64]:
    return np.array([ticket.lengths for ticket in tickets])


def _share(batches: list[list[Ticket]], num_parts: int) -> list[list[Ticket]]:
    """Cut batches that are fewer than `num_parts` into as many each."""
    if len(batches) >= num_parts:
        return batches
    return [batch[i::num_parts] for batch in batches for i in range(min(num_parts, len(batch)))]
