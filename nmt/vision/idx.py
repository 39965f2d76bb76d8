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


def open_idx(folder: Path, split: Split) -> StoredImages:
    """Read images and labels of a pair of idx files, as MNIST has them: grey digits.

    Raises:
        UserError: One is missing or damaged, or they do not fit together.
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
