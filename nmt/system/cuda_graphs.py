"""Work of a GPU that is recorded once and then replayed: CUDA graphs, for tensors whose shapes never change.

An update or a decoding step is some thousand small kernels. Python launches them one by one, more slowly than they
run, so the GPU waits for the host. A replay launches all of them at once.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import torch

_NUM_PLAIN_CALLS = 2  # before the recording, while libraries set themselves up


class Recording:
    """A function whose work on a GPU is recorded at the third call, and from then on replayed instead.

    The function takes and returns nothing. It reads tensors at fixed addresses: before each call, `copy_` into
    them what has changed. A number or a branch that the host decides in the function is fixed by the recording. A
    tensor that the function makes is made once, by the recording. Each replay fills it anew, as long as the caller
    holds it. With a pool, results must be written into tensors from outside, because all recordings of a pool
    share its memory.

        call 1, 2    plain
        call 3       record, then replay
        call 4...    replay

    Random numbers follow from the generator as they would without a recording.
    """

    def __init__(self, function: Callable[[], None], device: torch.device, *, pool: Any = None) -> None:
        """Record on a CUDA device; on any other device each call is plain.

        Args:
            function: What to do.
            device: Where.
            pool: From `torch.cuda.graph_pool_handle()`: memory to share with other recordings. No two of them may
                be replayed at once.
        """
        self._function = function
        self._is_recorded = device.type == "cuda"
        self._pool = pool
        self._num_plain = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._num_bytes = 0

    @property
    def num_bytes(self) -> int:
        """About how much memory the recording keeps for itself alone; 0 with a pool from outside."""
        return self._num_bytes

    def forget(self) -> None:
        """Drop the recording. Its memory is free once nobody holds its results; a later call records anew."""
        if self._graph is not None:
            torch.cuda.synchronize()  # a replay may still be running
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
            if self._pool is None:  # `_record` has emptied the cache: what is reserved now is the recording's
                self._num_bytes = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
            self._graph.replay()


def _record(function: Callable[[], None], pool: Any) -> torch.cuda.CUDAGraph:
    """Record what a function launches, without running it.

    Like `torch.cuda.graph`, but without collecting garbage each time, which takes longer than a decoding step.
    """
    if pool is None:  # the recording can use memory that the plain calls have left only once it is given back
        torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    collects_garbage = gc.isenabled()
    gc.disable()  # or it might free another recording in the middle of this one
    try:
        with _other_stream_in_turn():
            # Other threads may do meanwhile what a recording forbids, such as asking for pinned memory.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                function()
            except BaseException:
                with suppress(RuntimeError):  # the recording is void; the first error is raised
                    graph.capture_end()
                raise
            graph.capture_end()
    finally:
        if collects_garbage:
            gc.enable()
    return graph


def _run_plainly(function: Callable[[], None]) -> None:
    """Run on the stream that recordings use: not on the default one, which other streams wait for."""
    with _other_stream_in_turn():
        function()


@contextmanager
def _other_stream_in_turn() -> Iterator[None]:
    """Work on another stream: after the work that this stream has now, and before the work that it gets later."""
    current = torch.cuda.current_stream()
    other = _other_stream(current.device)
    other.wait_stream(current)
    with torch.cuda.stream(other):
        yield
    current.wait_stream(other)


@cache
def _other_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the same stream each time: the allocator and cuBLAS keep memory for every stream that they meet."""
    return torch.cuda.Stream(device)
