"""Labelled images as they lie on the disk: folders of image files, and the files of MNIST.

Each pickles as its path, and a process that unpickles it reads the folder anew.
"""

import gzip
import os
import struct
import zlib
from math import prod
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from nmt.errors import UserError, shown

Split = Literal["train", "valid"]

# Those that torchvision's ImageFolder looks for.
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_IDX_PARTS: dict[Split, str] = {"train": "train", "valid": "t10k"}
_IDX_BYTES = 8  # the code for unsigned bytes in the header of an idx file


class ImageSource(Protocol):
    """Images of one split, with their labels."""

    path: Path
    classes: list[str]
    """The names of the classes; a label is a place in this list."""
    num_channels: int

    def __len__(self) -> int: ...

    def label(self, index: int, /) -> int:
        """Return the label of an image."""

    def image(self, index: int, /) -> Any:
        """Return an image: one of Pillow, or a (C, H, W) uint8 tensor."""


def open_images(path: Path, split: Split) -> "FolderImages | IdxImages":
    """Open MNIST's files if the folder has them, else a folder of class folders.

    Raises:
        UserError: There is neither, or something is wrong with it.
    """
    folder = _idx_folder(path)
    return FolderImages(path) if folder is None else IdxImages(folder, split)


class FolderImages:
    """The image files of a folder that holds a folder for each class, in the order of their names."""

    num_channels = 3

    def __init__(self, path: Path, *, expected: int | None = None) -> None:
        """List the files.

        Args:
            path: The folder.
            expected: The `fingerprint` that it had, if it was opened before.

        Raises:
            UserError: A class has no image, there are not two classes, the folder cannot be read or has changed.
        """
        self.path = path
        try:
            # Hidden folders are what tools leave behind.
            children = (
                entry for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith(".")
            )
            self.classes = sorted(entry.name for entry in children)
            files = [_list_images(path / name) for name in self.classes]
        except OSError as error:
            raise UserError(
                f"`{error.filename}` must be a folder that can be read, but: {error.strerror}. "
                "Name a folder of class folders, or one with MNIST's files."
            ) from error
        self._check(files)
        self.files = [name for names in files for name in names]
        self.labels = np.repeat(np.arange(len(files), dtype=np.int32), [len(names) for names in files])
        self.fingerprint = zlib.crc32("\n".join(self.files).encode("utf-8", "surrogateescape"))
        if expected is not None and expected != self.fingerprint:
            raise UserError(
                f"The images in `{path}` must stay the same while they are in use, but have changed."
            )

    def _check(self, files: list[list[str]]) -> None:
        if len(self.classes) < 2:
            found = self.classes[0] if self.classes else "none"
            raise UserError(
                f"`{self.path}` must hold a folder of images for each of two or more classes, but of folders it "
                f"has: {found}."
            )
        for name, images in zip(self.classes, files, strict=True):
            if not images:
                raise UserError(
                    f"`{self.path / name}` must hold images of its class ({', '.join(SUFFIXES)}), but has none. "
                    "Fill or remove it."
                )
            if not name.isprintable():
                raise UserError(
                    f"The name of a class must be printable, but {shown(name)} in `{self.path}` is not."
                )

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen_folder, (self.path, self.fingerprint)

    def __len__(self) -> int:
        return len(self.files)

    def label(self, index: int) -> int:
        """Return the label of an image."""
        return int(self.labels[index])

    def image(self, index: int) -> Image.Image:
        """Read an image, as RGB.

        Raises:
            UserError: The file is damaged, or no image of 8 bits a channel.
        """
        return read_image(self.path / self.files[index])


def _reopen_folder(path: Path, fingerprint: int) -> FolderImages:
    return FolderImages(path, expected=fingerprint)


def _list_images(folder: Path) -> list[str]:
    """Return the image files at any depth, from the parent of the folder on, sorted."""

    def fail(error: OSError) -> None:
        raise error

    found = []
    for root, _, names in os.walk(folder, onerror=fail, followlinks=True):
        within = os.path.relpath(root, folder.parent)
        images = (name for name in names if name.lower().endswith(SUFFIXES) and not name.startswith("."))
        found += [f"{within}/{name}" for name in images]
    return sorted(found)


def read_image(path: Path) -> Image.Image:
    """Read an image file, as RGB.

    Raises:
        UserError: The file is damaged, or no image of 8 bits a channel.
    """
    try:
        with Image.open(path) as image:
            image.load()
    except Exception as error:  # Pillow raises whatever the bytes make its decoders stumble over
        raise UserError(
            f"`{path}` must be an image, but cannot be read as one: {' '.join(str(error).split())}. "
            "Restore or remove it."
        ) from error
    if image.mode in ("I", "F") or image.mode.startswith("I;"):  # convert() would clip these to white
        raise UserError(
            f"`{path}` must have 8 bits a channel, but is of Pillow's mode {image.mode}. Convert it."
        )
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


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
        self.classes = [str(label) for label in range(int(self.labels.max()) + 1)]

    def __reduce__(self) -> tuple[Any, ...]:
        return IdxImages, (self.path, self.split)

    def __len__(self) -> int:
        return len(self.images)

    def label(self, index: int) -> int:
        """Return the label of an image."""
        return int(self.labels[index])

    def image(self, index: int) -> torch.Tensor:
        """Return an image, (1, H, W) uint8."""
        return torch.from_numpy(self.images[index]).unsqueeze(0)

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


def _idx_folder(path: Path) -> Path | None:
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
