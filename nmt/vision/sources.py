"""Labelled images on the disk: folders of image files, and the files of MNIST and CIFAR.

Each source is pickled as its path, and a process that unpickles it reads the folder again.
"""

from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from nmt.vision.cifar import cifar_folder, open_cifar
from nmt.vision.folders import FolderImages
from nmt.vision.idx import idx_folder, open_idx, read_idx
from nmt.vision.image_files import read_image
from nmt.vision.stored import Split, StoredImages

__all__ = ["FolderImages", "ImageSource", "Split", "StoredImages", "open_images", "read_idx", "read_image"]


class ImageSource(Protocol):
    """Images of one split, with their labels."""

    path: Path
    classes: list[str]
    """The names of the classes that have images; a label is a place in this list."""
    num_channels: int
    labels: np.ndarray
    """(N,): the label of each image."""

    def __len__(self) -> int: ...

    def label(self, index: int, /) -> int:
        """Return the label of an image."""

    def name(self, index: int, /) -> str:
        """Return the name of an image, which no other image has."""

    def part(self, places: NDArray[np.int64], /) -> Self:
        """Return some of the images, with the same list of classes."""

    def image(self, index: int, /) -> Any:
        """Return an image: a Pillow image, or a (C, H, W) uint8 tensor.

        Raises:
            UnreadableImage: It is damaged.
        """

    def look_at(self, index: int, /) -> None:
        """Check quickly whether an image can be read; damage in the middle of a file is not found.

        Raises:
            UnreadableImage: It cannot be read.
        """


def open_images(path: Path, split: Split) -> FolderImages | StoredImages:
    """Open MNIST's or CIFAR's files if the folder has them, else a folder of class folders.

    Raises:
        UserError: The folder has neither, or something is wrong with it.
    """
    folder = idx_folder(path)
    if folder is not None:
        return open_idx(folder, split)
    folder = cifar_folder(path)
    if folder is not None:
        return open_cifar(folder, split)
    return FolderImages(path, needs_all_classes=split == "train")
