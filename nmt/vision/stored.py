"""Labelled images of one size that are held in memory, as the files of MNIST and CIFAR have them.

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

    They pickle as their folder, from which another process reads them anew.
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
            path: The folder that they are from.
            split: The part of it.
            images: (N, C, H, W).
            labels: (N,): places among the classes.
            classes: Their names.
            open_: Reads them.
            may_be_mirrored: Whether they mean the same when mirrored, as photographs do and digits do not.
        """
        self.path, self.split = path, split
        self.images, self.labels = images, labels
        self.classes = classes
        self.may_be_mirrored = may_be_mirrored
        self._open = open_
        self.num_channels = images.shape[1]
        self._places: NDArray[np.int64] | None = None  # of a part, in the whole

    def part(self, places: NDArray[np.int64]) -> Self:
        """Return some of the images, of the same classes."""
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
        """Return what tells an image from the others: its number in the files, from 0."""
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
