"""A hash that identifies a set of images, without reading all of them."""

import os
from hashlib import blake2b
from pathlib import Path

from nmt.vision.sources import FolderImages, ImageSource, StoredImages


def fingerprint(source: ImageSource) -> str:
    """Return a hash of the images and their labels: of the pixels if they are in memory, else of the file list.

    The list has name, class and size in bytes of each file, because reading all files would take as long as an
    epoch. The path of the folder does not count.
    """
    digest = blake2b(f"{len(source)} {source.classes}".encode("utf-8", "surrogateescape"), digest_size=16)
    if isinstance(source, StoredImages):
        for array in (source.images, source.labels):
            digest.update(f"{array.shape}".encode())
            digest.update(array.data)
        return digest.hexdigest()
    assert isinstance(source, FolderImages), "the two kinds of sources that there are"
    for index, name in enumerate(source.files):
        size = _size(source.path / name)
        digest.update(os.fsencode(f"{name}\0{source.label(index)}\0{size}\n"))
    return digest.hexdigest()


def _size(path: Path) -> int:
    """Return the size of a file in bytes; -1 for a missing one, which a later check reports."""
    try:
        return path.stat().st_size
    except OSError:
        return -1
