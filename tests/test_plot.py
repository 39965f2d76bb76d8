"""Pictures of runs: what is drawn where, read off the figure itself, and the command."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nmt.cli.plot import main
from nmt.errors import UserError
from nmt.run.plot import RunRecords, draw, open_runs, without_font_warnings


def train(update: int, epoch: int = 1, **values: Any) -> dict[str, Any]:
    return {"kind": "train", "update": update, "epoch": epoch, "hours": update / 100, **values}


def valid(update: int, best: float, **values: Any) -> dict[str, Any]:
    return {"kind": "valid", "update": update, "epoch": 1, "hours": update / 100, **values, "best bleu": best}


# 40 updates are an epoch; the best BLEU, 7, comes at update 40, the lowest loss at 60.
RECORDS = [
    train(20, loss=5.0, lr=1e-3, **{"targets/s": 1000.0}),
    valid(20, 3.0, loss=4.5, nll=4.0, ppl=54.6, bleu=3.0),
    train(40, loss=3.0, lr=2e-3, **{"targets/s": 1200.0}),
    {"kind": "epoch", "update": 40, "epoch": 1, "loss": 4.0, "hours": 0.4},
    valid(40, 7.0, loss=2.5, nll=2.0, ppl=7.4, bleu=7.0),
    train(60, epoch=2, loss=None, lr=1e-3, **{"targets/s": 1100.0}),
    valid(60, 7.0, loss=2.0, nll=1.5, ppl=4.5, bleu=6.0),
]
RUN = RunRecords("ours", RECORDS)


def panels(figure: Figure) -> dict[str, Axes]:
    return {ax.get_title("left"): ax for ax in figure.axes}


def curves(ax: Axes) -> list[tuple[list[float], list[float]]]:
    """Return the points of each line: for each run training, validation, and the star."""
    return [
        (np.asarray(x).tolist(), np.asarray(y).tolist()) for x, y in (line.get_data() for line in ax.lines)
    ]


def legend(figure: Figure) -> list[str]:
    """Return the names of the runs."""
    runs, kinds = ([text.get_text() for text in legend.get_texts()] for legend in figure.legends)
    assert kinds == ["training", "validation", "best checkpoint"]
    return runs


def write(folder: Path, records: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_there_is_a_panel_for_each_metric_and_for_rate_and_speed() -> None:
    assert list(panels(draw([RUN]))) == ["loss per target", "BLEU", "learning rate", "targets per second"]


def test_training_validation_and_the_best_checkpoint_are_where_they_were_recorded() -> None:
    found = panels(draw([RUN]))
    (train_x, train_y), valid_curve, star = curves(found["loss per target"])
    assert train_x == [20, 40, 60] and train_y[:2] == [5.0, 3.0]
    assert np.isnan(train_y[2])  # not a number leaves a gap
    assert valid_curve == ([20, 40, 60], [4.5, 2.5, 2.0])
    assert star == ([40], [2.5])  # the best checkpoint is chosen by BLEU, not by the loss
    assert curves(found["BLEU"]) == [([], []), ([20, 40, 60], [3, 7, 6]), ([40], [7])]
    assert curves(found["learning rate"])[0] == ([20, 40, 60], [1e-3, 2e-3, 1e-3])


def test_the_legend_says_what_the_best_checkpoint_reached() -> None:
    assert legend(draw([RUN])) == ["ours: best BLEU 7 at update 40"]


def test_epochs_are_told_by_updates_between_their_ends_and_after_the_last() -> None:
    figure = draw([RUN], x="epoch")
    assert curves(panels(figure)["BLEU"])[1] == ([0.5, 1.0, 1.5], [3, 7, 6])
    # The batch size changed at update 40: the second epoch took 20 updates.
    longer = [
        *RECORDS,
        {"kind": "epoch", "update": 60, "epoch": 2, "loss": 2.0, "hours": 0.6},
        train(70, lr=1e-3),
    ]
    figure = draw([RunRecords("ours", longer)], x="epoch")
    assert curves(panels(figure)["learning rate"])[0][0] == [0.5, 1.0, 2.0, 2.5]


def test_hours_are_those_recorded() -> None:
    back = {"kind": "back", "update": 40, "epoch": 1, "lr scale": 0.5, "bad updates": 10}
    figure = draw([RunRecords("went back", [*RECORDS, back])], x="hours")
    assert curves(panels(figure)["BLEU"])[1][0] == [0.2, 0.4, 0.6]


def test_an_axis_that_a_run_has_not_recorded_is_refused() -> None:
    old = RunRecords("old", [{"kind": "train", "update": 5, "epoch": 1, "loss": 1.0}])
    with pytest.raises(UserError, match="`x` hours must have runs that recorded it, but old did not"):
        draw([RUN, old], x="hours")
    with pytest.raises(UserError, match="`x` epoch must have runs of an epoch or more, but old has none"):
        draw([RUN, old], x="epoch")
    assert curves(panels(draw([old]))["loss per target"])[0] == ([5], [1.0])


def test_runs_without_common_metrics_share_a_picture() -> None:
    images = RunRecords(
        "images", [{"kind": "valid", "update": 9, "epoch": 1, "accuracy": 0.5, "best accuracy": 0.5}]
    )
    figure = draw([RUN, images])
    assert list(panels(figure)) == [
        "loss per target",
        "BLEU",
        "accuracy",
        "learning rate",
        "targets per second",
    ]
    accuracy, bleu = panels(figure)["accuracy"], panels(figure)["BLEU"]
    assert [curve for curve in curves(accuracy) if curve[0]] == [([9], [0.5]), ([9], [0.5])]
    assert len([curve for curve in curves(bleu) if curve[0]]) == 2


def test_chosen_metrics_alone_are_drawn_beside_rate_and_speed() -> None:
    figure = draw([RUN], metrics=["ppl"])
    assert list(panels(figure)) == ["perplexity", "learning rate", "targets per second"]
    with pytest.raises(UserError, match=r"`metrics` must be among loss, lr, .*bleu.*, but one is 'blue'"):
        draw([RUN], metrics=["blue"])


def test_many_runs_look_different() -> None:
    figure = draw([RunRecords(f"run {i}", RECORDS) for i in range(28)])
    lines = panels(figure)["BLEU"].lines[1::3]
    styles = {(line.get_color(), line._unscaled_dash_pattern) for line in lines}  # type: ignore[attr-defined]
    assert len(lines) == len(styles) == 28


def test_a_best_value_that_is_not_a_number_is_no_star() -> None:
    records = [train(1, lr=1.0), valid(2, best=None, loss=None, bleu=None)]  # type: ignore[arg-type]
    figure = draw([RunRecords("diverged", records)])
    assert legend(figure) == ["diverged"]
    assert all(len(ax.lines) == 2 for ax in figure.axes)


def test_names_are_as_short_as_they_may_be(tmp_path: Path) -> None:
    folders = [write(tmp_path / name, RECORDS) for name in ("a/run", "b/run", "c")]
    runs, _ = open_runs([*folders, folders[0]])
    assert [run.name for run in runs] == ["a/run", "b/run", f"{tmp_path.name}/c"]
    (alone,), _ = open_runs(folders[:1])
    assert alone.name == "run"
    (long,), _ = open_runs([write(tmp_path / ("x" * 50 + "-seed1"), RECORDS)])
    assert long.name.startswith("xxxx") and long.name.endswith("-seed1") and len(long.name) == 40


@pytest.mark.parametrize(
    ("suffix", "magic"),
    [(".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml")],
    ids=["png", "pdf", "svg"],
)
def test_the_command_writes_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str, magic: bytes
) -> None:
    output = tmp_path / f"curves{suffix}"
    run, other = write(tmp_path / "run", RECORDS), write(tmp_path / "other", [])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind"\n{"kind": "train", "upd')
    main([str(run), str(other), "--output", str(output)])
    assert output.read_bytes().startswith(magic)
    said = capsys.readouterr()
    assert said.out == f"{output}\n"
    assert said.err.splitlines() == [
        f"nmt-plot: left out: 1 damaged line of {run}",
        f"nmt-plot: left out: {other}, which has reported nothing yet",
    ]


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as end:
        main(list(map(str, arguments)))
    assert end.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_what_cannot_be_drawn_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, empty = write(tmp_path / "run", RECORDS), write(tmp_path / "empty", [])
    assert "has no metrics.jsonl" in refused(capsys, tmp_path)
    assert "none has" in refused(capsys, empty)
    assert "`output` must end in .png" in refused(capsys, run, "--output", "curves.bmp")
    assert "`RUNS` must be given" in refused(capsys)
    assert "there is no" in refused(capsys, run, "--output", tmp_path / "nowhere" / "x.png")


def test_without_matplotlib_the_command_says_what_to_install(tmp_path: Path) -> None:
    run = write(tmp_path / "run", RECORDS)
    code = (
        f"import sys\nsys.modules['matplotlib'] = None\nfrom nmt.cli.plot import main\nmain([{str(run)!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "nmt-plot: error: `nmt-plot` must have matplotlib, which is not installed. Run pip install matplotlib.\n"
    )


@given(st.text(st.sampled_from("$\\\\_{}^x\u4e2d\n\x1b\ud800 #%&"), min_size=1, max_size=12))
@settings(max_examples=25, deadline=None)
def test_whatever_a_run_is_called_is_drawn_as_it_is(name: str) -> None:
    """Names and metrics are no formulas, and none is left out."""
    records = [{"kind": "valid", "update": 10, "epoch": 1, "loss": 2.0, name: 1.0, "best loss": 2.0}]
    figure = draw([RunRecords(name, records)])
    with without_font_warnings():
        FigureCanvasAgg(figure).draw()
    ((shown,),) = [list(legend.get_texts()) for legend in figure.legends[:1]]
    visible = "".join(c if c.isprintable() else "\ufffd" for c in name)
    laid_out, is_formula = shown._preprocess_math(shown.get_text())
    assert (laid_out.lstrip(), is_formula) == (f"{visible}: best loss 2 at update 10".lstrip(), False)


@pytest.mark.parametrize("name", ["lr_$1_$2", "a$\\x{$b", "_hidden", "\u4e2d$$"])
def test_the_command_draws_runs_of_any_name(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / name, RECORDS)
    main([str(folder), "--output", str(tmp_path / "p.png")])
    assert capsys.readouterr().err == ""
    assert (tmp_path / "p.png").stat().st_size > 10_000
