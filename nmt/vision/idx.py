"""Labelled images in the files of MNIST."""

import gzip
import struct
import zlib
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nmt.errors import UserError, counted
from nmt.vision.stored import Split, StoredImages

_IDX_PARTS: dict[Split, str] = {"train": "train", "valid": "t10k"}
_IDX_BYTES = 8  # the code for unsigned bytes in the header of an idx file
# A gzip file of digits has a fifth of their size. A file that unpacks to a thousand times its size, the most that
# is possible, was made to fill the memory.
_LARGEST_RATIO = 100
_LEAST_BOUND = 2**26


def open_idx(folder: Path, split: Split) -> StoredImages:
    """Read images and labels of a pair of idx files, such as MNIST's grey digits.

    Raises:
        UserError: A file is missing or damaged, or the two do not fit together.
    """
    images_path = _idx_file(folder, split, "images-idx3-ubyte")
    labels_path = _idx_file(folder, split, "labels-idx1-ubyte")
    images = read_idx(images_path, num_dims=3)
    labels = read_idx(labels_path, num_dims=1)
    if len(labels) != len(images) or len(images) == 0:
        raise UserError(
            f"`{labels_path}` must have a label for each image, but has {len(labels):,} for "
            f"{counted(len(images), 'image')}. Get the files anew."
        )
    if 0 in images.shape:
        raise UserError(f"`{images_path}` must hold images of some pixels, but has none. Get it anew.")
    classes = [str(label) for label in range(int(labels.max()) + 1)]
    return StoredImages(
        folder, split, images[:, None], labels, classes=classes, open_=open_idx, may_be_mirrored=False
    )


def read_idx(path: Path, *, num_dims: int) -> NDArray[np.uint8]:
    """Read an idx file of unsigned bytes, gzipped if its name ends with .gz.

    The format: two zero bytes, the type (8 for unsigned bytes), the number of dimensions, each dimension as
    four bytes, big-endian, and the values.

    Raises:
        UserError: It is cut short, damaged, or not an idx file.
    """
    length = 4 + 4 * num_dims
    largest = path.stat().st_size
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            if path.suffix == ".gz":
                largest = max(_LEAST_BOUND, _LARGEST_RATIO * largest)
            header = file.read(length)
            if header[:4] != bytes((0, 0, _IDX_BYTES, num_dims)) or len(header) < length:
                raise UserError(
                    f"`{path}` must be an idx file of {num_dims} dimensions of bytes, but is not. Get it anew."
                )
            shape = struct.unpack(f">{num_dims}I", header[4:])
            size = prod(shape)
            if size > largest:
                raise UserError(
                    f"`{path}` must hold no more than a file of its size can ({largest:,} bytes), but its header "
                    f"says {size:,}. Get it anew."
                )
            content = file.read(size + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"`{path}` must be a whole gzip file, but: {error}. Get it anew.") from error
    if len(content) != size:
        found = "more" if len(content) > size else f"{len(content):,}"
        raise UserError(f"`{path}` must hold {size:,} bytes after its header, but has {found}. Get it anew.")
    # A copy, because torch needs memory that can be written to.
    return np.frombuffer(content, dtype=np.uint8).reshape(shape).copy()


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
