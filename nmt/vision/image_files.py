"""Single image files: the kinds that are read, how, and a quick check whether a file can be read.

Pillow takes the kind of a file from its first bytes, and not from its name. The allowed kinds are listed here,
because some that Pillow knows start other programs (PostScript).
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image, features

from nmt.errors import UserError


class Kind(NamedTuple):
    """A kind of image file."""

    name: str
    """Pillow's name of it."""
    suffixes: tuple[str, ...]
    feature: str | None = None
    """The feature that Pillow must have been built with."""


KINDS = (
    Kind("JPEG", (".jpg", ".jpeg", ".jpe", ".jfif")),
    Kind("PNG", (".png", ".apng")),
    Kind("GIF", (".gif",)),
    Kind("BMP", (".bmp",)),
    Kind("DIB", (".dib",)),
    Kind("PPM", (".ppm", ".pgm", ".pbm", ".pnm")),
    Kind("TIFF", (".tif", ".tiff")),
    Kind("WEBP", (".webp",), "webp"),
    Kind("AVIF", (".avif",), "avif"),
    Kind("JPEG2000", (".jp2", ".j2k"), "jpg_2000"),
)

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The operation that turns an image upright, for each orientation that a camera may note."""
_ORIENTATION = 274  # the tag of EXIF
_IEND = b"\0\0\0\0IEND\xaeB`\x82"
_TIFF_PLACES = ((273, 279), (324, 325))  # tags: offsets and byte counts of strips, and of tiles


class UnreadableImage(UserError):
    """An image file is damaged, missing, or of a kind that is not read; the text does not say what to do."""


def readable_suffixes() -> tuple[str, ...]:
    """Return the file name endings, in small letters, that the installed Pillow can read."""
    Image.init()
    kinds = (kind for kind in KINDS if kind.name in Image.OPEN)
    return tuple(
        suffix
        for kind in kinds
        if kind.feature is None or features.check(kind.feature)
        for suffix in kind.suffixes
    )


def read_image(path: Path) -> Image.Image:
    """Read an image file as RGB, turned upright; from an animation, the first picture.

    Transparency is ignored: a transparent pixel shows the colour that is stored for it. Of 16 bits a channel, the
    higher 8 are kept.

    Raises:
        UnreadableImage: The file is damaged, missing, or not an image of 8 or 16 bits a channel.
    """
    with without_pillows_warnings():
        return _read(path)


def look_at(path: Path) -> None:
    """Read the head of an image file and check whether its end is there; decode the image only if that is unclear.

    Damage in the middle is not found. Call it within `without_pillows_warnings`; several threads may call it.

    Raises:
        UnreadableImage: As `read_image`.
    """
    with _named(path), path.open("rb") as file, Image.open(file, formats=_formats()) as image:
        _check_depth(image, path)
        is_whole = _has_its_end(image, file)
    if not is_whole:
        _read(path)


@contextmanager
def without_pillows_warnings() -> Iterator[None]:
    """Hide Pillow's warnings about odd metadata, which do not matter, and about large images below its limit."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _read(path: Path) -> Image.Image:
    with _named(path), Image.open(path, formats=_formats()) as image:
        _check_depth(image, path)
        image.load()
        upright = _turn(image)
        if upright.mode.startswith("I"):  # convert() would clip these to white
            upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
        upright.info.pop("transparency", None)  # convert() would look for the transparent colour first
        return upright.convert("RGB")


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn any error of Pillow into one line that names the image file."""
    try:
        yield
    except UnreadableImage:
        raise
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise UnreadableImage(f"`{path}` must have at most {limit:,} pixels, but has more.") from error
    except Exception as error:  # damaged bytes make Pillow's decoders raise errors of any kind
        if isinstance(error, OSError) and error.strerror is not None:
            reason = error.strerror
        elif isinstance(error, Image.UnidentifiedImageError):
            reason = "it is of no kind that is read here" if path.stat().st_size else "it is empty"
        else:
            reason = " ".join(str(error).split()) or type(error).__name__
        text = f"`{path}` must be an image, but cannot be read as one: {reason.rstrip('.')}."
        raise UnreadableImage(text) from error


def _formats() -> list[str]:
    """Return Pillow's names of the kinds that it can read; an older Pillow lacks some."""
    if "TIFF" not in Image.OPEN:
        Image.init()
    return [kind.name for kind in KINDS if kind.name in Image.OPEN]


def _check_depth(image: Image.Image, path: Path) -> None:
    """Refuse kinds of numbers whose black and white are not defined."""
    is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if image.mode in ("I", "F") and not is_16_bit:
        raise UnreadableImage(
            f"`{path}` must have 8 or 16 bits a channel, but is of Pillow's mode {image.mode}."
        )


def _turn(image: Image.Image) -> Image.Image:
    """Turn an image upright; an image with damaged metadata stays as it is."""
    try:
        how = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # of any kind, as with Pillow's decoders
        how = None
    return image if how is None else image.transpose(how)


def _has_its_end(image: Image.Image, file: BinaryIO) -> bool:
    """Return whether the end of a file is there; False if that is unclear.

    Files of kinds that are not checked here count as complete.
    """
    size = os.fstat(file.fileno()).st_size

    def tail(length: int) -> bytes:
        file.seek(max(0, size - length))
        return file.read(length)

    match image.format:
        case "JPEG" | "MPO":
            return tail(2) == b"\xff\xd9"
        case "PNG":
            return tail(len(_IEND)) == _IEND
        case "GIF":
            return tail(1) == b";"
        case "WEBP":
            file.seek(4)
            return int.from_bytes(file.read(4), "little") + 8 <= size
        case "BMP" | "PPM":
            return all(_ends_before(tile, image, size) for tile in image.tile)
        case "TIFF":
            return _tiff_ends_before(image, size)
    return True


def _ends_before(tile: Any, image: Image.Image, size: int) -> bool:
    """Return whether the pixels of an uncompressed part end within the file."""
    is_raw = tile[0] == "raw"
    bits = {"1": 1, "L": 8, "P": 8, "RGB": 24}.get(image.mode)
    if not is_raw or bits is None:
        return False
    return tile[2] + image.height * (-(-image.width * bits // 8)) <= size


def _tiff_ends_before(image: Image.Image, size: int) -> bool:
    """Return whether all strips or tiles of a TIFF file end within it."""
    tags: Any = image.tag_v2
    for at, length in _TIFF_PLACES:
        if at in tags and length in tags:
            offsets, counts = (
                value if isinstance(value, tuple) else (value,) for value in (tags[at], tags[length])
            )
            return all(offset + count <= size for offset, count in zip(offsets, counts, strict=True))
    return False
