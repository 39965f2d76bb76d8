"""How long the device waits: for batches, which more reading processes would save, and for other ranks."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import torch

from nmt.system.device_time import DeviceTime

T = TypeVar("T")


class WaitForData:
    """Watches the batches of a run as they come.

    On a GPU the time counts in which the device has nothing to do while the next batch is fetched; watching does
    not make it wait. On a CPU it is the time of fetching, including the reading if this process does it.
    """

    def __init__(self, device: torch.device) -> None:
        """Begin with nothing."""
        self._time = DeviceTime(device)

    def watch(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the batches, and note how long each was waited for."""
        iterator = iter(batches)
        while True:
            start = self._time.now()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._time.add_since(start)
            yield batch

    def take_seconds(self) -> float:
        """Return the seconds since the last call, waiting for a GPU to get there."""
        return self._time.take_seconds()


def wait_for_ranks(shares: Sequence[float]) -> dict[str, float | int]:
    """Return the fields of a report on the shares of time in which each rank waited for others.

    The others wait for the rank that waits least. Its own waiting time is the cost of the exchange.
    """
    least = min(shares)
    return {
        "waited for ranks": round(max(shares), 4),
        "slowest rank": shares.index(least),
        "slowest rank waited": round(least, 4),
    }
