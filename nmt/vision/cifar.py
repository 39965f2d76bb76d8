"""Labelled images in the binary files of CIFAR-10 and CIFAR-100. Their pickle files are not read."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from nmt.errors import UserError
from nmt.vision.stored import Split, StoredImages

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE  # red, green and blue, each row by row


class _Layout(NamedTuple):
    """The layout of the files of one of the two data sets."""

    below: str
    """The folder that its archive unpacks to."""
    files: dict[Split, tuple[str, ...]]
    classes: str
    """The file of the names of the classes, one a line."""
    num_labels: int
    """Bytes of labels before the pixels; the last one is used."""


_LAYOUTS = (
    _Layout(
        "cifar-10-batches-bin",
        {"train": tuple(f"data_batch_{number}.bin" for number in range(1, 6)), "valid": ("test_batch.bin",)},
        "batches.meta.txt",
        1,
    ),
    _Layout("cifar-100-binary", {"train": ("train.bin",), "valid": ("test.bin",)}, "fine_label_names.txt", 2),
)


def cifar_folder(path: Path) -> Path | None:
    """Return the folder that holds CIFAR's binary files: the one named, or what its archive unpacks to."""
    for layout in _LAYOUTS:
        for folder in (path, path / layout.below):
            if (folder / layout.classes).is_file() and any(
                (folder / name).is_file() for names in layout.files.values() for name in names
            ):
                return folder
    return None


def open_cifar(folder: Path, split: Split) -> StoredImages:
    """Read images, labels and the names of the classes.

    Raises:
        UserError: A file is missing or damaged, or the files do not fit together.
    """
    layout = next(layout for layout in _LAYOUTS if (folder / layout.classes).is_file())
    text = (folder / layout.classes).read_text(encoding="utf-8", errors="replace")
    classes = [line.strip() for line in text.splitlines() if line.strip()]
    parts = [_read_records(folder / name, layout.num_labels) for name in layout.files[split]]
    records = np.concatenate(parts)
    labels = records[:, layout.num_labels - 1]
    images = records[:, layout.num_labels :].reshape(-1, 3, _SIDE, _SIDE)
    if labels.max() >= len(classes) or len(set(classes)) < len(classes):
        raise UserError(
            f"`{folder / layout.classes}` must name each of the {int(labels.max()) + 1} classes once, but has "
            f"{len(set(classes))} names. Get the files anew."
        )
    return StoredImages(
        folder,
        split,
        np.ascontiguousarray(images),
        labels.copy(),
        classes=classes,
        open_=open_cifar,
        may_be_mirrored=True,
    )


def _read_records(path: Path, num_labels: int) -> np.ndarray:
    """Return the records of a file: (N, labels and pixels) uint8."""
    if not path.is_file():
        raise UserError(f"`{path}` must be there, but is missing. Get the files anew.")
    content = path.read_bytes()
    length = num_labels + _PIXELS
    if not content or len(content) % length:
        raise UserError(
            f"`{path}` must hold records of {length:,} bytes each, but has {len(content):,} bytes. Get it anew."
        )
    return np.frombuffer(content, dtype=np.uint8).reshape(-1, length)
