"""CIFAR's binary files."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from nmt.errors import UserError
from nmt.vision.options import AugmentationOptions, ImageClassificationOptions
from nmt.vision.sources import StoredImages, open_images


def write_cifar10(folder: Path, *, num_images: int = 4) -> np.ndarray:
    """Write the files of CIFAR-10 with a few images of noise each; return those for training, (N, 3, 32, 32)."""
    folder.mkdir(parents=True)
    (folder / "batches.meta.txt").write_text("airplane\ncat\nship\n\n")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6 * num_images, 3, 32, 32)).astype(np.uint8)
    names = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]
    for place, name in enumerate(names):
        part = range(place * num_images, (place + 1) * num_images)
        (folder / name).write_bytes(b"".join(bytes([i % 3]) + images[i].tobytes() for i in part))
    return images[: 5 * num_images]


@pytest.mark.parametrize("below", ["", "cifar-10-batches-bin"])
def test_cifar_10_is_read(tmp_path: Path, below: str) -> None:
    pixels = write_cifar10(tmp_path / "data" / below)
    train, valid = open_images(tmp_path / "data", "train"), open_images(tmp_path / "data", "valid")
    assert isinstance(train, StoredImages)
    assert train.classes == valid.classes == ["airplane", "cat", "ship"]
    assert (len(train), len(valid), train.num_channels, train.image_size) == (20, 4, 3, 32)
    again = pickle.loads(pickle.dumps(train))
    for images in (train, again):
        assert np.array_equal(images.images, pixels)
        assert [images.label(index) for index in range(20)] == [index % 3 for index in range(20)]
    assert train.mean() == pytest.approx((pixels / 255).mean(axis=(0, 2, 3)), abs=1e-4)
    assert train.std() == pytest.approx((pixels / 255).std(axis=(0, 2, 3)), abs=1e-4)


def test_of_cifar_100_the_finer_labels_are_taken(tmp_path: Path) -> None:
    (tmp_path / "fine_label_names.txt").write_text("apple\nbee\n")
    image = bytes(range(256)) * 12
    for name in ("train.bin", "test.bin"):
        (tmp_path / name).write_bytes(b"\x09\x01" + image + b"\x07\x00" + image)
    images = open_images(tmp_path, "train")
    assert images.classes == ["apple", "bee"] and [images.label(0), images.label(1)] == [1, 0]
    assert images.image(1).numpy().tobytes() == image


def test_photographs_are_moved_and_mirrored_unless_it_is_said_otherwise(tmp_path: Path) -> None:
    write_cifar10(tmp_path / "data")
    options = ImageClassificationOptions(train_dir=tmp_path / "data", val_dir=tmp_path / "data")
    task = options.build(None)
    assert (task.format.image_size, task.format.num_channels, task.format.crop_pct) == (32, 3, 1.0)
    train = task.open_split("train")
    assert train.augmentation == AugmentationOptions(crop="shift", hflip=0.5)
    batch = train.collate([train[index] for index in range(4)])
    assert batch.images.shape == (4, 3, 32, 32) and batch.labels.tolist() == [0, 1, 2, 0]
    held_out = ImageClassificationOptions(train_dir=tmp_path / "data", val_fraction=0.2).build(None)
    assert [len(held_out.open_split(split)) for split in ("train", "valid")] == [17, 3]


def test_files_that_are_missing_cut_short_or_do_not_fit_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    write_cifar10(folder)

    def refusal() -> str:
        with pytest.raises(UserError) as caught:
            open_images(folder, "train")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    (folder / "batches.meta.txt").write_text("airplane\ncat\n")
    assert f"`{folder / 'batches.meta.txt'}` must name each of the 3 classes once" in refusal()
    whole = (folder / "data_batch_3.bin").read_bytes()
    for content in (whole[:-1], b""):
        (folder / "data_batch_3.bin").write_bytes(content)
        assert f"`{folder / 'data_batch_3.bin'}` must hold records of 3,073 bytes" in refusal()
    (folder / "data_batch_3.bin").unlink()
    assert f"`{folder / 'data_batch_3.bin'}` must be there, but is missing" in refusal()
