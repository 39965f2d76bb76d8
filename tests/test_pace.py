"""How long the rest of a run takes: told from updates like those that are left."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.toy_run import config, log, records

from nmt.run.pace import Pace
from nmt.train_loop import train


@given(
    st.lists(st.floats(1e-3, 5.0) | st.floats(1e-3, 40.0), max_size=300),
    st.integers(0, 1000),
    st.integers(0, 9),
)
def test_the_mean_of_the_last_updates_after_the_first_ones_tells_the_rest(
    seconds: list[float], num_updates: int, num_validations: int
) -> None:
    pace = Pace()
    for second in seconds:
        pace.note_update(second)
    first = next(  # ten updates, or fewer that have taken three seconds
        (n for n in range(1, len(seconds)) if n >= 10 or sum(seconds[:n]) >= 3), len(seconds)
    )
    last = seconds[first:][-200:]
    # Ten more, or two that have taken six seconds, or one that has taken fifteen.
    enough = {0: math.inf, 1: 15.0}.get(len(last), 6.0)
    assert pace.is_known == (len(last) >= 10 or math.fsum(last) >= enough)
    if last:
        mean = math.fsum(last) / len(last)
        assert pace.seconds_per_update == pytest.approx(mean)
        assert pace.seconds_left(num_updates, num_validations) == pytest.approx(mean * num_updates)
        pace.validation_seconds = 60.0
        expected = mean * num_updates + 60 * num_validations
        assert pace.seconds_left(num_updates, num_validations) == pytest.approx(expected)


@pytest.mark.parametrize(("seconds", "num"), [(0.1, 20), (1.0, 9), (4.5, 3), (29.0, 2), (600.0, 2)])
def test_a_slow_update_need_not_be_made_often_until_its_time_is_known(seconds: float, num: int) -> None:
    pace = Pace()
    for _ in range(num):
        assert not pace.is_known
        pace.note_update(seconds)
    assert pace.is_known and pace.seconds_per_update == pytest.approx(seconds)


@pytest.mark.usefixtures("points_plugin")
def test_a_report_says_how_far_the_run_is_and_what_is_left(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(config(folder, optimization={"max_update": 40}))
    lines = [line.split(" ", 2)[2] for line in log(folder).splitlines()]
    reports = [line for line in lines if line.startswith("train | ")]
    assert [line.split(" | ")[1] for line in reports] == [f"update {n}/40" for n in (10, 20, 30, 40)]
    assert all(" MiB | " in line for line in reports)
    assert " | left 0 s | " in reports[-1]
    assert sum(line.startswith("time: ") for line in lines) == 1
    last = records(folder, "train")[-1]
    assert last["update"] == 40 and last["hours left"] == 0 and last["memory MiB"] > 0


@pytest.mark.usefixtures("points_plugin")
def test_the_end_of_a_run_of_epochs_is_counted_from_where_it_stands(tmp_path: Path) -> None:
    """16 updates an epoch, and 8 after they have become as large."""
    from nmt.data.options import BatchingOptions

    folder = tmp_path / "run"
    train(config(folder, optimization={"max_update": None, "max_epoch": 1}))
    batching = BatchingOptions(max_tokens=None, batch_size=64)
    train(config(folder, optimization={"max_update": None, "max_epoch": 3}, batching=batching))
    reports = [line.split(" | ")[1] for line in log(folder).splitlines() if " train | " in line]
    assert reports == ["update 10/16", "update 20/32", "update 30/32"]
    assert records(folder, "epoch")[-1]["update"] == 32


@pytest.mark.usefixtures("points_plugin")
def test_a_dry_run_tells_the_time_from_where_the_run_stands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    train(config(folder, optimization={"max_update": 40}))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    train(config(folder, optimization={"max_update": 100}, dry_run=True))
    assert capsys.readouterr().out.rstrip().endswith("for 60 updates after update 40")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.usefixtures("points_plugin")
def test_epochs_shorter_than_the_interval_of_reports_are_drawn(tmp_path: Path) -> None:
    from nmt.run.plot import draw, open_runs

    folder = tmp_path / "run"
    train(config(folder, optimization={"max_update": None, "max_epoch": 3}, log_interval=1000))
    assert records(folder, "train") == []
    figure = draw(open_runs([folder])[0])
    (loss,) = [ax for ax in figure.axes if ax.get_title("left") == "loss per target"]
    assert loss.lines[0].get_xdata().tolist() == [16, 32, 48]
    assert loss.lines[0].get_ydata().tolist() == [record["loss"] for record in records(folder, "epoch")]
