"""Sets of images are told apart by what they hold, and a run that is given one twice says so."""

import shutil
from pathlib import Path

import pytest
from support.image_files import bars, write_folders, write_idx
from support.image_run import config

from nmt.train_loop import train
from nmt.vision.identity import fingerprint
from nmt.vision.idx import open_idx
from nmt.vision.sources import FolderImages

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def test_folders_are_told_apart_by_names_classes_and_sizes_and_not_by_their_place(tmp_path: Path) -> None:
    folder = write_folders(tmp_path / "a", {"red": 3, "green": 2})
    first = fingerprint(FolderImages(folder))
    copy = shutil.copytree(folder, tmp_path / "elsewhere")
    assert fingerprint(FolderImages(copy)) == first

    def after(change: object) -> str:
        shutil.rmtree(copy)
        shutil.copytree(folder, copy)
        assert callable(change)
        change()
        return fingerprint(FolderImages(copy))

    others = [
        after(lambda: (copy / "red" / "000.png").unlink()),
        after(lambda: (copy / "red" / "000.png").rename(copy / "red" / "900.png")),
        after(lambda: (copy / "red" / "000.png").rename(copy / "green" / "000a.png")),
        after(lambda: (copy / "red" / "000.png").write_bytes((copy / "red" / "000.png").read_bytes() + b"x")),
    ]
    assert len({first, *others}) == 5


def test_files_of_mnist_are_told_apart_by_pixels_and_labels(tmp_path: Path) -> None:
    images, labels = bars(6)
    prints = []
    for name, own_images, own_labels in (
        ("one", images, labels),
        ("same", images.copy(), labels.copy()),
        ("order", images[::-1], labels[::-1]),
        ("labels", images, 1 - labels),
    ):
        folder = write_idx(tmp_path / name, "train", own_images, own_labels)
        prints.append(fingerprint(open_idx(folder, "train")))
    assert prints[0] == prints[1] and len(set(prints)) == 3


def test_one_folder_for_training_and_validation_is_said_and_images_are_called_images(tmp_path: Path) -> None:
    folder = write_folders(tmp_path / "train", {"red": 4, "green": 4})
    train(config(tmp_path / "run", {"train_dir": folder, "val_dir": folder}, optimization={"max_update": 2}))
    said = (tmp_path / "run" / "train.log").read_text()
    assert "warning: the validation examples are the training examples" in said
    assert "8 training images, 8 validation images" in said and "FLOP an image in matrix products" in said
    assert "target" not in said
