"""Whether the threads of a run find free cores; if not, fewer threads are faster.

An operation is done when its last thread is. If other work, or a limit of the process, keeps one thread from a
core, all the others wait: an update on two threads may take many times as long as on one. The number of threads is
left as it is, since what operations sum, and in which order, may depend on it.
"""

import time
from pathlib import Path
from typing import NamedTuple

import torch

_TASKS = Path("/proc/self/task")
_SECONDS = 15.0  # length of a period that is looked at
_LIMIT = 0.25  # as if one of two threads shared its core with other work


class CoreSeconds(NamedTuple):
    """How a thread has spent its time."""

    run: float
    """Seconds on a core."""
    waited: float
    """Seconds in which it had work but no core."""


class BusyCores:
    """Watches the threads of this process from update to update."""

    def __init__(self, device: torch.device) -> None:
        """Begin with nothing; on a GPU nothing is watched."""
        self._is_watching = device.type == "cpu" and torch.get_num_threads() > 1
        self._began = 0.0
        self._before: dict[str, CoreSeconds] = {}

    def warning(self) -> str | None:
        """Return a warning, once, if cores were not free for a while. Call this after each update."""
        if not self._is_watching or (self._before and time.monotonic() - self._began < _SECONDS):
            return None
        now = core_seconds()
        self._is_watching = bool(now)  # the system tells nothing, if it is not Linux
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
    """Return the times of each thread since it began, by its number; empty if the system is not Linux."""
    found = {}
    for task in tasks.iterdir() if tasks.is_dir() else ():
        try:
            run, waited, *_ = (task / "schedstat").read_text(encoding="ascii").split()
        except (OSError, ValueError):  # there is no such file, or the thread has just ended
            continue
        found[task.name] = CoreSeconds(int(run) / 1e9, int(waited) / 1e9)  # from nanoseconds
    return found


def share_waited(before: dict[str, CoreSeconds], now: dict[str, CoreSeconds]) -> float:
    """Return for which share of the time with work threads had no core; 0 if nothing is known."""
    run = waited = 0.0
    for thread, seconds in now.items():
        if thread in before:
            run += seconds.run - before[thread].run
            waited += seconds.waited - before[thread].waited
    return waited / (run + waited) if run + waited > 0 else 0.0
