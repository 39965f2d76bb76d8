"""Labelled images of one size, held in memory, as in the files of MNIST and CIFAR.

Legend: N images, C channels, H height, W width.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray

Split = Literal["train", "valid"]


class StoredImages:
    """Images of one size, and their labels.

    They are pickled as their folder, from which another process reads them again.
    """

    def __init__(
        self,
        path: Path,
        split: Split,
        images: NDArray[np.uint8],
        labels: NDArray[np.uint8],
        *,
        classes: list[str],
        open_: "Callable[[Path, Split], StoredImages]",
        may_be_mirrored: bool,
    ) -> None:
        """Take images.

        Args:
            path: The folder that they come from.
            split: The split of the data set.
            images: (N, C, H, W).
            labels: (N,): places among the classes.
            classes: Their names.
            open_: Reads them from the folder.
            may_be_mirrored: Whether a mirrored image means the same: true for photographs, but not for digits.
        """
        self.path, self.split = path, split
        self.images, self.labels = images, labels
        self.classes = classes
        self.may_be_mirrored = may_be_mirrored
        self._open = open_
        self.num_channels = images.shape[1]
        self._places: NDArray[np.int64] | None = None  # for a part: its places in the whole

    def part(self, places: NDArray[np.int64]) -> Self:
        """Return some of the images, with the same list of classes."""
        part = copy.copy(self)
        part._places = places if self._places is None else self._places[places]
        part.images, part.labels = self.images[places], self.labels[places]
        return part

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self._open, self.path, self.split, self._places)

    def __len__(self) -> int:
        return len(self.images)

    def label(self, index: int) -> int:
        """Return the label of an image."""
        return int(self.labels[index])

    def name(self, index: int) -> str:
        """Return the name of an image: its number in the files, from 0."""
        return str(index if self._places is None else self._places[index])

    def image(self, index: int) -> torch.Tensor:
        """Return an image, (C, H, W) uint8."""
        return torch.from_numpy(self.images[index])

    def look_at(self, index: int) -> None:
        """Do nothing: all images are in memory."""

    @property
    def image_size(self) -> int:
        """The shorter side of an image."""
        return int(min(self.images.shape[2:]))

    def mean(self) -> tuple[float, ...]:
        """Return the mean of each channel over all pixels, where white is 1, to four places."""
        return tuple(round(mean, 4) for mean, _ in self._moments())

    def std(self) -> tuple[float, ...]:
        """Return the standard deviation of each channel over all pixels, where white is 1, to four places."""
        return tuple(round(max(variance, 1e-4) ** 0.5, 4) for _, variance in self._moments())

    def _moments(self) -> list[tuple[float, float]]:
        values = np.arange(256) / 255
        moments = []
        for channel in range(self.num_channels):
            counts = np.bincount(self.images[:, channel].reshape(-1), minlength=256)
            mean = float(np.average(values, weights=counts))
            moments.append((mean, float(np.average((values - mean) ** 2, weights=counts))))
        return moments


def _reopen(
    open_: "Callable[[Path, Split], StoredImages]", path: Path, split: Split, places: NDArray[np.int64] | None
) -> StoredImages:
    whole = open_(path, split)
    return whole if places is None else whole.part(places)
