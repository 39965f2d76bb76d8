"""Best checkpoints, patience and plateau, each by a metric of its own."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.toy_run import config, log, records
from support.toy_task import PointExamples, PointOptions, PointTask
from torch import nn

from nmt.checkpoints.run_folder import MEASURED, CheckpointFolder
from nmt.errors import UserError
from nmt.run.validation_history import Progress
from nmt.train_loop import train

pytestmark = pytest.mark.usefixtures("points_plugin")

# Six validations: by "a" (less is better) the second is best, by "b" (more is better) the fifth.
A = [3.0, 1.0, 2.0, 2.5, 4.0, 5.0]
B = [0.1, 0.2, 0.3, 0.2, 0.9, 0.5]


class ScriptedTask(PointTask):
    """Its validations give what is written above."""

    metrics = {"loss": "min", "a": "min", "b": "max"}

    def __init__(self) -> None:
        self.values = iter(zip(A, B, strict=True))

    def evaluate(self, model: nn.Module, examples: PointExamples, world: Any) -> dict[str, float]:
        return dict(zip(("a", "b"), next(self.values), strict=True))


@dataclass(frozen=True)
class ScriptedOptions(PointOptions):
    def build(self, assets: Path | None) -> PointTask:
        return ScriptedTask()


def run(folder: Path, checkpoints: dict[str, Any], **optimization: Any) -> None:
    checkpoints = {"validate_interval_updates": 2, "validate_interval": 100, "keep_last": 1, **checkpoints}
    options = {"max_update": 12, **optimization}
    train(config(folder, task_options=ScriptedOptions(), checkpoints=checkpoints, optimization=options))


def test_the_best_checkpoints_of_several_metrics_are_kept_and_linked(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(folder, {"best_checkpoint_metric": "a", "keep_best_metrics": ("b",), "keep_best": 2})
    checkpoints = CheckpointFolder(folder / "checkpoints")
    assert (checkpoints.path / "best").readlink() == Path("update-0000004")
    assert (checkpoints.path / "best-b").readlink() == Path("update-0000010")
    assert checkpoints.updates() == [4, 6, 10, 12]  # two of "a", two of "b", of which the last is the newest
    last = records(folder, "valid")[-1]
    assert (last["best a"], last["best b"]) == (1.0, 0.9)
    assert "best a 1 after update 4" in log(folder).splitlines()[-1]
    progress = Progress.from_json(checkpoints.load_state(12)[1]["progress"])  # as nmt-average --best reads it
    assert progress.ranking("min") == [4, 6, 8, 2, 10, 12]


def test_without_further_metrics_the_best_alone_is_kept(tmp_path: Path) -> None:
    run(tmp_path / "run", {"best_checkpoint_metric": "a"})
    assert CheckpointFolder(tmp_path / "run" / "checkpoints").updates() == [4, 12]
    assert not (tmp_path / "run" / "checkpoints" / "best-b").exists()


@pytest.mark.parametrize(("metric", "last"), [(None, 8), ("a", 8), ("b", 12)])
def test_patience_follows_a_metric_of_its_own(tmp_path: Path, metric: str | None, last: int) -> None:
    """Two validations without a better one: by "a" after the fourth, by "b" not in six."""
    folder = tmp_path / "run"
    run(folder, {"best_checkpoint_metric": "a"}, patience=2, patience_metric=metric)
    assert CheckpointFolder(folder / "checkpoints").updates()[-1] == last
    reason = "reached max-update 12" if last == 12 else "a has not become better in 2 validations (patience)"
    assert f"finished: {reason}" in log(folder)


@pytest.mark.parametrize(
    ("metric", "factors"),
    [("a", [1, 1, 0.5, 0.25, 0.125, 0.0625]), ("b", [1, 1, 1, 0.5, 0.5, 0.25])],
)
def test_a_plateau_follows_a_metric_of_its_own(tmp_path: Path, metric: str, factors: list[float]) -> None:
    folder = tmp_path / "run"
    options = {"lr_scheduler": "plateau", "lr_shrink": 0.5, "warmup_updates": 0, "plateau_metric": metric}
    run(folder, {"keep_last": 9}, **options)
    checkpoints = CheckpointFolder(folder / "checkpoints")
    found = [checkpoints.load_state(update)[1]["trainer"]["plateau"]["factor"] for update in range(2, 13, 2)]
    assert found == factors


@pytest.mark.parametrize(
    ("checkpoints", "optimization", "name"),
    [
        ({"best_checkpoint_metric": "bleu"}, {}, "best-checkpoint-metric"),
        ({"keep_best_metrics": ("a", "bleu")}, {}, "keep-best-metrics"),
        ({}, {"patience": 3, "patience_metric": "bleu"}, "patience-metric"),
        ({}, {"lr_scheduler": "plateau", "plateau_metric": "bleu"}, "plateau-metric"),
    ],
)
def test_an_unknown_metric_is_named_with_its_option(
    tmp_path: Path, checkpoints: dict[str, Any], optimization: dict[str, Any], name: str
) -> None:
    with pytest.raises(UserError, match=f"`{name}` must be one of loss, a, b, but is bleu"):
        run(tmp_path / "run", checkpoints, **optimization)


@pytest.mark.parametrize(
    ("optimization", "text"),
    [
        ({"patience_metric": "a"}, "`patience-metric` must go with `patience`"),
        ({"plateau_metric": "a"}, "`plateau-metric` must go with `lr-scheduler` plateau"),
    ],
)
def test_a_metric_that_nothing_follows_is_refused(
    tmp_path: Path, optimization: dict[str, Any], text: str
) -> None:
    with pytest.raises(UserError, match=text):
        run(tmp_path / "run", {}, **optimization)


def test_a_checkpoint_knows_all_that_was_measured_of_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(folder, {"save_interval_updates": 1, "keep_last": 99})
    checkpoints = CheckpointFolder(folder / "checkpoints")
    for number, update in enumerate(range(2, 13, 2)):
        record = json.loads((checkpoints.at(update) / MEASURED).read_text())
        assert record["update"] == update
        assert (record["metrics"]["a"], record["metrics"]["b"]) == (A[number], B[number])
        assert record["metrics"]["loss"] == records(folder, "valid")[number]["loss"]
        assert not (checkpoints.at(update - 1) / MEASURED).exists()  # was not validated
    assert checkpoints.load_state(12)[1]["progress"]["measured"]["4"]["b"] == B[1]
