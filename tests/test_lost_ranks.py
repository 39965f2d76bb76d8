"""Which rank is lost is said, whatever becomes of the store through which the ranks have met."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch.distributed as dist

from nmt.system import lost_ranks
from nmt.system.lost_ranks import SignsOfLife, lost_rank_line

HERE = os.uname().nodename


@pytest.fixture(autouse=True)
def short_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lost_ranks, "_BEAT_SECONDS", 0.05)


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What a process would end with at once, and what it would say."""
    found: list[Any] = []
    monkeypatch.setattr(os, "_exit", found.append)
    monkeypatch.setattr(os, "write", lambda _, text: found.append(text.decode()))
    return found


class Store(dist.HashStore):
    """A store that can be cut off: no question is answered then; or that can go: each is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.state = "here"

    def _look(self) -> None:
        if self.state == "cut":
            threading.Event().wait(30)
        if self.state == "gone":
            raise dist.DistNetworkError("Connection was closed")


def _looking(name: str) -> Callable[..., Any]:
    def method(self: Store, *args: Any) -> Any:
        self._look()
        return getattr(dist.HashStore, name)(self, *args)

    return method


for name in ("set", "get", "check", "compare_set"):
    setattr(Store, name, _looking(name))


Ranks = Callable[..., list[SignsOfLife]]


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    """Starts the signs of life of some ranks, and ends them all."""
    monkeypatch.setattr(
        lost_ranks, "PrefixStore", lambda _, store: store
    )  # C++ would not ask Python's methods
    made: list[SignsOfLife] = []

    def start(store: Store, size: int, *, timeout: float = 30) -> list[SignsOfLife]:
        found = [SignsOfLife(store, rank=rank, size=size, timeout=timeout) for rank in range(size)]
        made.extend(found)
        for signs in found:
            signs.start()
        return found

    yield start
    for signs in made:
        signs.end()


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_silent_ranks_of_a_machine_are_named_together(ranks: Ranks) -> None:
    store = Store()
    found = ranks(store, 4)
    for rank, machine in enumerate(["here", "here", "there", "there"]):
        store.set(f"place {rank}", f"process {rank} on {machine}")
    for signs in found[2:]:
        signs.end()
    wanted = "ranks 2, 3 on there have given no sign of life"
    assert found[0].verdict() == wanted
    assert found[1].verdict() == wanted, "the verdict stands"


def test_a_silent_rank_is_named_with_its_process(ranks: Ranks) -> None:
    one, other = ranks(Store(), 2)
    other.end()
    assert one.verdict() == f"rank 1 (process {os.getpid()} on {HERE}) has given no sign of life"


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ("cut", "or the network on the way to it, no longer answers"),
        ("gone", "or torchrun on its machine, has ended"),
    ],
)
def test_a_store_that_is_lost_is_told_with_the_machine_of_rank_0(state: str, says: str, ranks: Ranks) -> None:
    store = Store()
    _, other = ranks(store, 2)
    store.state = state
    assert other.verdict() == f"rank 0 (process {os.getpid()} on {HERE}), {says}"
    other.end(KeyError())  # ends too, and in time


@pytest.mark.parametrize("state", ["cut", "gone"])
def test_a_process_whose_main_thread_waits_is_ended_when_the_store_is_lost(
    state: str, ranks: Ranks, exits: list[Any]
) -> None:
    store = Store()
    one, other = ranks(store, 2, timeout=0.3)
    wait_until(lambda: store.get("sign 1") != b"0")
    assert exits == []
    one._ended.set()  # it has left in peace
    store.state = state
    wait_until(lambda: 75 in exits)
    assert exits[0] == f"nmt: error: {lost_rank_line(other._found)}\n" and "rank 0 (process " in exits[0]


def test_a_process_whose_main_thread_waits_for_a_silent_rank_is_ended(ranks: Ranks, exits: list[Any]) -> None:
    _, other = ranks(Store(), 2, timeout=0.3)
    other.end()
    wait_until(lambda: 75 in exits)
    assert "rank 1 (process " in exits[0]


def test_a_rank_tells_of_an_error_of_its_own(ranks: Ranks) -> None:
    one, other = ranks(Store(), 2)
    other.end(KeyError())
    assert one.verdict() == f"rank 1 (process {os.getpid()} on {HERE}) has ended with an error of its own"
