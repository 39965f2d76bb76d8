"""Threads that compute side by side, on one core each. The last one restores the settings of the process.

How many cores an operator takes, and for how long a thread may have Python's lock, are settings of the process.
If each thread saved and restored them by itself, one would restore what another had set. So users are counted
here, for all:

    thread 1      enters: saves and sets ------- leaves
    thread 2               enters ------------------------- leaves: restores
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
    """The settings as they were found, and how many threads are inside `one_core`."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.num_inside = 0
        self.num_threads = 0
        self.switch_interval = 0.0


_PROCESS = _Process()


@contextmanager
def one_core() -> Iterator[None]:
    """Let the operators of this thread take one core. The thread must do nothing else before or after."""
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
        # If this thread has never asked PyTorch, asking now would give it 1 core, for good.
        return _PROCESS.num_threads if _PROCESS.num_inside else torch.get_num_threads()
