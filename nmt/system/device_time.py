"""How long something takes on a device, without making the host wait for it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Moment:
    """A point in the work of a device: an event on a GPU, seconds elsewhere."""

    event: torch.cuda.Event | None
    seconds: float


class DeviceTime:
    """Adds up stretches of time.

    On a GPU, a moment is when the device has finished all work that it has been given so far. On a CPU it is now.
    """

    def __init__(self, device: torch.device) -> None:
        """Begin with nothing."""
        self._is_gpu = device.type == "cuda"
        self._seconds = 0.0
        self._stretches: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def now(self) -> Moment:
        """Return this moment."""
        event = None
        if self._is_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        return Moment(event, time.perf_counter())

    def add_since(self, start: Moment) -> None:
        """Add the time from a moment until now."""
        end = self.now()
        if start.event is not None and end.event is not None:
            self._stretches.append((start.event, end.event))
        else:
            self._seconds += end.seconds - start.seconds

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Add the time that the block takes."""
        start = self.now()
        yield
        self.add_since(start)

    def take_seconds(self) -> float:
        """Return the seconds that were added since the last call; a GPU is waited for."""
        for start, end in self._stretches:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1000  # from milliseconds
        self._stretches = []
        seconds, self._seconds = self._seconds, 0.0
        return seconds
