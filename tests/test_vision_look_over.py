"""What is told of images before a model is trained on them, and how those that cannot be read are left out."""

import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.image_files import bars, write_folders, write_idx
from support.ranks import run_ranks
from torch import nn

from nmt.distributed import World, single
from nmt.errors import UserError
from nmt.update.validation import validate
from nmt.vision.dataset import UNREADABLE
from nmt.vision.options import ImageClassificationOptions
from nmt.vision.task import ImageClassificationTask

CPU = single(torch.device("cpu"))


@pytest.fixture
def options(tmp_path: Path) -> ImageClassificationOptions:
    train = write_folders(tmp_path / "train", {"red": 4, "blue": 3})
    valid = write_folders(tmp_path / "val", {"red": 3, "blue": 2})
    return ImageClassificationOptions(train_dir=train, val_dir=valid, image_size=32)


def look_over(task: ImageClassificationTask, world: World = CPU) -> list[str]:
    train, valid = task.open_split("train"), task.open_split("valid")
    return [*train.notes(), *valid.notes(), *task.look_over(train, valid, world)]


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:300])
    return path


def test_of_good_images_nothing_is_told(options: ImageClassificationOptions) -> None:
    assert look_over(options.build(None)) == []


def test_what_is_left_out_is_told_once_for_each_kind(options: ImageClassificationOptions) -> None:
    for name in ("a.heic", "b.heic", "c.txt"):
        (options.train_dir / "red" / name).write_text("x")
    shutil.copy(options.train_dir / "red" / "000.png", options.val_dir / "beside.png")
    (options.val_dir / "red" / "loop").symlink_to(".")
    files = f"files in the class folders of `{options.train_dir}`"
    assert look_over(options.build(None)) == [
        f"left out: {files} that are of kinds not read: 2 .heic, 1 .txt",
        f"left out: images beside the class folders of `{options.val_dir}`: 1",
        f"left out: `{options.val_dir}/red/loop` is a link to a folder that it stands in",
    ]


def fingerprints(options: ImageClassificationOptions) -> list[str]:
    task = options.build(None)
    return [task.open_split(split).fingerprint() for split in ("train", "valid")]


@pytest.mark.parametrize("how", ["same", "link", "copy"])
def test_training_images_that_are_validated_on_are_recognised(
    options: ImageClassificationOptions, how: str
) -> None:
    """By their fingerprints, of whose equality a run warns."""
    valid = options.train_dir
    if how != "same":
        valid = options.train_dir.with_name("again")
        valid.symlink_to(options.train_dir) if how == "link" else shutil.copytree(options.train_dir, valid)
    one, other = fingerprints(replace(options, val_dir=valid))
    assert one == other
    if how == "copy":  # of the same names, but other images
        (valid / "red" / "000.png").write_bytes((valid / "red" / "001.png").read_bytes() + b" ")
        one, other = fingerprints(replace(options, val_dir=valid))
        assert one != other


def test_digits_that_are_trained_and_validated_on_are_recognised(tmp_path: Path) -> None:
    data = write_idx(tmp_path / "data", "train", *bars(6))
    write_idx(data, "t10k", *bars(6))
    options = ImageClassificationOptions(train_dir=data, val_dir=data)
    assert len(set(fingerprints(options))) == 1
    write_idx(data, "t10k", *bars(6, seed=1))
    assert len(set(fingerprints(options))) == 2


def test_a_missing_file_does_not_keep_images_from_being_told_from_others(
    options: ImageClassificationOptions,
) -> None:
    before = fingerprints(options)
    (options.train_dir / "red" / "001.png").unlink()
    (options.train_dir / "red" / "001.png").symlink_to("lost.png")
    after = fingerprints(options)
    assert before[0] != after[0] and before[1] == after[1]


def test_a_damaged_image_is_refused_before_the_first_update_with_advice_that_works(
    options: ImageClassificationOptions,
) -> None:
    damaged = [cut(options.val_dir / "red" / "001.png")]
    with pytest.raises(UserError) as caught:
        look_over(options.build(None))
    text = str(caught.value)
    assert text.startswith(f"`{damaged[0]}` must be an image") and "\n" not in text
    assert text.endswith("Restore it, or have it left out by `max-bad-images` 1.")
    damaged.append(cut(options.val_dir / "red" / "002.png"))
    with pytest.raises(UserError) as caught:
        look_over(replace(options, max_bad_images=1).build(None))
    text = str(caught.value)
    assert text.startswith(
        "`max-bad-images` must be at least the number of validation images that cannot be read"
    )
    assert "but is 1, and there are 2 of 5" in text and f"`{damaged[0]}`" in text
    assert text.endswith("Restore them, or have them left out by `max-bad-images` 2.")
    (line,) = look_over(replace(options, max_bad_images=2).build(None))
    assert line.startswith("left out: validation images that cannot be read: 2 of 5. ")
    assert all(f"`{path}`" in line for path in damaged)


def _look_over_on_ranks(world: World, options: ImageClassificationOptions, damaged: list[str]) -> None:
    task = options.build(None)
    train = task.open_split("train")
    (line,) = task.look_over(train, task.open_split("valid"), world)
    assert all(path in line for path in damaged)
    assert train.unreadable == {0, 1, 4}  # each rank knows what the others have found
    with pytest.raises(UserError, match="there are 3 of 7"):
        look_over(replace(options, max_bad_images=2).build(None), world)


def test_ranks_share_the_files_and_know_the_same(options: ImageClassificationOptions) -> None:
    damaged = [cut(options.train_dir / name) for name in ("blue/000.png", "blue/001.png", "red/001.png")]
    run_ranks(_look_over_on_ranks, replace(options, max_bad_images=3), list(map(str, damaged)), size=2)


class ByRed(nn.Module):
    """Takes what is redder than blue for class 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(2))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        means = images.mean(dim=(2, 3))
        return means[:, [2, 0]] @ self.weight


def test_in_validation_unreadable_images_do_not_count(options: ImageClassificationOptions) -> None:
    whole = options.build(None)
    (options.val_dir / "red" / "001.png").unlink()
    (options.val_dir / "red" / "001.png").symlink_to("lost.png")
    task = replace(options, max_bad_images=1).build(None)
    examples = task.open_split("valid")
    look_over(task)
    assert [examples[index][1] for index in range(5)] == [0, 0, 1, UNREADABLE, 1]
    batch = examples.collate([examples[index] for index in range(5)])
    assert batch.num_examples == 5 and batch.num_targets == 4
    alone = examples.collate([examples[3]])
    assert alone.num_targets == 0
    measured = validate(task, ByRed(), examples, [batch, alone], world=CPU)
    (options.val_dir / "red" / "001.png").unlink()
    four = whole.open_split("valid")
    expected = validate(whole, ByRed(), four, [four.collate([four[index] for index in range(4)])], world=CPU)
    assert measured["accuracy"] == expected["accuracy"] == 1.0
    assert measured["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    (options.val_dir / "red" / "001.png").symlink_to("lost.png")
    shown = task.illustrate(ByRed(), examples, CPU)
    assert set(shown.images) == {"predictions", "confusion"}


def test_in_training_another_image_takes_the_place_of_an_unreadable_one(
    options: ImageClassificationOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    options = replace(
        options, max_bad_images=2, augmentation=replace(options.augmentation, crop="none", hflip=0.0)
    )
    damaged = cut(options.train_dir / "red" / "003.png")  # the last one; the first takes its place
    examples = options.build(None).open_split("train")
    image, label = examples[6]
    assert label == 0 and torch.equal(image, examples[0][0])
    assert examples.unreadable == {6}
    examples[6]
    assert capsys.readouterr().err.count(f"left out: `{damaged}`") == 1  # told once
    other = pickle.loads(pickle.dumps(examples))
    assert other.unreadable == {6} and torch.equal(other[6][0], image)
    cut(options.train_dir / "red" / "002.png")
    assert other[5][1] == 0
    cut(options.train_dir / "red" / "001.png")
    with pytest.raises(UserError, match=r"red/001.png` must be an image.*`max-bad-images` 3\.$"):
        other[4]
    assert np.array_equal(other.sizes, np.ones((7, 1)))  # so that a run goes on where it stood
