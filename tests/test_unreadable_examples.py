"""Examples that cannot be read end a run: before its first update where that can be known, and nothing is lost."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.toy_run import assert_bit_equal, config, log, records, tensors, without_time
from support.toy_task import PointExamples, PointOptions, PointTask

from nmt.checkpoints.run_folder import CheckpointFolder
from nmt.errors import UserError
from nmt.options import TrainConfig
from nmt.train_loop import train

pytestmark = pytest.mark.usefixtures("points_plugin")


class DamagedExamples(PointExamples):
    """Has one that cannot be read."""

    def __getitem__(self, index: int) -> np.ndarray:
        if index == 17:
            raise UserError("`17` must be a point, but is none. Restore it.")
        return super().__getitem__(index)


def refusal(settings: TrainConfig[PointOptions], *, damaged: str = "") -> str:
    """Return how a run ends where a split has an example that cannot be read."""

    def open_split(self: PointTask, split: str) -> PointExamples:
        kind = DamagedExamples if split == damaged else PointExamples
        return kind({"train": 500, "valid": 101}[split], seed=len(split))

    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError) as caught:
        patch.setattr(PointTask, "open_split", open_split)
        train(settings)
    return str(caught.value)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_what_has_been_learned_before_a_training_example_that_cannot_be_read_is_saved(
    tmp_path: Path, seed: int
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(config(whole, seed=seed, optimization={"max_update": 20}))
    text = refusal(config(parts, seed=seed, optimization={"max_update": 20}), damaged="train")
    saved = CheckpointFolder(parts / "checkpoints").updates()
    if saved:  # the example was not in the first update
        where = f"Update {saved[-1]} is saved, and the same command goes on from there."
        assert text == f"`17` must be a point, but is none. Restore it. {where}"
    again = refusal(config(parts, seed=seed, optimization={"max_update": 20}), damaged="train")
    assert again == text  # nothing is lost, and nothing is made twice
    train(config(parts, seed=seed, optimization={"max_update": 20}))
    assert_bit_equal(tensors(whole, 20), tensors(parts, 20))
    for kind in ("train", "epoch", "valid"):
        assert without_time(records(parts, kind)) == without_time(records(whole, kind))


@pytest.mark.parametrize(
    "due", [{"validate_interval": 1}, {"validate_interval": 100, "validate_interval_updates": 8}]
)
def test_what_has_been_learned_before_a_validation_example_that_cannot_be_read_is_saved(
    tmp_path: Path, due: dict[str, int]
) -> None:
    """The validation that failed is made when the run is taken up."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = {"optimization": {"max_update": 34}, "checkpoints": due}
    train(config(whole, **settings))
    text = refusal(config(parts, **settings), damaged="valid")
    (update,) = CheckpointFolder(parts / "checkpoints").updates()
    assert update == (16 if "validate_interval_updates" not in due else 8)
    assert f"Update {update} is saved" in text and not records(parts, "valid")
    train(config(parts, **settings))
    assert_bit_equal(tensors(whole, 34), tensors(parts, 34))
    for kind in ("train", "epoch", "valid"):
        assert without_time(records(parts, kind)) == without_time(records(whole, kind))


def test_a_last_validation_that_fails_is_made_up_for(tmp_path: Path) -> None:
    settings = {"optimization": {"max_update": 5}}
    refusal(config(tmp_path, **settings), damaged="valid")
    assert CheckpointFolder(tmp_path / "checkpoints").updates() == [5]
    train(config(tmp_path, **settings))
    assert [record["update"] for record in records(tmp_path, "valid")] == [5]


class LookingTask(PointTask):
    """Looks over its data."""

    def look_over(self, train: Any, valid: Any, world: Any) -> list[str]:
        if len(valid) > 101:
            raise UserError("`valid` must be small.")
        return [f"warning: {len(train)} points to learn and {len(valid)} others on {world.size} rank"]


@dataclass(frozen=True)
class LookingOptions(PointOptions):
    """Make a task that looks over its data."""

    def build(self, assets: Path | None) -> PointTask:
        return LookingTask()


def test_a_task_may_look_at_its_data_before_the_first_update(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = "warning: 500 points to learn and 101 others on 1 rank"
    looking = {"task_options": LookingOptions(), "optimization": {"max_update": 1}}
    train(config(tmp_path, **looking, dry_run=True))
    assert line in capsys.readouterr().out.splitlines()
    train(config(tmp_path, **looking))
    assert line in log(tmp_path)
    monkeypatch.setattr(PointExamples, "__len__", lambda self: 102)
    assert refusal(config(tmp_path / "other", **looking)) == "`valid` must be small."
    assert not (tmp_path / "other" / "checkpoints").exists()
