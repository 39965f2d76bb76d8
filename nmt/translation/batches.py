"""Batches of sentences through a model: cut by length, halved where memory ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from nmt.data.batching import cut_batches
from nmt.errors import UserError

T = TypeVar("T")

# PyTorch raises a plain RuntimeError for these two.
_OTHER_SIGNS = ("DefaultCPUAllocator", "MPS backend out of memory")


@dataclass(frozen=True)
class Batching:
    """How lines are gathered for translation. It changes the speed and the memory, never the results."""

    buffer_size: int = 10_000  # lines read before their translations are returned; they are sorted by length
    max_tokens: int = 2048  # sentences of a batch times pieces of the longest one
    batch_size: int | None = None  # most sentences of a batch


class BatchRunner:
    """Runs batches, and remembers which size there was no memory for."""

    def __init__(self, batching: Batching) -> None:
        """Take the limits to cut batches by."""
        self.batching = batching
        self.num_halved = 0
        self._largest: float = np.inf  # padded size that is tried

    def run(
        self, lengths: NDArray[Any], run: Callable[[list[int]], Sequence[T]]
    ) -> Iterator[tuple[list[int], Sequence[T]]]:
        """Run all sentences, those of like length together.

        Args:
            lengths: (N, C) of each sentence, on each of C sides.
            run: Takes the places of sentences among the N and returns a result for each.

        Yields:
            Places and their results.

        Raises:
            UserError: There is no memory for a single sentence.
        """
        batches = cut_batches(
            lengths, max_tokens=self.batching.max_tokens, max_sentences=self.batching.batch_size
        )
        waiting = [batch.tolist() for batch in reversed(batches)]
        while waiting:
            batch = waiting.pop()
            size = len(batch) * int(lengths[batch].max())
            results = self._try(run, batch, size) if len(batch) == 1 or size <= self._largest else None
            if results is not None:
                yield batch, results
                continue
            if len(batch) == 1:
                raise UserError(
                    f"The memory must suffice for one sentence, but does not for one of {size} pieces. "
                    "Lower `beam`, or `max-len-a` and `max-len-b`, or compute with `--device cpu`."
                )
            self.num_halved += 1
            half = len(batch) // 2
            waiting += [batch[half:], batch[:half]]

    def _try(
        self, run: Callable[[list[int]], Sequence[T]], batch: list[int], size: int
    ) -> Sequence[T] | None:
        """Run a batch; None if there is no memory for it."""
        try:
            return run(batch)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not is_out_of_memory(error):
                raise
            error.__traceback__ = None  # its frames hold what took the memory
        self._largest = min(self._largest, size / 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether an error says that there is no memory, on any kind of device."""
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in _OTHER_SIGNS)
