"""Work of a GPU that is recorded once and then replayed: CUDA graphs, where the shapes of all tensors stay.

A GPU waits for the host where an update or a decoding step is some thousand small kernels: Python launches them
one by one, slower than they run. A replay launches all of them at once.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import torch

_NUM_PLAIN_CALLS = 2  # before the recording: libraries set themselves up


class Recording:
    """A function whose work on a GPU is recorded at the third call, and from then on replayed instead.

    The function takes and returns nothing. It reads tensors that stay where they are: `copy_` what changes from
    call to call into them before. What the host decides in it, a number or a branch, is decided for good when it
    is recorded. A tensor that it makes is made once, when it is recorded, and filled anew by each replay, as long
    as the caller holds it. With a pool, results must be written into tensors from outside: the memory of the pool
    serves every recording that was given it.

    Random numbers go on from the generator as they would without a recording.
    """

    def __init__(self, function: Callable[[], None], device: torch.device, *, pool: Any = None) -> None:
        """Record on a CUDA device; on any other one each call is plain.

        Args:
            function: What to do.
            device: Where.
            pool: Of `torch.cuda.graph_pool_handle()`: memory to share with other recordings, of which never two
                are replayed at once.
        """
        self._function = function
        self._is_recorded = device.type == "cuda"
        self._pool = pool
        self._num_plain = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._num_bytes = 0

    @property
    def num_bytes(self) -> int:
        """About how much memory the recording holds, which serves nothing else; 0 with a pool from outside."""
        return self._num_bytes

    def forget(self) -> None:
        """Give the memory of the recording back, once its results are let go of; it is made anew later."""
        if self._graph is not None:
            torch.cuda.synchronize()  # it may still be at work
        self._graph, self._num_plain, self._num_bytes = None, 0, 0

    def __call__(self) -> None:
        """Do the work: plainly at first, then by a replay."""
        if not self._is_recorded:
            self._function()
        elif self._graph is not None:
            self._graph.replay()
        elif self._num_plain < _NUM_PLAIN_CALLS:
            self._num_plain += 1
            _run_plainly(self._function)
        else:
            self._graph = _record(self._function, self._pool)
            if self._pool is None:  # all that was kept for later has been given back
                self._num_bytes = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
            self._graph.replay()


def _record(function: Callable[[], None], pool: Any) -> torch.cuda.CUDAGraph:
    """Record what a function launches; nothing of it is run.

    As `torch.cuda.graph` does, but without collecting garbage each time, which takes longer than a decoding step.
    """
    if pool is None:  # memory that the plain calls have left can serve the recording only if it is given back
        torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    collects_garbage = gc.isenabled()
    gc.disable()  # it might free, in the middle of the recording, what belongs to another one
    try:
        with _other_stream_in_turn():
            # Other threads may go on with what a recording forbids, such as asking for pinned memory.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                function()
            except BaseException:
                with suppress(RuntimeError):  # the recording is void; what made it so is raised
                    graph.capture_end()
                raise
            graph.capture_end()
    finally:
        if collects_garbage:
            gc.enable()
    return graph


def _run_plainly(function: Callable[[], None]) -> None:
    """Run as it is going to be recorded: not on the default stream, which others wait for."""
    with _other_stream_in_turn():
        function()


@contextmanager
def _other_stream_in_turn() -> Iterator[None]:
    """Work on another stream: after what this one has to do, and before what it gets to do then."""
    current = torch.cuda.current_stream()
    other = _other_stream(current.device)
    other.wait_stream(current)
    with torch.cuda.stream(other):
        yield
    current.wait_stream(other)


@cache
def _other_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the same stream each time: the allocator and cuBLAS keep memory for every one that they meet."""
    return torch.cuda.Stream(device)
