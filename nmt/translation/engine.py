"""Run batches for all callers: several at once on a CPU, and in halves if memory is too small.

Callers that ask at the same time for the same kind of work share batches. Worker threads exist only while there is
work for several cores, one thread for each core. A single batch, and any batch on a GPU, is run by the thread that
waits for it:

    a caller:     submit -> queue                                 as_ready: waits; runs a batch that is alone
    _hand_out:               queue -> ready, while cores are free
    a worker:                         ready -> run -> results; sentences given up -> queue; _hand_out
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch

from nmt.system.core_threads import one_core
from nmt.system.out_of_memory import is_out_of_memory
from nmt.translation.batch_queue import Batch, BatchQueue, Job, Ticket, no_memory_for


class Engine:
    """Runs jobs. Its methods may be called from any thread."""

    def __init__(self, most_at_once: Callable[[], int]) -> None:
        """Take a function that returns how many batches may run at once, each in a thread of one core.

        It is called whenever work arrives after there was none.
        """
        self._most_at_once = most_at_once
        self._changed = threading.Condition()  # guards all attributes below
        self._known: WeakValueDictionary[Hashable, BatchQueue] = WeakValueDictionary()
        self._queues: list[BatchQueue] = []  # those with waiting items; the first is the next to take from
        self._ready: deque[Batch] = deque()  # counted as running
        self._running: list[Batch] = []
        self._num_at_once = 0  # as asked when work arrived; with 1 the waiting thread runs it, and no worker
        self._num_cores = 0
        self._num_workers = 0
        self._num_idle = 0  # workers without a batch
        self._num_leaving = 0  # workers that have seen that there is no work left
        self._has_helper = False

    def queue(self, key: Hashable, make: Callable[[], BatchQueue]) -> BatchQueue:
        """Return the queue of a key. A queue is forgotten when it is empty and nobody holds it."""
        with self._changed:
            queue = self._known.get(key)
            if queue is None:
                queue = self._known[key] = make()
            return queue

    def submit(
        self, jobs: Sequence[Job], queue: BatchQueue, lengths: Callable[[Any], tuple[int, ...]]
    ) -> None:
        """Begin to run jobs. Somebody must then wait with `as_ready`, or call `run_behind`.

        Args:
            jobs: A job without items is finished at once.
            queue: Where the items wait. Callers with the same queue share batches.
            lengths: Returns the length of an item on each of its sides.
        """
        for job in jobs:
            if not job.items:
                _finish(job)
        tickets = [Ticket(job, place, lengths(item)) for job in jobs for place, item in enumerate(job.items)]
        if not tickets:
            return
        with self._changed:
            if not self._is_busy:
                self._num_at_once, self._num_cores = 0, self._most_at_once()
            queue.add(tickets, is_running=any(batch.queue is queue for batch in self._running))
            if queue not in self._queues:
                self._queues.append(queue)
            num_batches = len(self._running) + sum(own.num_batches for own in self._queues)
            self._num_at_once = max(self._num_at_once, min(self._num_cores, num_batches))
            self._hand_out()

    def as_ready(self, jobs: Sequence[Job]) -> Iterator[list[Job]]:
        """Wait for jobs, and yield those that have become ready since the last time.

        Raises:
            Exception: The error of a job that failed. The other jobs are withdrawn then, and also if the caller
                stops before the end.
        """
        done: deque[Job] = deque()
        for job in jobs:
            job.future.add_done_callback(partial(_note_done, done, job))
        num_left = len(jobs)
        try:
            while num_left:
                batch = self._wait(partial(bool, done))
                if batch is not None:
                    self._run(batch)
                    continue
                ready = [done.popleft() for _ in range(len(done))]
                num_left -= len(ready)
                errors = [error for job in ready if (error := job.future.exception()) is not None]
                if errors:
                    self._withdraw(jobs)
                if errors or not num_left:
                    self._settle(jobs)
                if errors:
                    raise errors[0]
                yield ready
        finally:
            if num_left:
                self._withdraw(jobs)

    def run_behind(self) -> None:
        """Run the submitted jobs in the background, for a caller that does not wait with `as_ready`."""
        with self._changed:
            if self._is_busy and not self._has_helper:
                self._has_helper = True
                threading.Thread(target=self._help, name="translate").start()

    @property
    def _is_busy(self) -> bool:
        return bool(self._running or self._queues)

    def _hand_out(self) -> None:
        """Make batches ready while there are cores for them; the lock is held."""
        is_new = True
        while is_new or (self._queues and not self._running):
            is_new = False
            for queue in self._queues:
                queue.plan(num_free=self._num_at_once - len(self._running), num_at_once=self._num_at_once)
            self._fill()
        while self._num_at_once > 1 and len(self._ready) > self._num_idle:
            self._num_workers += 1
            self._num_idle += 1
            threading.Thread(target=self._work, name="translate").start()
        self._changed.notify_all()

    def _fill(self) -> None:
        while len(self._running) < self._num_at_once:
            queue = next((queue for queue in self._queues if queue.is_waiting), None)
            if queue is None:
                break
            self._queues.remove(queue)
            batch = queue.take()
            if queue.num_batches:
                self._queues.append(queue)  # each in turn
            if batch is not None:
                self._ready.append(batch)
                self._running.append(batch)
        self._queues = [queue for queue in self._queues if queue.num_batches]

    def _work(self) -> None:
        """Run batches on one core until there is nothing left."""
        with one_core():
            while (batch := self._next()) is not None:
                self._run(batch, by_worker=True)
        with self._changed:
            self._num_leaving -= 1
            self._changed.notify_all()

    def _next(self) -> Batch | None:
        with self._changed:
            self._changed.wait_for(lambda: self._ready or not self._is_busy)
            self._num_idle -= 1
            if self._ready:
                return self._ready.popleft()
            self._num_workers -= 1
            self._num_leaving += 1
            return None

    def _help(self) -> None:
        """Run the batches that the waiting thread has to run, until there are none left."""

        def is_over() -> bool:
            self._has_helper = self._is_busy
            return not self._is_busy

        while (batch := self._wait(is_over)) is not None:
            self._run(batch)

    def _wait(self, is_over: Callable[[], bool]) -> Batch | None:
        """Wait until something is over; or return a batch that this thread has to run first."""
        with self._changed:
            self._changed.wait_for(lambda: is_over() or (self._ready and self._num_at_once == 1))
            return None if is_over() else self._ready.popleft()

    def _settle(self, jobs: Sequence[Job]) -> None:
        """Wait until none of these jobs runs; if there is no other work, until the process is as it was before."""
        own = set(map(id, jobs))
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    not any(id(x.job) in own for batch in self._running for x in batch.tickets)
                    and (self._is_busy or self._num_workers + self._num_leaving == 0)
                )
            )

    def _withdraw(self, jobs: Sequence[Job]) -> None:
        """Withdraw those of these jobs that are not done and not running."""
        with self._changed:
            for job in jobs:
                job.is_withdrawn = not job.future.done()
                job.future.cancel()
            for queue in self._queues:
                queue.purge()
            handed_out, self._ready = self._ready, deque()
            for batch in handed_out:
                self._running.remove(batch)
                wanted = [ticket for ticket in batch.tickets if ticket.job.is_wanted]
                if wanted:
                    self._ready.append(replace(batch, tickets=wanted))
                    self._running.append(self._ready[-1])
            self._hand_out()

    def _run(self, batch: Batch, *, by_worker: bool = False) -> None:
        """Run a batch, then hand out the next ones."""
        results: Sequence[Any | None] | None = None
        error: Exception | None = None
        try:
            results = _try(batch)
        except Exception as raised:
            error = raised
        except BaseException:  # this thread was interrupted, but others may wait for the batch
            with self._changed:
                self._running.remove(batch)
                self._num_idle += by_worker
                batch.queue.put_first(batch.tickets)
                self._come_back(batch.queue)
            raise
        complete = self._note(batch, results, by_worker=by_worker)
        for job in complete:
            _finish(job)
        if results is None and len(batch.tickets) == 1:
            _fail(batch.tickets[0].job, error or no_memory_for(batch.tickets[0]))
        with self._changed:
            self._changed.notify_all()

    def _come_back(self, queue: BatchQueue) -> None:
        if queue.num_batches and queue not in self._queues:
            self._queues.insert(0, queue)
        self._hand_out()

    def _note(self, batch: Batch, results: Sequence[Any | None] | None, *, by_worker: bool) -> list[Job]:
        """Store the results of a batch, or note that there are none; return the jobs that are complete."""
        queue, tickets = batch.queue, batch.tickets
        complete = []
        with self._changed:
            self._running.remove(batch)
            self._num_idle += by_worker
            if results is not None:
                queue.give_back([x for x, result in zip(tickets, results, strict=True) if result is None])
                for ticket, result in zip(tickets, results, strict=True):
                    if result is not None:
                        ticket.job.results[ticket.place] = result
                        if len(ticket.job.results) == len(ticket.job.items):
                            complete.append(ticket.job)
            elif len(tickets) > 1:
                # Halves may fit into memory. An error is that of one sentence; halving finds which one.
                queue.halve(tickets)
            self._come_back(queue)
        return complete


def _note_done(done: deque[Job], job: Job, _: Future[Any]) -> None:
    done.append(job)


def _try(batch: Batch) -> Sequence[Any | None] | None:
    """Run a batch; None if there is no memory for it."""
    queue = batch.queue
    if len(batch.tickets) > 1 and batch.size > queue.largest:
        return None
    try:
        results = queue.run([ticket.item for ticket in batch.tickets], batch.may_drop)
        assert len(results) == len(batch.tickets)
        return results
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not is_out_of_memory(error):
            raise
        error.__traceback__ = None  # its frames hold the tensors that filled the memory
    queue.largest = min(queue.largest, batch.size / 2)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def _fail(job: Job, error: Exception) -> None:
    if not job.future.done():
        job.future.set_exception(error)


def _finish(job: Job) -> None:
    if job.future.done():  # another item of the job has failed, or nobody waits any more
        return
    try:
        job.future.set_result(job.finish([job.results[place] for place in range(len(job.items))]))
    except Exception as error:
        job.future.set_exception(error)
