"""Threads that compute on one core each, side by side, and the process as it was once the last of them is done.

How many cores an operator takes, and for how long a thread may have Python's lock, are settings of the process.
Whoever sets and restores them for itself alone restores what another has set. So they are counted here, for all.
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Seconds for which a thread may have Python's lock while others wait; Python's own are 5e-3. Operators run without
# the lock, which each thread needs again every few dozen microseconds.
_SWITCH_INTERVAL = 1e-5


class _Process:
    """What was found, and how many threads have changed it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.num_inside = 0
        self.num_threads = 0
        self.switch_interval = 0.0


_PROCESS = _Process()


@contextmanager
def one_core() -> Iterator[None]:
    """Let operators of this thread, which does nothing else before or after, take one core."""
    process = _PROCESS
    with process.lock:
        if process.num_inside == 0:
            process.num_threads, process.switch_interval = torch.get_num_threads(), sys.getswitchinterval()
            sys.setswitchinterval(_SWITCH_INTERVAL)
        process.num_inside += 1
        torch.set_num_threads(1)  # also the default of new threads, and of MKL
    try:
        yield
    finally:
        with process.lock:
            process.num_inside -= 1
            if process.num_inside == 0:
                torch.set_num_threads(process.num_threads)
                sys.setswitchinterval(process.switch_interval)


def num_cores() -> int:
    """Return how many cores an operator of this thread takes when no thread is inside `one_core`."""
    with _PROCESS.lock:
        # A thread that has not asked PyTorch before would begin with 1 now, and keep it.
        return _PROCESS.num_threads if _PROCESS.num_inside else torch.get_num_threads()
