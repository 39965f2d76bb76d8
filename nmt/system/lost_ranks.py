"""Which rank was lost: signs of life of all ranks, in the store through which they have met.

When a rank dies, the others learn from Gloo that some connection broke, or with NCCL wait and learn nothing. So
each rank counts up a number of its own in the store, in a thread, and watches the next rank's. Who finds a rank
silent, or ends with an error itself, leaves a verdict there for all.
"""

import os
import socket
import time
from contextlib import suppress
from threading import Event, Thread

from torch._C._distributed_c10d import PrefixStore, Store

from nmt.errors import LostRankError

_BEAT_SECONDS = 1.0
_PATIENCE = 4  # beats without a sign, once it is known that a rank is lost
_VERDICT = "verdict"


def lost_rank_line(verdict: str) -> str:
    """Return the line that a rank ends with whom another one has left alone."""
    return f"this rank cannot go on alone: {verdict}. The same command goes on from the last checkpoint."


class SignsOfLife:
    """This rank's thread and what it says and knows of the others."""

    def __init__(self, store: Store, *, rank: int, size: int, timeout: float) -> None:
        """Give the first sign, so that none is missing once all ranks have met.

        Args:
            store: What the ranks have met through.
            rank: Of this process.
            size: Number of ranks.
            timeout: Seconds of silence after which a rank is lost although nothing has failed yet.
        """
        self._store = PrefixStore("nmt/signs", store)
        self._rank, self._size = rank, size
        self._timeout = timeout
        self._ended = Event()
        self._store.set(f"place {rank}", f"process {os.getpid()} on {socket.gethostname()}")
        self._store.set(f"sign {rank}", "0")
        self._thread = Thread(target=self._beat, daemon=True, name="signs of life")

    def start(self) -> None:
        """Begin to give signs and to watch; all ranks have met by now."""
        self._thread.start()

    def end(self, error: BaseException | None = None) -> None:
        """Give no more signs; if this rank ends by an error, the others are told."""
        if error is not None:
            with suppress(RuntimeError):  # the store is gone, and this rank has its own error to show
                place = self._place(self._rank)
                self._leave_verdict(f"rank {self._rank} {place} has ended with an error of its own")
        self._ended.set()
        self._thread.join()

    def verdict(self) -> str:
        """Say which rank is lost, after an exchange between ranks has failed; this takes some seconds."""
        try:
            before = self._signs()
            for _ in range(_PATIENCE):
                time.sleep(_BEAT_SECONDS)
                if said := self._read_verdict():
                    return said
            now = self._signs()
            silent = [rank for rank in range(self._size) if before[rank] == now[rank] and rank != self._rank]
            return self._leave_verdict(self._name(silent)) if silent else "the connection between ranks broke"
        except RuntimeError:  # the store is gone
            return "rank 0, or torchrun on its machine, has ended"

    def _beat(self) -> None:
        """Give signs, watch the next rank, and end this process if one is lost and the main thread does not."""
        watched = (self._rank + 1) % self._size
        count, count_of_verdict, last, since = 0, 0, b"", time.monotonic()
        try:
            while not self._ended.wait(_BEAT_SECONDS):
                count += 1
                self._store.set(f"sign {self._rank}", str(count))
                sign = self._store.get(f"sign {watched}")
                if sign != last:
                    last, since = sign, time.monotonic()
                elif time.monotonic() - since > self._timeout:
                    self._leave_verdict(self._name([watched]))
                if not (said := self._read_verdict()):
                    count_of_verdict = count
                elif (
                    count - count_of_verdict > 2 * _PATIENCE
                ):  # it waits for the lost rank, or for the device
                    os.write(2, f"nmt: error: {lost_rank_line(said)}\n".encode())
                    os._exit(LostRankError.exit_code)
        except RuntimeError:
            return  # the store is gone, with rank 0 or with torchrun: the main thread will notice, or is done

    def _signs(self) -> list[bytes]:
        return [self._store.get(f"sign {rank}") for rank in range(self._size)]

    def _name(self, ranks: list[int]) -> str:
        names = [f"rank {rank} {self._place(rank)}" for rank in ranks]
        return f"{', '.join(names)} {'has' if len(ranks) == 1 else 'have'} given no sign of life"

    def _place(self, rank: int) -> str:
        return f"({self._store.get(f'place {rank}').decode()})"

    def _read_verdict(self) -> str:
        return self._store.get(_VERDICT).decode() if self._store.check([_VERDICT]) else ""

    def _leave_verdict(self, text: str) -> str:
        """Leave a verdict unless there is one, and return the one that stands."""
        try:
            return self._store.compare_set(_VERDICT, "", text).decode()
        except RuntimeError:
            return text
