"""Batches of sentences through a model: cut by length, several at once on a CPU, halved where memory ends.

What a batch gives up because it takes much longer than the rest comes into batches of its own at the end.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from nmt.data.batching import cut_batches, padded_size
from nmt.errors import UserError
from nmt.system.out_of_memory import is_out_of_memory

T = TypeVar("T")
Run = Callable[[list[int], bool], Sequence[T | None]]
"""Takes places of sentences, and whether it may give up those that take much longer than the others; returns a
result for each, or None for what it gave up."""

# Seconds for which a thread may have Python's lock while others wait; Python's own are 5e-3.
_SWITCH_INTERVAL = 1e-5

# Of the memory of a GPU that is free: tables are copied to be changed, and what is computed takes room as well.
_SHARE_OF_MEMORY = 0.4
_MOST_SENTENCES = 512  # many enough for a GPU, and few enough that those of a batch are of like length


@dataclass(frozen=True)
class Batching:
    """How lines are gathered for translation. It changes the speed and the memory, never the results."""

    buffer_size: int = 10_000  # lines read before their translations are returned; they are sorted by length
    # Sentences times pieces of the longest: 2,048, or 4,096 with a beam of 1; on a GPU what its memory allows.
    max_tokens: int | None = None
    batch_size: int | None = None  # most sentences of a batch; on a GPU 512 if neither is given

    def fill_in(self, *, num_bytes: int, bytes_of_piece: int) -> Batching:
        """Let a GPU's memory decide what is left open."""
        if self.max_tokens is not None:
            return self
        largest = max(1, int(num_bytes * _SHARE_OF_MEMORY) // bytes_of_piece)
        return replace(self, max_tokens=largest, batch_size=self.batch_size or _MOST_SENTENCES)


class BatchRunner:
    """Runs batches, and remembers which size there was no memory for."""

    def __init__(self, batching: Batching, *, num_at_once: int = 1, beam_size: int = 2) -> None:
        """Take the limits to cut batches by, and how many are run at once, each in a thread of one core."""
        self.batching = batching
        self._max_tokens = batching.max_tokens or (4096 if beam_size == 1 else 2048)
        self.num_halved = 0
        self._num_at_once = num_at_once
        self._largest: float = np.inf  # padded size that is tried

    def run(self, lengths: NDArray[Any], run: Run[T]) -> Iterator[tuple[list[int], list[T]]]:
        """Run all sentences, those of like length together.

        Args:
            lengths: (N, C) of each sentence, on each of C sides.
            run: Runs a batch of the N sentences.

        Yields:
            Places and their results, in the order in which they are ready.

        Raises:
            UserError: There is no memory for a single sentence.
        """
        waiting = deque(self._cut(lengths, np.arange(len(lengths))))
        num_at_once = min(self._num_at_once, len(waiting))
        may_drop = len(waiting) > 1  # or there is nothing that stragglers could be joined with
        dropped: list[int] = []
        if may_drop:
            longest, next_longest = (padded_size(lengths, np.array(waiting[i])) for i in (0, 1))
            if 2 * longest <= next_longest:
                dropped = waiting.popleft()  # few, and the longest: they may take as long as stragglers
        with _executor(num_at_once) as submit:
            running: dict[Future[Sequence[T | None] | None], list[int]] = {}
            while waiting or running or dropped:
                num_free = num_at_once - len(running)
                if dropped and num_free > 0 and (not waiting or (may_drop and len(waiting) < num_at_once)):
                    # Long searches for few sentences: they begin while the other cores have other work, after
                    # which there are no new stragglers; those there still are in the end are shared by the cores.
                    batches = _share(self._cut(lengths, np.array(dropped)), num_free - len(waiting))
                    waiting.extendleft(reversed(batches))
                    dropped, may_drop = [], False
                while waiting and len(running) < num_at_once:
                    batch = waiting.popleft()
                    running[submit(partial(self._try, run, batch, may_drop, lengths))] = batch
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    batch, results = running.pop(done), done.result()
                    if results is None:
                        waiting.extendleft(self._halve(batch, lengths))
                        continue
                    found = [
                        (i, result) for i, result in zip(batch, results, strict=True) if result is not None
                    ]
                    dropped += set(batch).difference(i for i, _ in found)
                    yield [i for i, _ in found], [result for _, result in found]

    def _cut(self, lengths: NDArray[Any], places: NDArray[Any]) -> list[list[int]]:
        """Cut batches of sentences of like length, the longest first, so that the last ones to end are short."""
        own = lengths[places]
        batches = cut_batches(own, max_tokens=self._max_tokens, max_sentences=self.batching.batch_size)
        return [places[x].tolist() for x in sorted(batches, key=lambda x: -int(own[x].max()))]

    def _halve(self, batch: list[int], lengths: NDArray[Any]) -> tuple[list[int], list[int]]:
        if len(batch) == 1:
            raise UserError(
                f"The memory must suffice for one sentence, but does not for one of {int(lengths[batch].max())} "
                "pieces. Lower `beam`, or `max-len-a` and `max-len-b`, or compute with `--device cpu`."
            )
        self.num_halved += 1
        half = len(batch) // 2
        return batch[half:], batch[:half]

    def _try(
        self, run: Run[T], batch: list[int], may_drop: bool, lengths: NDArray[Any]
    ) -> Sequence[T | None] | None:
        """Run a batch; None if there is no memory for it."""
        size = padded_size(lengths, np.array(batch))
        if len(batch) > 1 and size > self._largest:
            return None
        try:
            return run(batch, may_drop)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not is_out_of_memory(error):
                raise
            error.__traceback__ = None  # its frames hold what took the memory
        self._largest = min(self._largest, size / 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None


def _share(batches: list[list[int]], num_parts: int) -> list[list[int]]:
    """Cut batches that are fewer than `num_parts` into as many each."""
    if len(batches) >= num_parts:
        return batches
    return [batch[i::num_parts] for batch in batches for i in range(min(num_parts, len(batch)))]


@contextmanager
def _executor(num_at_once: int) -> Iterator[Callable[[Callable[[], T]], Future[T]]]:
    """Provide what runs functions: one by one in this thread, or each in a thread of one core."""
    if num_at_once <= 1:
        yield _run_here
        return
    num_threads, switch_interval = torch.get_num_threads(), sys.getswitchinterval()
    # Operators run without Python's lock, which each thread needs again every few dozen microseconds.
    sys.setswitchinterval(_SWITCH_INTERVAL)
    pool = ThreadPoolExecutor(num_at_once, "translate", initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool.submit
    finally:
        pool.shutdown(cancel_futures=True)
        sys.setswitchinterval(switch_interval)
        # What a thread sets is the default of new ones and of MKL.
        torch.set_num_threads(num_threads)


def _run_here(function: Callable[[], T]) -> Future[T]:
    future: Future[T] = Future()
    future.set_result(function())
    return future


def free_memory(device: torch.device) -> int | None:
    """Return how many bytes of a GPU are free, with those that PyTorch keeps for later; None elsewhere."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
