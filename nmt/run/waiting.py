"""How long the device waits for batches: the share that more reading processes would save."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

T = TypeVar("T")


class WaitForData:
    """Watches the batches of a run as they come.

    On a GPU the time counts in which it has nothing to do while the next batch is asked for; watching does not
    make it wait. On a CPU it is the time that asking takes, with the reading itself where this process does it.
    """

    def __init__(self, device: torch.device) -> None:
        """Begin with nothing."""
        self._is_gpu = device.type == "cuda"
        self._seconds = 0.0
        self._gaps: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def watch(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the batches, and note how long each was waited for."""
        iterator = iter(batches)
        while True:
            start, began = self._mark(), time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            end = self._mark()
            if start is not None and end is not None:
                self._gaps.append((start, end))
            else:
                self._seconds += time.perf_counter() - began
            yield batch

    def take_seconds(self) -> float:
        """Return the seconds since the last call, waiting for a GPU to get there."""
        for start, end in self._gaps:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1000  # from milliseconds
        self._gaps = []
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _mark(self) -> torch.cuda.Event | None:
        """Return what happens on the GPU when it has done all that it was given so far."""
        if not self._is_gpu:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
