"""The story of a run, told with a third task: it learns, stops, resumes as if never stopped, refuses others."""

import math
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.toy_run import assert_bit_equal, config, log, records, tensors, without_time
from support.toy_task import PointExamples, PointOptions, Points, PointTask
from torch import nn

from nmt.checkpoints.run_folder import CheckpointFolder
from nmt.data.options import BatchingOptions
from nmt.errors import UserError
from nmt.run.run_log import RunLog
from nmt.run.validation_history import Progress
from nmt.task import LossOutput
from nmt.train_loop import train

pytestmark = pytest.mark.usefixtures("points_plugin")


def test_a_task_that_is_not_about_sentences_learns(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result = train(config(folder, checkpoints={"best_checkpoint_metric": "accuracy"}))
    validations = records(folder, "valid")
    assert validations[-1]["accuracy"] > 0.95
    highest = max(validations, key=lambda record: (record["accuracy"], -record["update"]))
    assert result.best.resolve().name == f"update-{highest['update']:07d}"
    assert "finished: reached max-update 100" in log(folder)
    assert result.stopped_because == "reached max-update 100"
    assert [record for record in result.history if record["kind"] == "valid"] == validations
    # Batch norm's statistics are part of the model.
    assert tensors(folder, 100)["1.num_batches_tracked"] == 100


@pytest.mark.parametrize("stop", [5, 16, 37, 64], ids=["first epoch", "end of epoch", "mid-epoch", "epoch 4"])
def test_a_run_that_was_stopped_goes_on_as_if_it_never_was(tmp_path: Path, stop: int) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(config(whole))
    train(config(parts, optimization={"max_update": stop}))
    train(config(parts))
    assert_bit_equal(tensors(whole, 100), tensors(parts, 100))

    for kind in ("train", "epoch"):
        assert without_time(records(parts, kind)) == without_time(records(whole, kind))
    assert f"resume: from {parts}/checkpoints/update-{stop:07d}, update {stop}" in log(parts)


def test_lines_written_after_the_checkpoint_are_cut_back(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(config(folder, optimization={"max_update": 50}))
    with (folder / "metrics.jsonl").open("a") as file:  # as a process does that is killed before it saves
        file.write('{"kind": "train", "update": 60}\n{"kind": "tra')
    train(config(folder, optimization={"max_update": 60}))
    assert [record["update"] for record in records(folder, "train")] == [10, 20, 30, 40, 50, 60]


def test_lines_of_a_run_killed_before_its_first_checkpoint_are_cut_away(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"kind": "train", "update": 10}\n{"kind": "tra')
    train(config(folder, optimization={"max_update": 10}))
    assert [record["update"] for record in records(folder, "train")] == [10]


def test_two_processes_may_not_train_in_one_folder(tmp_path: Path) -> None:
    with closing(RunLog(tmp_path / "run", is_writer=True)) as other:
        other.open()
        with pytest.raises(UserError, match="another process is training there"):
            train(config(tmp_path / "run"))
    train(config(tmp_path / "run", optimization={"max_update": 1}))


def test_options_are_checked_from_python_too(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="`lr` must be above 0"):
        train(config(tmp_path / "run", optimization={"lr": -1.0}))
    assert not (tmp_path / "run").exists()


class DivergingTask(PointTask):
    """Its loss is not a number."""

    def compute_loss(self, model: nn.Module, batch: Points) -> LossOutput:
        output = super().compute_loss(model, batch)
        return LossOutput(output.loss * torch.nan, output.sums)


@dataclass(frozen=True)
class DivergingOptions(PointOptions):
    def build(self, assets: Path | None) -> PointTask:
        return DivergingTask()


def test_a_run_that_diverges_says_how_many_updates_were_cancelled(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(config(folder, task_options=DivergingOptions(), optimization={"max_update": 10}))
    (record,) = records(folder, "train")
    assert record["cancelled updates"] == 10 and "loss" not in record and record["grad"] is None


def test_a_parameter_without_a_gradient_is_no_hindrance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build_model(self: PointTask) -> nn.Module:
        model = nn.Sequential(nn.Linear(2, 8), nn.Linear(8, 2))
        model.register_parameter("unused", nn.Parameter(torch.ones(1)))
        return model

    monkeypatch.setattr(PointTask, "build_model", build_model)
    for max_update in (5, 10):
        train(config(tmp_path / "run", optimization={"max_update": max_update}))
    assert tensors(tmp_path / "run", 10)["unused"] == 1


class LongPointTask(PointTask):
    """Its examples have a length of 7."""

    def open_split(self, split: str) -> PointExamples:
        examples = super().open_split(split)
        examples.sizes *= 7
        return examples


@dataclass(frozen=True)
class LongPointOptions(PointOptions):
    def build(self, assets: Path | None) -> PointTask:
        return LongPointTask()


def test_a_run_whose_examples_are_all_too_long_ends_with_a_line(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"task_options": LongPointOptions(), "batching": BatchingOptions(max_tokens=6)}
    for dry_run in (True, False):
        with pytest.raises(UserError, match=r"but is 6 and all \(500\) are longer"):
            train(config(tmp_path / "run", dry_run=dry_run, **settings))


def test_a_finished_run_says_so_and_changes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(config(folder, optimization={"max_update": 20}))
    before = {path: path.read_bytes() for path in (folder / "checkpoints").rglob("*") if path.is_file()}
    train(config(folder, optimization={"max_update": 20}))
    assert {p: p.read_bytes() for p in (folder / "checkpoints").rglob("*") if p.is_file()} == before
    losses = {record["update"]: record["loss"] for record in records(folder, "valid")}
    best = min(losses, key=losses.__getitem__)
    path = folder / "checkpoints" / "best"
    assert (
        log(folder)
        .rstrip()
        .endswith(
            f"finished: reached max-update 20 | best loss {losses[best]:.4g} after update {best}: {path} | "
            f"next: nmt-validate {path}"
        )
    )


def test_the_newest_and_the_best_checkpoints_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(config(folder, checkpoints={"keep_last": 2, "keep_best": 2, "save_interval_updates": 10}))
    losses = {record["update"]: record["loss"] for record in records(folder, "valid")}
    best = sorted(losses, key=lambda update: losses[update])[:2]
    saved = sorted({*range(10, 101, 10), *losses})
    assert CheckpointFolder(folder / "checkpoints").updates() == sorted({*saved[-2:], *best})


def test_what_may_not_change_is_named_and_what_may_is_taken(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(config(folder, optimization={"max_update": 20}))
    with pytest.raises(UserError, match=r"`slope` may not change .* it was 2\.0 .*, but is 3\.0"):
        train(config(folder, task_options=PointOptions(slope=3.0)))
    with pytest.raises(UserError, match="`seed` may not change"):
        train(config(folder, seed=2))
    with pytest.raises(UserError, match="`best-checkpoint-metric` may not change"):
        train(config(folder, checkpoints={"best_checkpoint_metric": "accuracy"}))
    with pytest.raises(UserError, match="`optimizer` may not change"):
        train(config(folder, optimization={"optimizer": "adamw"}))
    classes = folder / "checkpoints" / "update-0000020" / "classes.txt"
    classes.write_text("left\nright\n")
    with pytest.raises(UserError, match=r"classes\.txt.*differs"):
        train(config(folder))
    classes.write_text("below\nabove\n")
    train(
        config(folder, optimization={"max_update": 25, "lr": 0.01}, batching=BatchingOptions(batch_size=50))
    )
    assert records(folder, "valid")[-1]["update"] == 25


def test_an_unknown_metric_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="one of loss, accuracy, but is bleu"):
        train(config(tmp_path / "run", checkpoints={"best_checkpoint_metric": "bleu"}))


def test_the_first_of_equals_is_best_and_what_is_not_a_number_never() -> None:
    progress = Progress()
    for update, value in [(1, math.nan), (2, 2.0), (3, 2.0), (4, 2.5)]:
        progress.note(update, value, better="min")
    assert progress.ranking("min") == [2, 3, 4, 1] and progress.num_without_better == 2
    progress.note(5, 1.0, better="min")
    assert progress.ranking("min")[0] == 5 and progress.num_without_better == 0
    progress.note(6, math.nan, better="min")
    assert progress.num_without_better == 1
    assert progress.ranking("max") == [4, 2, 3, 5, 1, 6]
