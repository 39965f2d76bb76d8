"""Which rank was lost: signs of life of all ranks, in the store through which they have met.

When a rank dies, Gloo tells the others that some connection broke; with NCCL they wait and learn nothing. When a
network is cut, nobody learns anything. So a thread of each rank counts up a number of its own in the store, and
watches the number of the next rank. A rank that finds another one silent, or ends with an error itself, leaves a
verdict in the store for all.

    rank 0        rank 1        rank 2            the store, on rank 0's machine
    beat ------------------------------------>    sign 0 = 17, sign 1 = 17, sign 2 = 17     (each counts its own)
    watches 1     watches 2     watches 0         verdict = "rank 2 (process 7 on here) has given no sign of life"
    guard         guard         guard

If rank 0's machine is cut off, the store never answers and the beating thread hangs. So each rank has a second
thread, the guard, which asks the store nothing. It sees when the store last answered, and ends the process if the
main thread waits for a lost rank for ever.
"""

import os
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Event, Thread

from torch._C._distributed_c10d import PrefixStore, Store

from nmt.errors import LostRankError

_BEAT_SECONDS = 1.0
_PATIENCE = 4  # beats without a sign that make a rank a lost one, once something has failed
_VERDICT = "verdict"


def lost_rank_line(verdict: str) -> str:
    """Return the line that a rank ends with because another rank was lost."""
    return f"this rank cannot go on alone: {verdict}. The same command goes on from the last checkpoint."


class SignsOfLife:
    """This rank's two threads, its own signs, and what it knows of the other ranks."""

    def __init__(self, store: Store, *, rank: int, size: int, timeout: float) -> None:
        """Give the first sign, so that no sign is missing once all ranks have met.

        Args:
            store: What the ranks have met through.
            rank: Of this process.
            size: Number of ranks.
            timeout: Seconds of silence after which a rank counts as lost although nothing has failed yet.
        """
        self._store = PrefixStore("nmt/signs", store)
        self._rank, self._size = rank, size
        self._timeout = timeout
        self._ended = Event()
        self._found = ""  # the verdict, as far as this rank knows it
        self._last_answer = time.monotonic()  # when the store last answered `_beat`
        self._place_of_main = ""
        self._store.set(f"place {rank}", f"process {os.getpid()} on {socket.gethostname()}")
        self._store.set(f"sign {rank}", "0")
        self._threads = [
            Thread(target=self._beat, daemon=True, name="signs of life"),
            Thread(target=self._guard, daemon=True, name="guard of signs of life"),
        ]

    def start(self) -> None:
        """Begin to give signs and to watch; all ranks have met by now."""
        self._place_of_main = self._place(0)  # asked now, to be named when the store no longer answers
        self._last_answer = time.monotonic()
        for thread in self._threads:
            thread.start()

    def end(self, error: BaseException | None = None) -> None:
        """Give no more signs; if this rank ends with an error, tell the others."""
        if error is not None:
            self._in_time(self._tell_of_own_error)
        self._ended.set()
        for thread in self._threads:
            thread.join(timeout=2 * _BEAT_SECONDS)  # `_beat` may wait for the store for ever

    def verdict(self) -> str:
        """Say which rank is lost, after an exchange between ranks has failed; this takes some seconds."""
        return self._in_time(self._ask_for_verdict) or self._found or self._no_answer()

    def _ask_for_verdict(self) -> str:
        try:
            return self._leave_verdict_on_silent() or "the connection between ranks broke"
        except RuntimeError:
            return self._store_is_gone()

    def _tell_of_own_error(self) -> str:
        with suppress(RuntimeError):  # if the store is gone, this rank's own error is shown all the same
            return self._leave_verdict(
                f"rank {self._rank} ({self._place(self._rank)}) has ended with an error of its own"
            )
        return ""

    def _beat(self) -> None:
        """Give signs, and watch the next rank. This thread hangs if the store no longer answers."""
        watched = (self._rank + 1) % self._size
        count, last, since = 0, b"", time.monotonic()
        try:
            while not self._ended.wait(_BEAT_SECONDS):
                count += 1
                self._store.set(f"sign {self._rank}", str(count))
                sign = self._store.get(f"sign {watched}")
                if sign != last:
                    last, since = sign, time.monotonic()
                elif time.monotonic() - since > self._timeout:
                    since = time.monotonic()
                    # In a thread of its own: the search takes seconds, and this rank's signs must go on.
                    Thread(target=self._ask_for_verdict, daemon=True, name="search of silent ranks").start()
                self._found = self._found or self._read_verdict()
                self._last_answer = time.monotonic()
        except RuntimeError:
            self._found = self._found or self._store_is_gone()

    def _guard(self) -> None:
        """End this process if a rank is lost and the main thread does not end, because it waits for that rank."""
        num_beats = 0
        while not self._ended.wait(_BEAT_SECONDS):
            if time.monotonic() - self._last_answer > self._timeout:
                self._found = self._found or self._no_answer()
            num_beats += bool(self._found)  # time for the main thread to end by itself
            if num_beats > 2 * _PATIENCE:
                os.write(2, f"nmt: error: {lost_rank_line(self._found)}\n".encode())
                os._exit(LostRankError.exit_code)

    def _leave_verdict_on_silent(self) -> str:
        """Find the ranks that give no signs, and leave a verdict. Return the verdict that stands, if any."""
        before = self._signs()
        for _ in range(_PATIENCE):
            time.sleep(_BEAT_SECONDS)
            if said := self._read_verdict():
                return said
        now = self._signs()
        silent = [rank for rank in range(self._size) if before[rank] == now[rank] and rank != self._rank]
        return self._leave_verdict(self._name(silent)) if silent else ""

    def _in_time(self, ask: Callable[[], str]) -> str:
        """Ask the store in a thread of its own; return "" if it does not answer within twice the patience."""
        answers: SimpleQueue[str] = SimpleQueue()
        Thread(target=lambda: answers.put(ask()), daemon=True, name="question to the store").start()
        with suppress(Empty):
            return answers.get(timeout=2 * _PATIENCE * _BEAT_SECONDS)
        return ""

    def _no_answer(self) -> str:
        return f"rank 0 ({self._place_of_main}), or the network on the way to it, no longer answers"

    def _store_is_gone(self) -> str:
        return f"rank 0 ({self._place_of_main}), or torchrun on its machine, has ended"

    def _signs(self) -> list[bytes]:
        return [self._store.get(f"sign {rank}") for rank in range(self._size)]

    def _name(self, ranks: Sequence[int]) -> str:
        return f"{_by_machine({rank: self._place(rank) for rank in ranks})} given no sign of life"

    def _place(self, rank: int) -> str:
        return self._store.get(f"place {rank}").decode()

    def _read_verdict(self) -> str:
        return self._store.get(_VERDICT).decode() if self._store.check([_VERDICT]) else ""

    def _leave_verdict(self, text: str) -> str:
        """Leave a verdict unless there is one already, and return the one that stands."""
        try:
            return self._store.compare_set(_VERDICT, "", text).decode()
        except RuntimeError:
            return text


def _by_machine(places: Mapping[int, str]) -> str:
    """Return "rank 1 (process 7 on here) has", or "ranks 2, 3 on there have": the ranks of a machine together."""
    ranks_of: dict[str, list[int]] = defaultdict(list)
    for rank, place in places.items():
        ranks_of[place.partition(" on ")[2]].append(rank)
    names = [
        f"rank {ranks[0]} ({places[ranks[0]]})"
        if len(ranks) == 1
        else f"ranks {', '.join(map(str, ranks))} on {machine}"
        for machine, ranks in ranks_of.items()
    ]
    return f"{'; '.join(names)} {'has' if len(places) == 1 else 'have'}"
