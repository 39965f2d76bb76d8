"""Labelled images in the files of MNIST."""

import copy
import gzip
import struct
import zlib
from math import prod
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray

from nmt.errors import UserError

Split = Literal["train", "valid"]

_IDX_PARTS: dict[Split, str] = {"train": "train", "valid": "t10k"}
_IDX_BYTES = 8  # the code for unsigned bytes in the header of an idx file


class IdxImages:
    """Images and labels in a pair of idx files, as MNIST has them: grey, all of one size, held in memory."""

    num_channels = 1

    def __init__(self, folder: Path, split: Split) -> None:
        """Read the files.

        Raises:
            UserError: One is missing or damaged, or they do not fit together.
        """
        self.path, self.split = folder, split
        images_path = _idx_file(folder, split, "images-idx3-ubyte")
        labels_path = _idx_file(folder, split, "labels-idx1-ubyte")
        self.images = read_idx(images_path, num_dims=3)
        self.labels = read_idx(labels_path, num_dims=1)
        if len(self.labels) != len(self.images) or len(self.images) == 0:
            raise UserError(
                f"`{labels_path}` must have a label for each image, but has {len(self.labels):,} for "
                f"{len(self.images):,} images. Get the files anew."
            )
        if 0 in self.images.shape:
            raise UserError(f"`{images_path}` must hold images of some pixels, but has none. Get it anew.")
        self.classes = [str(label) for label in range(int(self.labels.max()) + 1)]

        self.places: NDArray[np.int64] | None = None  # of a part, in the whole

    def part(self, places: NDArray[np.int64]) -> Self:
        """Return some of the images, of the same classes."""
        part = copy.copy(self)
        part.places = places if self.places is None else self.places[places]
        part.images, part.labels = self.images[places], self.labels[places]
        return part

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path, self.split, self.places)

    def __len__(self) -> int:
        return len(self.images)

    def label(self, index: int) -> int:
        """Return the label of an image."""
        return int(self.labels[index])

    def name(self, index: int) -> str:
        """Return what tells an image from the others: its number in the file, from 0."""
        return str(index if self.places is None else self.places[index])

    def image(self, index: int) -> torch.Tensor:
        """Return an image, (1, H, W) uint8."""
        return torch.from_numpy(self.images[index]).unsqueeze(0)

    def look_at(self, index: int) -> None:
        """Do nothing: all images are in memory."""

    @property
    def image_size(self) -> int:
        """The shorter side of an image."""
        height, width = self.images.shape[1:]
        return int(min(height, width))

    def mean(self) -> tuple[float, ...]:
        """Return the mean over all pixels, where white is 1, to four places."""
        return (round(self._moments()[0], 4),)

    def std(self) -> tuple[float, ...]:
        """Return the standard deviation over all pixels, where white is 1, to four places."""
        return (round(max(self._moments()[1], 1e-4) ** 0.5, 4),)

    def _moments(self) -> tuple[float, float]:
        counts = np.bincount(self.images.reshape(-1), minlength=256)
        values = np.arange(256) / 255
        mean = float(np.average(values, weights=counts))
        return mean, float(np.average((values - mean) ** 2, weights=counts))


def _reopen(folder: Path, split: Split, places: NDArray[np.int64] | None) -> IdxImages:
    whole = IdxImages(folder, split)
    return whole if places is None else whole.part(places)


def read_idx(path: Path, *, num_dims: int) -> NDArray[np.uint8]:
    """Read an idx file of unsigned bytes, gzipped if its name ends with .gz.

    The format: two zero bytes, the type (8 for unsigned bytes), the number of dimensions, each dimension as
    four bytes, big-endian, and the values.

    Raises:
        UserError: It is cut short, damaged, or something else.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"`{path}` must be a whole gzip file, but: {error}. Get it anew.") from error
    header = 4 + 4 * num_dims
    if content[:4] != bytes((0, 0, _IDX_BYTES, num_dims)) or len(content) < header:
        raise UserError(
            f"`{path}` must be an idx file of {num_dims} dimensions of bytes, but is not. Get it anew."
        )
    shape = struct.unpack(f">{num_dims}I", content[4:header])
    if len(content) - header != prod(shape):
        raise UserError(
            f"`{path}` must hold {prod(shape):,} bytes after its header, but has {len(content) - header:,}. "
            "Get it anew."
        )
    # A copy, because torch wants memory that can be written to.
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape).copy()


def idx_folder(path: Path) -> Path | None:
    """Return the folder that holds idx files: the one named, or where torchvision puts them below it."""
    for folder in (path, path / "raw", path / "MNIST" / "raw"):
        if any(folder.glob("*-idx[13]-ubyte*")):
            return folder
    return None


def _idx_file(folder: Path, split: Split, name: str) -> Path:
    path = folder / f"{_IDX_PARTS[split]}-{name}"
    for candidate in (path, path.with_name(path.name + ".gz")):
        if candidate.is_file():
            return candidate
    raise UserError(f"`{path}` or `{path.name}.gz` must be there, but is missing.")
