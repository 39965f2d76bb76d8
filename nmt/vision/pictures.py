"""Pictures of a model's results on images: a sample with labels, and the confusion matrix.

Legend: B images, C channels, H height, W width, N classes. Pictures are (H, W, 3) uint8.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Picture = NDArray[np.uint8]

MOST_CLASSES = 25
"""The most classes in a confusion matrix that can still be read."""

_BLACK, _WHITE, _GREY = (0, 0, 0), (255, 255, 255), (110, 110, 110)
_RIGHT, _WRONG = (0, 110, 40), (190, 20, 20)
_DARKEST_RIGHT, _DARKEST_WRONG = np.array((8, 48, 107)), np.array((150, 15, 15))
_MARGIN = 12
_COLUMNS = 6
_TILE = 112
_CELL = 44
_NAME_WIDTH = 150


def draw_predictions(
    images: NDArray[np.uint8], labels: NDArray[Any], predicted: NDArray[Any], classes: list[str]
) -> Picture:
    """Draw images with their labels, and with the model's label in red if it is wrong.

    Args:
        images: (B, C, H, W), with 1 or 3 channels.
        labels: The label of each image.
        predicted: The label that the model gives it.
        classes: The names of the classes.
    """
    font = ImageFont.load_default(13)
    line = 17
    columns = min(_COLUMNS, len(images))
    rows = -(-len(images) // columns)
    width, height = _TILE + _MARGIN, _TILE + 2 * line + _MARGIN
    picture = Image.new("RGB", (columns * width + _MARGIN, rows * height + _MARGIN), _WHITE)
    draw = ImageDraw.Draw(picture)
    for place, (image, label, guess) in enumerate(zip(images, labels, predicted, strict=True)):
        left, top = _MARGIN + place % columns * width, _MARGIN + place // columns * height
        picture.paste(_tile(image), (left, top))
        colour = _RIGHT if label == guess else _WRONG
        for number, text in enumerate((f"is {classes[label]}", f"taken for {classes[guess]}")):
            fitted = _fit(text, font, _TILE)
            draw.text((left, top + _TILE + number * line), fitted, fill=(_BLACK, colour)[number], font=font)
    return np.asarray(picture)


def draw_confusion(counts: NDArray[np.int64], classes: list[str]) -> Picture:
    """Draw how many images of each class are taken for each class; the shade is the share of the row.

    Args:
        counts: (N, N): images of class i taken for class j. With more than `MOST_CLASSES` classes, only the most
            confused are drawn.
        classes: The names of the classes.
    """
    shown = most_confused(counts, MOST_CLASSES)
    font, small = ImageFont.load_default(14), ImageFont.load_default(12)
    names = [_fit(classes[i], font, _NAME_WIDTH) for i in shown]
    margin = max([*(int(font.getlength(name)) for name in names), 60]) + 2 * _MARGIN
    title = f"{counts.trace():,} of {counts.sum():,} right"
    if len(shown) < len(classes):
        title += f"; the {len(shown)} most confused of {len(classes):,} classes"
    left, top = margin + 20, margin + 50
    side = len(shown) * _CELL
    width = max(left + side + _MARGIN, 2 * _MARGIN + int(font.getlength(title)))
    picture = Image.new("RGB", (width, top + side + _MARGIN), _WHITE)
    draw = ImageDraw.Draw(picture)
    draw.text((_MARGIN, _MARGIN), title, fill=_BLACK, font=font)
    draw.text((left, _MARGIN + 24), "taken for", fill=_GREY, font=font)
    _draw_upright(picture, "is", (_MARGIN, top + 40), font, _GREY)
    totals = counts.sum(axis=1)
    for row, label in enumerate(shown):
        y = top + row * _CELL
        draw.text((left - 8, y + _CELL // 2), names[row], fill=_BLACK, font=font, anchor="rm")
        _draw_upright(picture, names[row], (left + row * _CELL + _CELL // 2 - 9, top - 8), font, _BLACK)
        for column, guess in enumerate(shown):
            x = left + column * _CELL
            share = counts[label, guess] / max(totals[label], 1)
            darkest = _DARKEST_RIGHT if label == guess else _DARKEST_WRONG
            colour = tuple(np.rint(255 + share**0.5 * (darkest - 255)).astype(int).tolist())
            draw.rectangle((x, y, x + _CELL - 2, y + _CELL - 2), fill=colour)
            if counts[label, guess]:
                ink = _WHITE if share > 0.2 else _BLACK
                text = _short(int(counts[label, guess]))
                draw.text((x + _CELL // 2 - 1, y + _CELL // 2 - 1), text, fill=ink, font=small, anchor="mm")
    return np.asarray(picture)


def most_confused(counts: NDArray[np.int64], limit: int) -> list[int]:
    """Return at most `limit` classes, in their order: those with the most errors from them or to them."""
    wrong = counts.sum(axis=0) + counts.sum(axis=1) - 2 * counts.diagonal()
    return sorted(np.argsort(-wrong, kind="stable")[:limit].tolist())


def _tile(image: NDArray[np.uint8]) -> Image.Image:
    """Return an image of (C, H, W) at the size of a tile; a small one keeps its pixels visible."""
    pixels = np.repeat(image, 3, axis=0) if len(image) == 1 else image
    whole = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    how = Image.Resampling.NEAREST if max(whole.size) <= _TILE // 2 else Image.Resampling.BILINEAR
    return whole.resize((_TILE, _TILE), how)


def _fit(text: str, font: Any, width: int) -> str:
    """Cut a text that is too wide."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def _short(count: int) -> str:
    """Return a number in at most five characters."""
    for size, sign in ((10**6, "M"), (10**4, "k")):
        if count >= size:
            return f"{count / (10**6 if sign == 'M' else 1000):.3g}{sign}"
    return str(count)


def _draw_upright(
    picture: Image.Image, text: str, place: tuple[int, int], font: Any, colour: tuple[int, int, int]
) -> None:
    """Write a vertical text, from the bottom up; `place` is its lower left corner."""
    strip = Image.new("RGB", (int(font.getlength(text)) + 2, 18), _WHITE)
    ImageDraw.Draw(strip).text((1, 0), text, fill=colour, font=font)
    turned = strip.rotate(90, expand=True)
    picture.paste(turned, (place[0], place[1] - turned.height))
