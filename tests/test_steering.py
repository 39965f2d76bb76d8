"""What steers a run: averaged weights, plateaus, stops, what is kept, and what follows bad updates."""

import json
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.toy_run import assert_bit_equal, config, log, records, tensors, without_time
from support.toy_task import PointOptions, Points, PointTask
from torch import nn

from nmt.checkpoints.run_folder import CheckpointFolder
from nmt.cli import average, validate
from nmt.errors import UserError
from nmt.task import LossOutput
from nmt.train_loop import train

pytestmark = pytest.mark.usefixtures("points_plugin")

EVERY_UPDATE = {"keep_every_updates": 1}


def updates(folder: Path) -> list[int]:
    return CheckpointFolder(folder / "checkpoints").updates()


def weights_at(folder: Path, update: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The model of a checkpoint, and the weights that were being trained."""
    path = CheckpointFolder(folder / "checkpoints").at(update)
    optimizer = load_file(path / "optimizer.safetensors")
    trained = {
        name.removesuffix(".trained"): tensor
        for name, tensor in optimizer.items()
        if name.endswith(".trained")
    }
    return load_file(path / "model.safetensors"), trained


def test_the_averaged_weights_are_the_running_mean_of_those_trained(tmp_path: Path) -> None:
    plain, averaged = tmp_path / "plain", tmp_path / "averaged"
    train(config(plain, optimization={"max_update": 12}, checkpoints=EVERY_UPDATE))
    train(config(averaged, optimization={"max_update": 12, "ema_decay": 0.6}, checkpoints=EVERY_UPDATE))
    mean = None
    for update in range(1, 13):
        model, trained = weights_at(averaged, update)
        # Averaging changes nothing about what is averaged.
        assert_bit_equal(trained, weights_at(plain, update)[0])
        if mean is not None:
            # The decay comes into force when (1 + n) / (10 + n) has reached it: from update 13 on.
            decay = min(0.6, (1 + update) / (10 + update))
            for name, value in trained.items():
                expected = decay * mean[name] + (1 - decay) * value if value.is_floating_point() else value
                torch.testing.assert_close(model[name], expected, rtol=1e-5, atol=1e-7)
        mean = model


def test_what_is_validated_are_the_averaged_weights(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    best = train(config(folder, optimization={"max_update": 40, "ema_decay": 0.9})).best
    task = PointTask()
    model = task.build_model()
    model.load_state_dict(load_file(best / "model.safetensors"))
    examples = task.open_split("valid")
    with torch.no_grad():
        output = task.compute_loss(
            model.eval(), examples.collate([examples[i] for i in range(len(examples))])
        )
    update = int(best.resolve().name.removeprefix("update-"))
    (record,) = [record for record in records(folder, "valid") if record["update"] == update]
    assert record["loss"] == pytest.approx(output.loss.item() / len(examples), rel=1e-5)


@pytest.mark.parametrize(
    "optimization",
    [
        {"ema_decay": 0.9},
        {"optimizer": "sgd", "lr": 0.5, "decay_matrices_only": True, "weight_decay": 0.01},
        {"optimizer": "sgd", "lr": 0.5, "momentum": 0.0},
        {"optimizer": "adafactor", "lr": 0.05},
        {"lr_scheduler": "plateau", "lr_patience": 0, "lr_shrink": 0.5, "lr_threshold": 0.3},
        {"lr_scheduler": "cosine", "lr_unit": "epoch", "max_epoch": 7},
    ],
    ids=["ema", "sgd", "sgd without momentum", "adafactor", "plateau", "cosine by epoch"],
)
def test_a_run_of_any_kind_goes_on_as_if_it_never_stopped(
    tmp_path: Path, optimization: dict[str, Any]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(config(whole, optimization=optimization))
    # A limit in hours stops it where the first report is, and changes nothing of the schedule.
    train(config(parts, optimization={**optimization, "stop_time_hours": 1e-9}))
    assert updates(parts) == [10]
    train(config(parts, optimization=optimization))
    assert_bit_equal(tensors(whole, 100), tensors(parts, 100))
    for kind in ("train", "epoch"):
        assert without_time(records(parts, kind)) == without_time(records(whole, kind))


def test_a_plateau_lowers_the_rate_after_the_validations_that_were_no_better(tmp_path: Path) -> None:
    """Adam at a rate of nothing stands still, so that no validation is better than the first by 90%."""
    optimization = {
        "lr_scheduler": "plateau",
        "lr_patience": 1,
        "lr_threshold": 0.9,
        "lr_shrink": 0.5,
        "lr": 1e-6,
        "warmup_updates": 0,
        "max_update": 16 * 6,
    }
    train(config(tmp_path / "run", log_interval=16, optimization=optimization))
    rates = [record["lr"] for record in records(tmp_path / "run", "train")]
    # Validations 2 and 3 are the first two without a better one: the fourth epoch has half the rate.
    assert rates == pytest.approx([1e-6, 1e-6, 1e-6, 5e-7, 5e-7, 2.5e-7])


def test_a_run_without_warm_up_does_not_take_its_first_rate_for_fallen(tmp_path: Path) -> None:
    """0.02 (1 + cos(pi (n - 1) / 100)) / 2 <= 0.019 from n - 1 = 14.4 on."""
    schedule = {"lr_scheduler": "cosine", "warmup_updates": 0, "stop_min_lr": 0.019}
    train(config(tmp_path / "run", optimization=schedule))
    assert updates(tmp_path / "run")[-1] == 16


def test_time_counts_on_from_where_the_run_was_stopped(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(config(folder, optimization={"max_update": 5}))
    state_path = CheckpointFolder(folder / "checkpoints").at(5) / "state.json"
    state = json.loads(state_path.read_text())
    assert 0 < state["clock"]["seconds_before"] < 60
    state["clock"]["seconds_before"] = 7200.0
    state_path.write_text(json.dumps(state))
    train(config(folder, optimization={"stop_time_hours": 2.0}))
    assert "finished: reached stop-time-hours 2 | " in log(folder).splitlines()[-1]
    assert updates(folder)[-1] == 5
    train(config(folder, optimization={"stop_time_hours": 3.0, "max_update": 10}))
    assert updates(folder)[-1] == 10


def test_a_run_that_is_out_of_time_says_so_again_and_changes_nothing(tmp_path: Path) -> None:
    folder, options = tmp_path / "run", {"stop_time_hours": 1e-9}
    train(config(folder, optimization=options))
    before = updates(folder), (folder / "metrics.jsonl").read_bytes()
    train(config(folder, optimization=options))
    assert (updates(folder), (folder / "metrics.jsonl").read_bytes()) == before
    assert log(folder).count("finished: reached stop-time-hours") == 2


def test_what_is_kept_for_good_outlives_newer_checkpoints(tmp_path: Path) -> None:
    options = {"keep_last": 1, "validate_interval": 100, "keep_every_epochs": 1, "keep_from_epoch": 2}
    train(config(tmp_path / "run", optimization={"max_update": 50}, checkpoints=options))  # 16 an epoch
    assert updates(tmp_path / "run") == [32, 48, 50]
    with pytest.raises(UserError, match="`keep-from-epoch` must go with"):
        train(config(tmp_path / "none", checkpoints={"keep_from_epoch": 2}))


class PoisonedTask(PointTask):
    """Its loss is not a number where a certain example is in the batch."""

    def __init__(self, poison: float) -> None:
        self.poison = poison

    def compute_loss(self, model: nn.Module, batch: Points) -> LossOutput:
        output = super().compute_loss(model, batch)
        is_poisoned = model.training and (batch.xy == self.poison).any()
        return LossOutput(output.loss * (torch.nan if is_poisoned else 1.0), output.sums)


@dataclass(frozen=True)
class PoisonedOptions(PointOptions):
    example: int = 77

    def build(self, assets: Path | None) -> PointTask:
        return PoisonedTask(float(PointTask().open_split("train").xy[self.example, 0]))


def test_a_cancelled_update_names_the_examples_of_its_batch(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(config(folder, task_options=PoisonedOptions(), optimization={"max_update": None, "max_epoch": 1}))
    (line,) = [line for line in log(folder).splitlines() if "cancelled: the gradient" in line]
    shown, _, rest = line.partition("training examples ")[2].partition(" and ")
    named = [int(number) for number in shown.split()]
    assert len(named) == 20 and rest == "12 more"  # of a batch of 32
    assert 77 in named or named[-1] < 77  # they are in order
    (record,) = records(folder, "epoch")
    assert record["cancelled updates"] == 1
    assert all(tensor.isfinite().all() for tensor in tensors(folder, 16).values())


class LateTask(PointTask):
    """Its loss is not a number once the weights have moved far enough, as when a rate is too high."""

    def __init__(self, reach: float) -> None:
        self.reach = reach

    def build_model(self) -> nn.Module:
        model = super().build_model()
        self.start = model[0].weight.detach().clone()
        return model

    def compute_loss(self, model: nn.Module, batch: Points) -> LossOutput:
        output = super().compute_loss(model, batch)
        far = model.training and (model[0].weight - self.start).abs().max() > self.reach
        return LossOutput(output.loss * (torch.nan if far else 1.0), output.sums)


@dataclass(frozen=True)
class LateOptions(PointOptions):
    reach: float = 0.3

    def build(self, assets: Path | None) -> PointTask:
        return LateTask(self.reach)


def test_after_too_many_bad_updates_the_run_goes_back_and_halves_its_rate(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    optimization = {"max_bad_updates": 3, "max_update": 60, "lr": 0.05}
    settings: dict[str, Any] = {"task_options": LateOptions(), "optimization": optimization}
    with pytest.raises(UserError, match=r"not in 3 updates in a row, with 0\.03125 of the learning rate too"):
        train(config(folder, checkpoints={"save_interval_updates": 5}, **settings))
    back = records(folder, "back")
    assert back and back[-1]["lr scale"] == 2.0**-5
    scales = [record["lr scale"] for record in back]
    assert scales == sorted(scales, reverse=True)
    # It can be taken up where it was, with a loss that is a number: nothing was lost.
    assert all(tensor.isfinite().all() for tensor in tensors(folder, updates(folder)[-1]).values())


@pytest.mark.parametrize("keep_last", [2, 60])
def test_the_checkpoint_it_goes_back_to_is_one_from_which_an_update_was_made(
    tmp_path: Path, keep_last: int
) -> None:
    """Those that were saved among bad updates, or right before them, hold the weights that these are bad for."""
    folder = tmp_path / "run"
    optimization = {"max_bad_updates": 3, "max_update": 60, "lr": 0.05}
    checkpoints = {"save_interval_updates": 1, "keep_last": keep_last}
    with suppress(UserError):  # in the end it may have tried too often
        train(config(folder, task_options=LateOptions(), optimization=optimization, checkpoints=checkpoints))
    bad: list[int] = []
    backs = []
    for line in log(folder).splitlines():
        if found := re.search(r"update (\d+) cancelled", line):
            bad.append(int(found[1]))
        elif found := re.search(r" back \| update (\d+) ", line):
            first = bad[-1]
            while first - 1 in bad:
                first -= 1
            backs.append(int(found[1]))
            assert backs[-1] == max(first - 2, 0)
            bad.clear()
    assert backs
    # Checkpoints of the part that it has gone back behind are no more, or they would be taken up and kept.
    folder_of_checkpoints = CheckpointFolder(folder / "checkpoints")
    for update in folder_of_checkpoints.updates():
        lr_scale = folder_of_checkpoints.load_state(update)[1]["trainer"]["lr_scale"]
        assert (lr_scale == 1.0) == (update <= min(backs))


def test_without_a_checkpoint_of_earlier_weights_the_run_ends_with_a_line(tmp_path: Path) -> None:
    """Weights that give no finite gradient give none at any learning rate."""
    options = LateOptions(reach=0.01)  # which the second update goes beyond
    checkpoints = {"save_interval_updates": 1, "keep_last": 1}
    with pytest.raises(UserError, match="not in 3 updates in a row, and no checkpoint is of earlier weights"):
        train(
            config(
                tmp_path / "run",
                task_options=options,
                optimization={"max_bad_updates": 3},
                checkpoints=checkpoints,
            )
        )
    assert records(tmp_path / "run", "back") == []


def test_bad_updates_before_the_first_checkpoint_end_the_run_with_a_line(tmp_path: Path) -> None:
    options = LateOptions(reach=0.01)
    with pytest.raises(UserError, match="not in 3 updates in a row, before the first checkpoint"):
        train(config(tmp_path / "run", task_options=options, optimization={"max_bad_updates": 3}))


def test_the_best_checkpoints_can_be_averaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    train(config(folder, checkpoints={"keep_best": 3, "keep_last": 1}))
    validations = sorted(records(folder, "valid"), key=lambda record: (record["loss"], record["update"]))
    best = sorted(record["update"] for record in validations[:3])
    average.main([str(folder / "checkpoints"), "--best", "3", "--output", str(tmp_path / "mean")])
    assert capsys.readouterr().out.endswith(f"the mean of updates {', '.join(map(str, best))}\n")
    found = load_file(tmp_path / "mean" / "model.safetensors")["3.bias"]
    expected = torch.stack([weights_at(folder, update)[0]["3.bias"] for update in best]).mean(0)
    torch.testing.assert_close(found, expected)
    for arguments, text in (
        (["--best", "9"], "must hold at least 9 validated checkpoints, but holds"),
        (["--best", "2", "--last", "2"], "must be left out"),
    ):
        with pytest.raises(SystemExit):
            average.main([str(folder / "checkpoints"), *arguments, "--output", str(tmp_path / "other")])
        assert text in capsys.readouterr().err
    average.main([str(folder), "--best", "3", "--output", str(tmp_path / "same")])
    assert_bit_equal(
        load_file(tmp_path / "same/model.safetensors"), load_file(tmp_path / "mean/model.safetensors")
    )
    capsys.readouterr()
    for other in (tmp_path / "mean", tmp_path / "nowhere"):
        with pytest.raises(SystemExit):
            average.main([str(other), "--last", "2", "--output", str(tmp_path / "other")])
        assert f"`{other}` must be a run or its `checkpoints` folder" in capsys.readouterr().err


def test_a_model_folder_can_be_measured_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """nmt-validate says what the run said, in other batches too; the split and other options can be given."""
    folder = tmp_path / "run"
    best = train(config(folder, optimization={"max_update": 30})).best
    update = int(best.resolve().name.removeprefix("update-"))
    (said,) = [record for record in records(folder, "valid") if record["update"] == update]
    capsys.readouterr()
    for options in ([], ["--batch-size", "7"], ["--split=valid"]):
        validate.main([str(best), *options])
        found = json.loads(capsys.readouterr().out)
        assert found.pop("split") == "valid"
        assert found == pytest.approx({name: said[name] for name in ("loss", "accuracy")}, rel=1e-6)
    validate.main([str(best), "--split", "train"])
    assert json.loads(capsys.readouterr().out)["split"] == "train"
    for arguments, text in (
        ([], "MODEL must be named first"),
        (["--split", "test", str(best)], "MODEL must be named first"),
        ([str(best), "--split"], "`--split` must have a value"),
        ([str(tmp_path)], "must be a model folder, but has no model.safetensors"),
        ([str(best), "--batch-sise", "7"], "Perhaps you meant `--batch-size`?"),
    ):
        with pytest.raises(SystemExit) as error:
            validate.main(arguments)
        assert error.value.code == 2 and text in capsys.readouterr().err
