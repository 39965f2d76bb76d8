"""That threads find no free core is said once."""

from pathlib import Path

import pytest
import torch

from nmt.run import busy_cores
from nmt.run.busy_cores import BusyCores, CoreSeconds, core_seconds, share_waited


def test_the_times_of_each_thread_are_read(tmp_path: Path) -> None:
    for number, text in (("7", "1500000000 250000000 12\n"), ("8", "0 0 0\n")):
        (tmp_path / number).mkdir()
        (tmp_path / number / "schedstat").write_text(text)
    assert core_seconds(tmp_path) == {"7": CoreSeconds(1.5, 0.25), "8": CoreSeconds(0, 0)}


def test_where_the_system_does_not_tell_nothing_is_known(tmp_path: Path) -> None:
    assert core_seconds(tmp_path / "missing") == {}
    assert share_waited({}, {}) == 0


def test_a_thread_that_has_just_ended_hides_no_other(tmp_path: Path) -> None:
    for number in ("7", "8", "9"):
        (tmp_path / number).mkdir()
        if number != "8":
            (tmp_path / number / "schedstat").write_text("1000000000 0 1\n")
    assert core_seconds(tmp_path).keys() == {"7", "9"}


def test_a_system_that_does_not_tell_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[None] = []

    def nothing() -> dict[str, CoreSeconds]:
        calls.append(None)
        return {}

    monkeypatch.setattr(busy_cores, "core_seconds", nothing)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    cores = BusyCores(torch.device("cpu"))
    assert [cores.warning() for _ in range(3)] == [None] * 3
    assert len(calls) == 1


def test_the_share_is_of_the_threads_that_were_there_before() -> None:
    before = {"1": CoreSeconds(10, 10), "2": CoreSeconds(0, 0), "ended": CoreSeconds(5, 5)}
    now = {"1": CoreSeconds(14, 13), "2": CoreSeconds(2, 1), "new": CoreSeconds(0, 99)}
    assert share_waited(before, now) == 4 / 10


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that have passed, and how long the one thread has run and waited."""
    now = [0.0, 0.0, 0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr(busy_cores, "core_seconds", lambda: {"1": CoreSeconds(now[1], now[2])})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    return now


def test_a_warning_comes_once_and_says_how_many_threads_fit(clock: list[float]) -> None:
    cores = BusyCores(torch.device("cpu"))
    assert cores.warning() is None
    clock[:] = [14, 0, 14]  # too short to tell
    assert cores.warning() is None
    clock[:] = [20, 16, 4]  # a fifth
    assert cores.warning() is None
    clock[:] = [40, 26, 14]  # half, since then
    said = cores.warning()
    assert said is not None and said.startswith(
        "warning: for 50% of their time threads had work, but no core"
    )
    assert said.endswith("OMP_NUM_THREADS=4")
    clock[:] = [90, 26, 99]
    assert cores.warning() is None


def test_nothing_is_said_of_one_thread_or_of_a_gpu(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu = BusyCores(torch.device("cuda"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    for cores in (on_gpu, BusyCores(torch.device("cpu"))):
        clock[:] = [0, 0, 0]
        assert cores.warning() is None
        clock[:] = [20, 0, 20]
        assert cores.warning() is None
