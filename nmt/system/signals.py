"""Signals that end a run early: noted at once, obeyed when the current update is made and saved.

Imports no torch.
"""

import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from threading import Thread
from types import TracebackType
from typing import Self

ENDING_SIGNALS = (signal.SIGTERM, signal.SIGINT)

# Under torchrun Ctrl-C may come twice: from the terminal, and from torchrun, which passes on its own signal.
_SAME_REQUEST_SECONDS = 2.0


class StopRequest:
    """A request to end the run after the current update, from a signal or from anywhere in the program.

    As a context manager it listens to SIGTERM and SIGINT (in the main thread only, as Python requires). The first
    signal is a request. A second one ends the process at once, with 128 + its number, even while the main thread
    waits for another rank or for the device and runs no Python:

        signal --> the system's handler writes a byte to a pipe --> a thread reads it --> request, or end at once
    """

    def __init__(self, prog: str = "nmt") -> None:
        """Request nothing yet; `prog` begins the lines on stderr."""
        self.reason: str | None = None
        self._prog = prog
        self._handlers: dict[signal.Signals, object] = {}
        self._pipe: tuple[int, int] | None = None
        self._previous_pipe = -1

    def request(self, reason: str) -> None:
        """Ask for the end of the run; the first reason stays."""
        self.reason = self.reason or reason

    def __enter__(self) -> Self:
        """Listen to the signals."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        self._pipe = reader, writer
        self._previous_pipe = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in ENDING_SIGNALS:
            # The handler does nothing, but without a handler the signal would do what it does by default.
            self._handlers[number] = signal.signal(number, lambda *_: None)
        Thread(target=self._listen, args=(reader,), daemon=True, name="signals").start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let the signals do what they did before."""
        assert self._pipe is not None
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._previous_pipe)
        os.close(self._pipe[1])  # this ends the thread

    def _listen(self, reader: int) -> None:
        first = 0.0
        while received := os.read(reader, 1):
            if received[0] not in ENDING_SIGNALS:
                continue
            name = signal.Signals(received[0]).name
            if self.reason is None:
                first = time.monotonic()
                self.request(name)
                if os.environ.get("RANK", "0") == "0":
                    self._say(f"{name}: ends after this update, and saves; once more ends at once")
            elif "TORCHELASTIC_RUN_ID" in os.environ and time.monotonic() - first < _SAME_REQUEST_SECONDS:
                continue
            else:
                self._say(f"{name} again: ended at once")
                os._exit(128 + received[0])
        os.close(reader)

    def _say(self, line: str) -> None:
        # Not by print: the main thread may hold the lock of stderr and never release it.
        os.write(2, f"{self._prog}: {line}\n".encode())


@contextmanager
def shielded_from_signals() -> Iterator[None]:
    """Hide the signals that end a run from processes that are started in the block.

    A terminal sends Ctrl-C, and torchrun and cluster schedulers send SIGTERM, to all processes of a job. A process
    that reads data for the main process must live until the main process ends it.
    """
    if sys.platform == "win32":
        yield
        return
    # multiprocessing starts its tracker with the first child, and unblocks SIGINT and SIGTERM when it does.
    resource_tracker.ensure_running()
    blocked: Iterable[int] = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)
    try:
        yield  # children inherit which signals are blocked
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
