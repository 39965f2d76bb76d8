"""Whether the threads of a run find cores that are free; where they do not, fewer of them are faster.

An operation is done when its last thread is. A thread that has no core for a while, since other work has them or a
limit holds the process back, lets all the others wait: an update on two threads may take many times as long as on
one. The number of threads is left as it is, since what operations sum, and in which order, may depend on it.
"""

import time
from pathlib import Path
from typing import NamedTuple

import torch

_TASKS = Path("/proc/self/task")
_SECONDS = 15.0  # that are looked at together
_LIMIT = 0.25  # one of two threads shares its core with other work


class CoreSeconds(NamedTuple):
    """What has become of the time of a thread."""

    run: float
    """Seconds on a core."""
    waited: float
    """Seconds in which it could have gone on, but had no core."""


class BusyCores:
    """Watches the threads of this process from update to update."""

    def __init__(self, device: torch.device) -> None:
        """Begin with nothing; on a GPU nothing is watched."""
        self._is_watching = device.type == "cpu" and torch.get_num_threads() > 1
        self._began = 0.0
        self._before: dict[str, CoreSeconds] = {}

    def warning(self) -> str | None:
        """Return a warning if cores were not free for a while; it comes once. To be called after each update."""
        if not self._is_watching or (self._before and time.monotonic() - self._began < _SECONDS):
            return None
        now = core_seconds()
        share, num_threads = share_waited(self._before, now), torch.get_num_threads()
        self._began, self._before = time.monotonic(), now
        if share < _LIMIT:
            return None
        self._is_watching = False
        num_fitting = max(int(num_threads * (1 - share)), 1)
        return (
            f"warning: for {share:.0%} of their time threads had work, but no core: other work has the cores, or "
            f"a limit holds this process back. Updates may be much faster with fewer than {num_threads} threads: "
            f"stop, and start the same command with OMP_NUM_THREADS={num_fitting}"
        )


def core_seconds(tasks: Path = _TASKS) -> dict[str, CoreSeconds]:
    """Return the times of each thread since it began, by its number; nothing where the system is not Linux."""
    found = {}
    try:
        for task in tasks.iterdir():
            run, waited, *_ = (task / "schedstat").read_text(encoding="ascii").split()
            found[task.name] = CoreSeconds(int(run) / 1e9, int(waited) / 1e9)  # from nanoseconds
    except (OSError, ValueError):  # there is no such file, or a thread has just ended
        return found
    return found


def share_waited(before: dict[str, CoreSeconds], now: dict[str, CoreSeconds]) -> float:
    """Return the share of the time in which threads had work that they had no core; 0 where nothing is known."""
    run = waited = 0.0
    for thread, seconds in now.items():
        if thread in before:
            run += seconds.run - before[thread].run
            waited += seconds.waited - before[thread].waited
    return waited / (run + waited) if run + waited > 0 else 0.0
