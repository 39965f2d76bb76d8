"""Validation images that are held out from the training images."""

import json
import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.image_files import bars, write_folders, write_idx

from nmt.cli.train import main
from nmt.cli.validate import main as validate
from nmt.distributed import single
from nmt.errors import UserError
from nmt.vision.folders import FolderImages
from nmt.vision.held_out import SPLIT, draw
from nmt.vision.options import ImageClassificationOptions

CPU = single(torch.device("cpu"))


class Named:
    """Labels of images whose names are their numbers."""

    def __init__(self, labels: list[int]) -> None:
        self.labels = np.array(labels, dtype=np.int64)
        self.classes = ["a", "b", "c"]

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return str(index)


@settings(deadline=None)
@given(
    labels=st.lists(st.integers(0, 2), max_size=60), fraction=st.floats(0.01, 0.99), seed=st.integers(0, 99)
)
def test_a_share_of_each_class_is_drawn_and_some_are_left(
    labels: list[int], fraction: float, seed: int
) -> None:
    drawn = draw(Named(labels), fraction, seed=seed)
    assert len(set(drawn)) == len(drawn) and set(drawn) <= set(map(str, range(len(labels))))
    counts, total = Counter(labels[int(name)] for name in drawn), Counter(labels)
    for label, count in total.items():
        assert counts[label] == (0 if count == 1 else min(max(round(fraction * count), 1), count - 1))


def test_another_seed_draws_others_and_a_new_image_moves_few() -> None:
    labels = [0] * 200
    first = set(draw(Named(labels), 0.2, seed=1))
    assert first == set(draw(Named(labels), 0.2, seed=1)) != set(draw(Named(labels), 0.2, seed=2))
    assert len(first - set(draw(Named([*labels, 0]), 0.2, seed=1))) <= 1


@pytest.fixture
def options(tmp_path: Path) -> ImageClassificationOptions:
    root = write_folders(tmp_path / "all", {"red": 10, "blue": 5, "green": 1})
    return ImageClassificationOptions(
        train_dir=root, val_fraction=0.2, model="timm/test_byobnet", image_size=32
    )


def test_both_parts_make_up_the_folder_and_are_found_again(
    options: ImageClassificationOptions, tmp_path: Path
) -> None:
    task = options.build(None)
    train, valid = task.open_split("train"), task.open_split("valid")
    assert isinstance(train.source, FolderImages) and isinstance(valid.source, FolderImages)
    whole = FolderImages(options.train_dir).files
    assert sorted(train.source.files + valid.source.files) == whole and len(valid) == 3
    assert [valid.label(index) for index in range(3)] == [0, 2, 2]  # blue, red, red
    assert train.augmentation is not None and valid.augmentation is None
    for examples in (train, valid):
        again = pickle.loads(pickle.dumps(examples))
        assert again.source.files == examples.source.files
        assert [again.label(i) for i in range(len(again))] == [examples.label(i) for i in range(len(again))]
    assert task.look_over(train, valid, CPU) == [] and train.fingerprint() != valid.fingerprint()
    (line,) = valid.notes()
    assert line == f"warning: classes without an image in `{options.train_dir}`: 1 of 3, `green`"

    task.save_assets(tmp_path)
    record = json.loads((tmp_path / SPLIT).read_text())
    assert record == {"classes": {"blue": 0, "green": 1, "red": 2}, "valid": valid.source.files}
    other = replace(options, split_seed=2).build(tmp_path)  # what is saved counts
    assert other.open_split("valid").source.files == valid.source.files
    assert other.open_split("train").source.files == train.source.files
    (tmp_path / SPLIT).write_text('{"valid": 3}')
    with pytest.raises(UserError, match="must say which images are held out, but is damaged"):
        options.build(tmp_path)
    (tmp_path / SPLIT).write_text('{"valid": ["red/lost.png"]}')
    with pytest.raises(UserError, match="must have some of the images \\(1\\) that are held out"):
        options.build(tmp_path).open_split("valid")


def test_digits_are_held_out_from_the_training_part(tmp_path: Path) -> None:
    data = write_idx(tmp_path, "train", *bars(20))
    task = ImageClassificationOptions(train_dir=data, val_fraction=0.3).build(None)
    train, valid = task.open_split("train"), task.open_split("valid")
    assert (len(train), len(valid)) == (14, 6)
    pixels, labels = bars(20)
    for examples in (train, pickle.loads(pickle.dumps(valid))):
        for index in range(len(examples)):
            number = int(examples.source.name(index))
            assert np.array_equal(examples.source.image(index)[0], pixels[number])
            assert examples.label(index) == labels[number]
    names = [{examples.source.name(i) for i in range(len(examples))} for examples in (train, valid)]
    assert names[0] | names[1] == set(map(str, range(20))) and not names[0] & names[1]
    assert task.look_over(train, valid, CPU) == [] and train.fingerprint() != valid.fingerprint()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"val_fraction": 1.0}, "`val-fraction` must be at least 0 and below 1"),
        ({"val_fraction": 0.0}, "`val-dir` or `val-fraction` must be given, but both are missing"),
        ({"val_dir": Path("x")}, "`val-dir` or `val-fraction` must be given, but both are given"),
    ],
)
def test_one_of_the_two_ways_is_wanted(
    options: ImageClassificationOptions, changes: dict[str, object], text: str
) -> None:
    with pytest.raises(UserError, match=text):
        replace(options, **changes).check()


def test_a_run_on_one_folder_goes_on_with_its_split_and_is_measured_on_it(
    options: ImageClassificationOptions, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        *("--task", "image_classification", "--train-dir", str(options.train_dir), "--val-fraction", "0.2"),
        *("--model", "timm/test_byobnet", "--image-size", "32", "--batch-size", "5", "--device", "cpu"),
        *("--save-dir", str(tmp_path / "run")),
    ]
    main([*arguments, "--lr-scheduler", "constant", "--max-epoch", "1"])
    main([*arguments, "--lr-scheduler", "constant", "--max-epoch", "2"])
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    accuracy = [json.loads(line)["accuracy"] for line in lines if '"valid"' in line]
    capsys.readouterr()
    validate([str(tmp_path / "run" / "checkpoints" / "last"), "--device", "cpu"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["accuracy"] == accuracy[1]
    with pytest.raises(SystemExit):
        main([*arguments, "--lr-scheduler", "constant", "--max-epoch", "3", "--split-seed", "2"])
    assert "`split.json` of the data must be the one that the run began with" in capsys.readouterr().err
