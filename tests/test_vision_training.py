"""Training on images through the whole stack: it learns, resumes bit for bit, and ranks change nothing."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.image_files import bars, write_folders, write_idx
from support.image_run import WITH_BATCH_NORM, config

from nmt.checkpoints.model_folder import load_model
from nmt.cli.average import main as average
from nmt.cli.train import main
from nmt.cli.validate import main as validate
from nmt.config.fields import list_options
from nmt.config.mapping import parse_command
from nmt.data.batch_iterator import BatchIterator
from nmt.data.options import BatchingOptions
from nmt.errors import UserError
from nmt.options import TrainConfig
from nmt.train_loop import train
from nmt.vision.models import build_model
from nmt.vision.options import AugmentationOptions, ImageClassificationOptions
from nmt.vision.sources import FolderImages

# This machine may have fewer cores than the tests have workers.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

BIN = Path(sys.executable).parent
RECIPES = Path(__file__).parent.parent / "examples" / "image_classification"
SIZES = {"num_classes": 3, "num_channels": 3, "image_size": 32}
WITHOUT_BATCH_NORM = {
    "model": "timm/test_vit",
    "model_args": ("img_size=16", "patch_size=8"),
    "image_size": 16,
}
ALL_AUGMENTATION = AugmentationOptions(
    crop="resized", hflip=0.5, rand_augment=9, random_erasing=0.5, mixup=0.2, cutmix=1.0
)


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Return 20 training and 7 validation images of three colours."""
    return {
        "train_dir": write_folders(tmp_path / "train", {"red": 8, "green": 6, "blue": 6}),
        "val_dir": write_folders(tmp_path / "val", {"red": 3, "green": 2, "blue": 2}),
    }


def last(save_dir: Path) -> dict[str, torch.Tensor]:
    folder = save_dir / "checkpoints" / "last"
    return {**load_file(folder / "model.safetensors"), **load_file(folder / "optimizer.safetensors")}


def damage_in_the_middle(path: Path) -> Path:
    """Damage a file where a look at its head and its end does not see it."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 20] = b"x" * 20
    path.write_bytes(content)
    return path


def records(save_dir: Path, kind: str) -> list[dict[str, Any]]:
    lines = (save_dir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def assert_bit_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def run(*arguments: object, command: str = "nmt-train") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [BIN / command, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=300
    )


def test_the_command_learns_colours_and_its_best_checkpoint_is_a_model(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    save_dir = tmp_path / "run"
    done = run(
        *(
            "--task",
            "image_classification",
            "--train-dir",
            folders["train_dir"],
            "--val-dir",
            folders["val_dir"],
        ),
        *("--model", "timm/test_byobnet", "--image-size", 32, "--batch-size", 5, "--lr", 0.02),
        *("--max-epoch", 12, "--save-dir", save_dir, "--device", "cpu"),
    )
    assert done.returncode == 0, done.stderr
    values = [record["accuracy"] for record in records(save_dir, "valid")]
    assert len(values) == 12 and max(values) > 0.8
    best = save_dir / "checkpoints" / "best"
    assert best.resolve().name == f"update-{4 * (values.index(max(values)) + 1):07d}"
    # The model folder is enough to classify with.
    folders["train_dir"].rename(tmp_path / "gone")
    model, task = load_model(best)
    examples = task.open_split("valid")
    batch = examples.collate([examples[index] for index in range(7)])
    with torch.no_grad():
        right = (model(batch.images).argmax(dim=1) == batch.labels).float().mean()
    assert right.item() == pytest.approx(max(values))


def test_mnists_files_are_learned(tmp_path: Path) -> None:
    write_idx(tmp_path / "data", "train", *bars(200), gz=True)
    write_idx(tmp_path / "data", "t10k", *bars(50, seed=1), gz=True)
    digits = {"train_dir": tmp_path / "data", "val_dir": tmp_path / "data"}
    task = {"image_size": None, "model": "timm/resnet10t", "model_args": ("channels=[8,8,16,16]",)}
    settings = config(
        tmp_path / "run", digits, task=task, batching={"batch_size": 20}, optimization={"max_epoch": 5}
    )
    train(settings)
    assert max(record["accuracy"] for record in records(tmp_path / "run", "valid")) > 0.9


def test_the_defaults_of_the_task_go_together_and_with_other_choices() -> None:
    options = {option.name: option for option in list_options(TrainConfig[ImageClassificationOptions])}
    assert options["best_checkpoint_metric"].default == "accuracy"
    assert options["required_batch_size_multiple"].default == 1 and options["max_tokens"].default is None
    arguments = [
        "--task",
        "image_classification",
        "--train-dir",
        "lost",
        "--val-dir",
        "lost",
        "--save-dir",
        "x",
    ]
    for choice in ([], ["--optimizer", "adamw"], ["--lr-scheduler", "constant"], ["--warmup-epochs", "2"]):
        parsed = parse_command(
            TrainConfig[ImageClassificationOptions], [*arguments, *choice], prog="nmt-train", description=""
        )
        assert parsed.batching.batch_size == 128 and parsed.optimization.max_epoch == 90


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_are_accepted_and_name_models_that_exist(recipe: Path) -> None:
    arguments = ["--config", str(recipe), "--train-dir", "a", "--val-dir", "b", "--save-dir", "c"]
    parsed = parse_command(
        TrainConfig[ImageClassificationOptions], arguments, prog="nmt-train", description=""
    )
    options = parsed.task_options
    size = options.image_size or 28  # MNIST's
    model = build_model(options.model, options.model_args, num_classes=3, num_channels=1, image_size=size)
    assert parsed.task == "image_classification" and sum(p.numel() for p in model.parameters()) < 10**7


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stopped_run_goes_on_bit_for_bit_with_all_augmentation(
    folders: dict[str, Path], tmp_path: Path, num_workers: int
) -> None:
    """Three updates an epoch: the runs are stopped within the first and within the second one."""

    def settings(name: str, max_update: int, workers: int) -> TrainConfig[ImageClassificationOptions]:
        return config(
            tmp_path / name,
            folders,
            task={"augmentation": ALL_AUGMENTATION},
            batching={"num_workers": workers},
            optimization={"max_update": max_update},
        )

    train(settings("whole", 7, 0))
    for max_update in (2, 4, 7):
        train(settings("parts", max_update, num_workers))
    assert_bit_equal(last(tmp_path / "whole"), last(tmp_path / "parts"))
    assert [r["loss"] for r in records(tmp_path / "whole", "train")] == [
        r["loss"] for r in records(tmp_path / "parts", "train")
    ]


def test_augmentation_differs_from_epoch_to_epoch(folders: dict[str, Path], tmp_path: Path) -> None:
    """With a learning rate of almost nothing the loss of an epoch would repeat itself."""
    task = WITHOUT_BATCH_NORM | {"augmentation": AugmentationOptions(crop="resized")}
    train(config(tmp_path / "run", folders, task=task, optimization={"max_epoch": 2, "lr": 1e-12}))
    first, second = (record["loss"] for record in records(tmp_path / "run", "epoch"))
    assert first != pytest.approx(second, rel=1e-6)


def test_two_ranks_with_uneven_batches_do_what_one_rank_does(tmp_path: Path) -> None:
    """20 images are a batch for one rank, and 13 + 7 for two; 31 are validated as 20 + 11, or as 13 + 13 + 5."""
    folders = {
        "train_dir": write_folders(tmp_path / "train", {"red": 8, "green": 6, "blue": 6}),
        "val_dir": write_folders(tmp_path / "val", {"red": 11, "green": 10, "blue": 10}),
    }
    arguments = [
        *(
            "--task",
            "image_classification",
            "--train-dir",
            folders["train_dir"],
            "--val-dir",
            folders["val_dir"],
        ),
        *("--model", "timm/test_vit", "--model-args", "img_size=16", "patch_size=8", "--image-size", 16),
        *("--crop", "none", "--hflip", 0, "--lr", 0.5, "--lr-scheduler", "constant", "--max-update", 1),
        *("--device", "cpu", "--log-interval", 1),
    ]
    one = run(*arguments, "--batch-size", 20, "--save-dir", tmp_path / "one")
    assert one.returncode == 0, one.stderr
    launch = ["--standalone", "--nproc-per-node", 2, "-m", "nmt.cli.train"]
    two = run(*launch, *arguments, "--batch-size", 13, "--save-dir", tmp_path / "two", command="torchrun")
    assert two.returncode == 0, two.stderr

    whole, dealt = last(tmp_path / "one"), last(tmp_path / "two")
    torch.manual_seed(1)  # the seed of both runs
    model = ImageClassificationOptions(**folders, **WITHOUT_BATCH_NORM).build(None).build_model()
    fresh = dict(model.named_parameters())
    assert whole.keys() == dealt.keys() >= fresh.keys()
    assert max((whole[name] - value).abs().max().item() for name, value in fresh.items()) > 0.01
    for name in whole:
        torch.testing.assert_close(dealt[name], whole[name], rtol=1e-5, atol=1e-6)
    for kind in ("train", "valid"):
        (alone,), (together,) = (records(tmp_path / name, kind) for name in ("one", "two"))
        assert together["accuracy"] == alone["accuracy"]
        assert together["loss"] == pytest.approx(alone["loss"], rel=1e-5)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_image_in_the_middle_of_training_is_named_in_a_line_and_nothing_is_lost(
    folders: dict[str, Path], tmp_path: Path, num_workers: int
) -> None:
    damaged = damage_in_the_middle(folders["val_dir"] / "red" / "001.png")
    settings = config(
        tmp_path / "run",
        folders,
        batching={"num_workers": num_workers, "batch_size": 5},
        optimization={"max_epoch": 1},
    )
    with pytest.raises(UserError) as caught:
        train(settings)
    text = str(caught.value)
    assert text.startswith(f"`{damaged}` must be an image") and "\n" not in text
    assert text.endswith("`max-bad-images` 1. Update 4 is saved, and the same command goes on from there.")
    # What it advises works.
    task = replace(settings.task_options, max_bad_images=1)
    train(replace(settings, task_options=task))
    (valid,) = records(tmp_path / "run", "valid")
    assert valid["accuracy"] * 6 == pytest.approx(round(valid["accuracy"] * 6))  # of the six that can be read


@pytest.mark.parametrize("split", ["train_dir", "val_dir"])
def test_two_ranks_save_and_end_together_when_one_cannot_read_an_image(
    folders: dict[str, Path], tmp_path: Path, split: str
) -> None:
    """Of five training batches of four rank 1 reads the fourth in update 2 of three; of two validation batches the
    second. (The third training batch is tried out before the first update.)"""
    batches = [np.arange(4), np.arange(4, 7)]
    if split == "train_dir":
        task = ImageClassificationOptions(**folders, **WITH_BATCH_NORM).build(None)
        iterator = BatchIterator(
            task.open_split("train"),
            BatchingOptions(None, batch_size=4, required_batch_size_multiple=1),
            seed=1,
        )
        batches = iterator.first_batches
    files = FolderImages(folders[split]).files
    damaged = damage_in_the_middle(folders[split] / files[batches[3 if split == "train_dir" else 1][0]])
    arguments = [
        *("--task", "image_classification"),
        *("--train-dir", folders["train_dir"], "--val-dir", folders["val_dir"], "--batch-size", 4),
        *("--model", "timm/test_byobnet", "--image-size", 32, "--max-epoch", 3, "--device", "cpu"),
        *("--save-dir", tmp_path / "run"),
    ]
    launch = ["--standalone", "--nproc-per-node", 2, "-m", "nmt.cli.train"]
    done = run(*launch, *arguments, command="torchrun")
    update = 2 if split == "train_dir" else 3
    lines = [line for line in done.stderr.splitlines() if line.startswith("nmt-train: error:")]
    assert len(lines) == 2 and lines[0] == lines[1], done.stderr
    assert f"`{damaged}` must be an image" in lines[0] and f"Update {update} is saved" in lines[0]
    saved = tmp_path / "run" / "checkpoints" / f"update-{update:07d}"
    assert (saved / "state.json").is_file() and not records(tmp_path / "run", "valid")


def test_the_last_image_of_an_epoch_goes_with_the_batch_before_it(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At 32 pixels the last layers of a ResNet see one place, whose batch norm must have two images."""
    extra = folders["train_dir"] / "red" / "more.png"
    shutil.copy(folders["train_dir"] / "red" / "000.png", extra)  # 21 images
    arguments = [
        *("--task", "image_classification", "--model", "timm/resnet10t", "--image-size", "32"),
        *("--model-args", "channels=[8,8,16,16]", "--device", "cpu", "--max-epoch", "1"),
        *("--train-dir", str(folders["train_dir"]), "--val-dir", str(folders["val_dir"])),
    ]
    main([*arguments, "--batch-size", "4", "--save-dir", str(tmp_path / "four")])
    (epoch,) = records(tmp_path / "four", "epoch")
    assert epoch["update"] == 5 and (epoch["accuracy"] * 21) == pytest.approx(round(epoch["accuracy"] * 21))
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--batch-size", "1", "--save-dir", str(tmp_path / "one")])
    assert ended.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(
        "nmt-train: error: `batch-size` and `min-batch-size` must be at least 2 for `timm/resnet10t`"
    )
    assert not (tmp_path / "one" / "checkpoints").exists()  # it is said before the first update


def test_a_run_is_not_resumed_with_other_classes(folders: dict[str, Path], tmp_path: Path) -> None:
    settings = config(tmp_path / "run", folders, optimization={"max_update": 1})
    train(settings)
    for folder in folders.values():
        (folder / "red").rename(folder / "pink")
    with pytest.raises(UserError, match=r"`classes\.txt` of the data must be the one"):
        train(settings)
    with pytest.raises(UserError, match="`model` may not change"):
        train(replace(settings, task_options=replace(settings.task_options, model="timm/resnet18")))


@pytest.mark.parametrize("place", ["train", "val/run", "train/red/run"])
def test_a_run_is_not_begun_where_it_would_become_a_class(
    folders: dict[str, Path], tmp_path: Path, place: str
) -> None:
    before = sorted(tmp_path.rglob("*"))
    for dry_run in (True, False):
        with pytest.raises(
            UserError, match=r"`save-dir` must lie outside of `.*\. Put it elsewhere, such as `"
        ):
            train(config(tmp_path / place, folders, dry_run=dry_run))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_is_not_begun_behind_a_link_to_a_class(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.move(folders["train_dir"] / "red", tmp_path / "reds")
    (folders["train_dir"] / "red").symlink_to(tmp_path / "reds")
    with pytest.raises(UserError, match="`save-dir` must lie outside of"):
        train(config(tmp_path / "reds" / "run", folders))


def test_a_run_may_lie_beside_the_files_of_mnist(tmp_path: Path) -> None:
    for part in ("train", "t10k"):
        write_idx(tmp_path, part, *bars(8))
    given = {"train_dir": tmp_path, "val_dir": tmp_path}
    task = {"model": "timm/test_byobnet", "image_size": 32}
    train(config(tmp_path / "run", given, task=task, optimization={"max_update": 1}))


def test_an_averaged_model_needs_the_images_that_it_is_measured_on_alone(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "timm.pth"
    torch.save(build_model("timm/test_byobnet", **SIZES).state_dict(), checkpoint)
    task = {**WITH_BATCH_NORM, "model_args": (f"checkpoint_path={checkpoint}",)}
    train(config(tmp_path / "run", folders, task=task, optimization={"max_epoch": 1}))
    average([str(tmp_path / "run"), "--output", str(tmp_path / "mean"), "--last", "1"])
    best = str(tmp_path / "run" / "checkpoints" / "best")
    validate([best])
    expected = json.loads(capsys.readouterr().out.splitlines()[-1])
    checkpoint.unlink()  # its weights are in the model folder
    folders["train_dir"].rename(tmp_path / "elsewhere")
    for model in (best, str(tmp_path / "mean")):
        validate([model, "--val-dir", str(folders["val_dir"])])
        assert json.loads(capsys.readouterr().out) == expected
    validate([best])
    assert json.loads(capsys.readouterr().out) == expected
    validate([str(tmp_path / "mean"), "--split", "train", "--train-dir", str(tmp_path / "elsewhere")])
    assert json.loads(capsys.readouterr().out)["split"] == "train"
    for model, split, option in ((best, "train", "train-dir"), (tmp_path / "mean", "valid", "val-dir")):
        with pytest.raises(SystemExit):
            validate([str(model), "--split", split])
        assert f"Name it: `nmt-validate MODEL --{option} PATH`" in capsys.readouterr().err
    load_model(tmp_path / "mean")
