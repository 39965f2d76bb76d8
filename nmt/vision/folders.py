"""Labelled images in a folder with one subfolder for each class."""

import copy
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nmt.errors import UserError, shown
from nmt.vision.image_files import look_at, read_image, readable_suffixes

# Files of systems and tools. Files and folders whose names begin with a dot are left out, too.
_LITTER = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
_LITTER_FILES = {"thumbs.db", "desktop.ini"}


@dataclass
class LeftOut:
    """Contents of a folder that are not used."""

    suffixes: Counter[str] = field(default_factory=Counter)
    """How many files of other kinds there are in the class folders, by the ending of their names."""
    num_beside: int = 0
    """Images outside of the class folders."""
    loops: list[str] = field(default_factory=list)
    """Links to a folder that contains the link itself."""


class FolderImages:
    """The image files in the class folders of a folder, in the order of their names."""

    num_channels = 3

    def __init__(self, path: Path, *, needs_all_classes: bool = True, expected: int | None = None) -> None:
        """List the files.

        Args:
            path: The folder.
            needs_all_classes: Whether to refuse empty class folders, and a single class. If not, empty class
                folders are ignored.
            expected: The `fingerprint` of the folder when it was opened before, if it was.

        Raises:
            UserError: A class has no image, there are fewer than two classes, or the folder cannot be read or has
                changed.
        """
        self.path = path
        self.needs_all_classes = needs_all_classes
        self.left_out = LeftOut()
        self.places: NDArray[np.int64] | None = None  # for a part: its places in the whole
        try:
            files = _Listing(path, readable_suffixes(), self.left_out).read()
        except OSError as error:
            raise UserError(
                f"`{error.filename}` must be a folder that can be read, but: {error.strerror}. "
                "Name a folder of class folders, or one with MNIST's files."
            ) from error
        self._check(files)
        self.classes = [name for name, images in files.items() if images]
        self.files = [name for images in files.values() for name in images]
        counts = [len(files[name]) for name in self.classes]
        self.labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        self.fingerprint = zlib.crc32("\n".join(self.files).encode("utf-8", "surrogateescape"))
        if expected is not None and expected != self.fingerprint:
            raise UserError(
                f"The images in `{path}` must stay the same while they are in use, but have changed. "
                "Start the same command again."
            )

    def _check(self, files: dict[str, list[str]]) -> None:
        if len(files) < (2 if self.needs_all_classes else 1):
            found = next(iter(files), "none")
            wanted = "each of two or more classes" if self.needs_all_classes else "each class"
            raise UserError(
                f"`{self.path}` must hold a folder of images for {wanted}, but of folders it has: {found}. "
                "Name a folder of class folders, or one with MNIST's files."
            )
        for name in files:
            if not name.isprintable():
                raise UserError(
                    f"The name of a class must be printable, but {shown(name)} in `{self.path}` is not. Rename it."
                )
        kinds = ", ".join(readable_suffixes())
        empty = [name for name, images in files.items() if not images]
        if len(empty) == len(files):
            raise UserError(
                f"`{self.path}` must hold images ({kinds}), but its class folders have none. Fill them."
            )
        if empty and self.needs_all_classes:
            raise UserError(
                f"`{self.path / empty[0]}` must hold images of its class ({kinds}), but has none. Fill it, or let "
                "the model do without the class: remove the folder here and where the validation images are."
            )

    def part(self, places: NDArray[np.int64]) -> Self:
        """Return some of the images, with the same list of classes."""
        part = copy.copy(self)
        part.places = places if self.places is None else self.places[places]
        part.files = [self.files[place] for place in places]
        part.labels = self.labels[places]
        return part

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen_folder, (self.path, self.needs_all_classes, self.fingerprint, self.places)

    def __len__(self) -> int:
        return len(self.files)

    def label(self, index: int) -> int:
        """Return the label of an image."""
        return int(self.labels[index])

    def name(self, index: int) -> str:
        """Return the name of an image: its file path below the folder."""
        return self.files[index]

    def image(self, index: int) -> Image.Image:
        """Read an image, as RGB.

        Raises:
            UnreadableImage: The file is damaged, or is not an image of 8 or 16 bits a channel.
        """
        return read_image(self.path / self.files[index])

    def look_at(self, index: int) -> None:
        """Check whether a file seems to be complete (`image_files.look_at`).

        Raises:
            UnreadableImage: It cannot be read.
        """
        look_at(self.path / self.files[index])


def _reopen_folder(
    path: Path, needs_all_classes: bool, fingerprint: int, places: NDArray[np.int64] | None
) -> FolderImages:
    whole = FolderImages(path, needs_all_classes=needs_all_classes, expected=fingerprint)
    return whole if places is None else whole.part(places)


class _Listing:
    """One reading of a folder of class folders."""

    def __init__(self, path: Path, suffixes: tuple[str, ...], left_out: LeftOut) -> None:
        self.path = path
        self.suffixes = suffixes
        self.left_out = left_out

    def read(self) -> dict[str, list[str]]:
        """Return the sorted classes, each with its sorted files at any depth, as paths below the folder."""
        chain = (os.path.realpath(self.path),)
        with os.scandir(self.path) as entries:
            found = sorted(
                (entry for entry in entries if not _is_litter(entry)), key=lambda entry: entry.name
            )
        files = {}
        for entry in found:
            if not _is_folder(entry):
                self.left_out.num_beside += self._is_image(entry)
            elif (further := self._enter(entry, chain)) is not None:
                files[entry.name] = sorted(self._walk(self.path / entry.name, entry.name, further))
        return files

    def _walk(self, folder: Path, within: str, chain: tuple[str, ...]) -> Iterator[str]:
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if not _is_litter(entry)]
        for entry in found:
            name = f"{within}/{entry.name}"
            if _is_folder(entry):
                if (further := self._enter(entry, chain)) is not None:
                    yield from self._walk(folder / entry.name, name, further)
            elif self._is_image(entry):
                yield name
            else:
                self.left_out.suffixes[Path(entry.name).suffix.lower()] += 1

    def _enter(self, entry: os.DirEntry[str], chain: tuple[str, ...]) -> tuple[str, ...] | None:
        """Return the real paths of the folders down to this one, or None if it is a link back to one of them."""
        if not entry.is_symlink():
            return (*chain, f"{chain[-1].removesuffix(os.sep)}{os.sep}{entry.name}")
        target = os.path.realpath(entry.path)
        if any(os.path.commonpath((target, passed)) == target for passed in chain):
            self.left_out.loops.append(entry.path)
            return None
        return (*chain, target)

    def _is_image(self, entry: os.DirEntry[str]) -> bool:
        """Return whether a file is an image by its name. A broken link counts as one, a pipe does not."""
        if not entry.name.lower().endswith(self.suffixes):
            return False
        if not entry.is_symlink():
            return entry.is_file()
        path = Path(entry.path)
        return path.is_file() or not path.exists()


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_litter(entry: os.DirEntry[str]) -> bool:
    name = entry.name
    return name.startswith(".") or name in _LITTER or name.lower() in _LITTER_FILES
