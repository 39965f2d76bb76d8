"""TensorBoard's event files, read back with its own reader."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.ranks import run_ranks
from support.toy_run import config, records
from support.toy_task import PointTask
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nmt.checkpoints.run_folder import CheckpointFolder
from nmt.distributed import World
from nmt.errors import UserError
from nmt.run.opening import open_run
from nmt.run.run_log import RunLog
from nmt.system.signals import StopRequest
from nmt.train_loop import train, train_run

pytestmark = pytest.mark.usefixtures("points_plugin")


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(
        str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0}
    )
    return found.Reload()


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events(folder).Scalars(tag)]


def recorded(folder: Path, kind: str, name: str) -> list[tuple[int, float]]:
    """Return what metrics.jsonl says, in the float32 that TensorBoard keeps."""
    return [(record["update"], float(np.float32(record[name]))) for record in records(folder, kind)]


def test_every_report_is_there_with_its_numbers(tmp_path: Path) -> None:
    train(config(tmp_path, tensorboard=True))
    for kind, name, tag in [
        ("train", "loss", "train/loss"),
        ("train", "lr", "train/lr"),
        ("train", "grad", "train/grad"),
        ("train", "targets/s", "train/targets per s"),
        ("valid", "accuracy", "valid/accuracy"),
        ("valid", "best loss", "valid/best loss"),
        ("epoch", "loss", "epoch/loss"),
    ]:
        expected = recorded(tmp_path, kind, name)
        assert len(expected) > 5 and scalars(tmp_path, tag) == expected
    assert not {"train/update", "train/epoch"} & set(events(tmp_path).Tags()["scalars"])


def test_what_the_task_illustrates_is_there_after_each_validation(tmp_path: Path) -> None:
    train(config(tmp_path, tensorboard=True))
    steps = [record["update"] for record in records(tmp_path, "valid")]
    found = events(tmp_path)
    texts = found.Tensors("classes/text_summary")
    assert [text.step for text in texts] == steps
    assert texts[0].tensor_proto.string_val == [b"below, *above*"]
    images = found.Images("plane")
    assert [image.step for image in images] == steps
    assert (images[0].height, images[0].width) == (4, 6)


def test_a_run_that_was_killed_and_resumed_shows_each_update_once(tmp_path: Path) -> None:
    train(config(tmp_path, tensorboard=True, optimization={"max_update": 50}))
    # As if it had been killed after update 50 without having saved since the third validation.
    checkpoints = CheckpointFolder(tmp_path / "checkpoints")
    assert checkpoints.updates() == [16, 32, 48, 50]
    for update in (48, 50):
        shutil.rmtree(checkpoints.at(update))
    train(config(tmp_path, tensorboard=True, optimization={"max_update": 60}))
    assert [step for step, _ in scalars(tmp_path, "train/loss")] == [10, 20, 30, 40, 50, 60]
    assert [step for step, _ in scalars(tmp_path, "epoch/loss")] == [16, 32, 48]
    assert [step for step, _ in scalars(tmp_path, "valid/loss")] == [16, 32, 48, 60]
    assert [image.step for image in events(tmp_path).Images("plane")] == [16, 32, 48, 60]


def test_a_run_killed_before_its_first_checkpoint_begins_anew(tmp_path: Path) -> None:
    train(config(tmp_path, tensorboard=True, optimization={"max_update": 15}))
    shutil.rmtree(tmp_path / "checkpoints")
    train(config(tmp_path, tensorboard=True, optimization={"max_update": 10}))
    assert [step for step, _ in scalars(tmp_path, "train/loss")] == [10]
    assert [step for step, _ in scalars(tmp_path, "valid/loss")] == [10]


def test_at_a_checkpoint_all_before_it_has_left_the_process(tmp_path: Path) -> None:
    log = RunLog(tmp_path, is_writer=True, tensorboard=True)
    log.open()
    log.cut_records(0, update=0)
    log.report("train", {"update": 7, "loss": 0.5})
    log.records_size()  # asked for when a checkpoint is written
    assert scalars(tmp_path, "train/loss") == [(7, 0.5)]
    log.close()


def test_without_the_option_nothing_is_written_or_illustrated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(PointTask, "illustrate")
    train(config(tmp_path, optimization={"max_update": 5}))
    assert not (tmp_path / "tensorboard").exists()


def test_rank_0_alone_writes_what_rank_0_illustrates(tmp_path: Path) -> None:
    run_ranks(_train_on_rank, tmp_path, size=2)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    assert len(scalars(tmp_path, "train/loss")) == 2
    assert (
        json.loads((tmp_path / "calls-0").read_text()) == json.loads((tmp_path / "calls-1").read_text()) > 0
    )


def _train_on_rank(world: World, folder: Path) -> None:
    run = open_run(config(folder, tensorboard=True, optimization={"max_update": 20}), world, StopRequest())
    calls = []
    illustrate = run.task.illustrate
    run.task.illustrate = lambda *args: calls.append(args) or illustrate(*args)  # type: ignore[method-assign]
    train_run(run)
    run.close()
    (folder / f"calls-{world.rank}").write_text(str(len(calls)))


@pytest.mark.parametrize("is_writer", [True, False])
def test_without_the_package_every_rank_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_writer: bool
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(
        UserError, match=r"`tensorboard` must have .* not installed\. Run pip install tensorboard"
    ):
        RunLog(tmp_path, is_writer=is_writer, tensorboard=True)
    RunLog(tmp_path, is_writer=is_writer)


def test_training_imports_no_tensorboard_unless_it_is_asked_for() -> None:
    code = "import sys, nmt.train_loop\nsys.exit('tensorboard' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
