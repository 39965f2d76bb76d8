"""Validation images that are held out from the training images: how they are chosen and remembered."""

import json
from collections.abc import Collection
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nmt.config.records import parse_json, read_limited
from nmt.errors import UserError
from nmt.vision.folders import FolderImages
from nmt.vision.stored import StoredImages

SPLIT = "split.json"


def draw(images: FolderImages | StoredImages, fraction: float, *, seed: int) -> list[str]:
    """Return the names of a share of the images of each class: those with the smallest hashes.

    So the choice depends only on the names and the seed. If a class has two or more images, at least one is drawn
    and at least one is left.
    """
    salt = str(seed).encode()
    hashes = np.array(
        [
            int.from_bytes(
                blake2b(images.name(i).encode("utf-8", "surrogateescape"), key=salt, digest_size=8).digest()
            )
            for i in range(len(images))
        ],
        dtype=np.uint64,
    )
    drawn: list[int] = []
    for label in range(len(images.classes)):
        places = np.flatnonzero(images.labels == label)
        count = min(max(round(fraction * len(places)), 1), len(places) - 1)
        drawn += places[np.argsort(hashes[places], kind="stable")[: max(count, 0)]].tolist()
    return [images.name(place) for place in sorted(drawn)]


def divide(
    images: FolderImages | StoredImages, names: Collection[str]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the places of the images that are not among the names, and the places of those that are.

    Raises:
        UserError: One of the two is empty.
    """
    wanted = set(names)
    is_held_out = np.array([images.name(index) in wanted for index in range(len(images))], dtype=bool)
    if is_held_out.all() or not is_held_out.any():
        which = "others than" if is_held_out.any() else "some of"
        raise UserError(
            f"`{images.path}` must have {which} the images ({len(wanted):,}) that are held out for "
            "validation, but has none. Name the folder that the model was trained with, or other "
            "validation images by `val-dir`."
        )
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)


def write_split(folder: Path, names: list[str], classes: list[str]) -> None:
    """Write the names of the images that are held out, and the label of each class."""
    record = {"classes": {name: label for label, name in enumerate(classes)}, "valid": names}
    (folder / SPLIT).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def read_split(folder: Path) -> list[str] | None:
    """Return the names of the images that were held out; None if none were.

    Raises:
        UserError: The file is damaged.
    """
    path = folder / SPLIT
    if not path.is_file():
        return None
    try:
        names = parse_json(read_limited(path))["valid"]
    except (ValueError, KeyError, TypeError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(
            f"`{path}` must say which images are held out, but is damaged. Get the model folder anew."
        )
    return names
