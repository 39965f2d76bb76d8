"""How sentences are gathered into batches, and a simple way to run such batches and wait for the results."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any, TypeVar

import torch
from numpy.typing import NDArray

from nmt.translation.batch_queue import BatchQueue, Job, Limits
from nmt.translation.engine import Engine

T = TypeVar("T")

# Share of the free memory of a GPU: tables are copied when they change, and computing needs memory, too.
_SHARE_OF_MEMORY = 0.4
_MOST_SENTENCES = 512  # enough for a GPU, and few enough that the sentences of a batch have similar lengths


@dataclass(frozen=True)
class Batching:
    """How lines are gathered for translation. It changes the speed and the memory, never the results."""

    buffer_size: int = 10_000  # lines read before their translations are returned; they are sorted by length
    # Sentences times pieces of the longest: 2,048, or 4,096 with a beam of 1; on a GPU what its memory allows.
    max_tokens: int | None = None
    batch_size: int | None = None  # most sentences of a batch; on a GPU 512 if neither is given

    def limits(self, beam_size: int) -> Limits:
        """Return the limits of a batch."""
        return Limits(self.max_tokens or (4096 if beam_size == 1 else 2048), self.batch_size)

    def fill_in(self, *, num_bytes: int, bytes_of_piece: int) -> Batching:
        """Set the limits that are not given, by the memory of a GPU."""
        if self.max_tokens is not None:
            return self
        largest = max(1, int(num_bytes * _SHARE_OF_MEMORY) // bytes_of_piece)
        return replace(self, max_tokens=largest, batch_size=self.batch_size or _MOST_SENTENCES)


class BatchRunner:
    """Runs batches by its own engine, and remembers which sizes were too large for the memory."""

    def __init__(self, batching: Batching, *, num_at_once: int = 1, beam_size: int = 2) -> None:
        """Take the limits of batches, and how many run at once, each in a thread of one core."""
        self._limits = batching.limits(beam_size)
        self._engine = Engine(lambda: num_at_once)
        self._largest = math.inf  # no batch of a larger padded size is tried
        self.num_halved = 0

    def run(
        self, lengths: NDArray[Any], run: Callable[[list[int], bool], Sequence[T | None]]
    ) -> Iterator[tuple[list[int], list[T]]]:
        """Run all sentences, those of similar length together.

        Args:
            lengths: (N, C): the length of each sentence on each of C sides.
            run: Runs a batch of the N sentences, see `batch_queue.Run`.

        Yields:
            Places of sentences and their results, in the order in which they are ready.

        Raises:
            UserError: There is no memory for a single sentence.
        """
        queue = BatchQueue(run, self._limits)
        queue.largest = self._largest
        jobs = [Job([place], itemgetter(0)) for place in range(len(lengths))]
        self._engine.submit(jobs, queue, lambda place: tuple(lengths[place].tolist()))
        for ready in self._engine.as_ready(jobs):
            yield [job.items[0] for job in ready], [job.future.result() for job in ready]
        self._largest = queue.largest
        self.num_halved += queue.num_halved


def free_memory(device: torch.device) -> int | None:
    """Return how many bytes of a GPU are free, with those that PyTorch caches; None on other devices."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
