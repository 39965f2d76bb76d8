"""What can be known of images before a model is trained on them, and what a user should be told."""

import filecmp
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np

from nmt.distributed import World
from nmt.errors import UserError
from nmt.vision.dataset import ImageExamples, remedy
from nmt.vision.folders import FolderImages
from nmt.vision.image_files import UnreadableImage, without_pillows_warnings
from nmt.vision.stored import StoredImages

_NUM_THREADS = 16  # for file systems that are slow to answer; heads are read by one at a time
_BLOCK = 4096
_SECONDS_BETWEEN_LINES = 15
_NUM_NAMED = 5
_NUM_KINDS = 8
_NUM_COMPARED = 20


def look_at_files(examples: ImageExamples, *, split: str, world: World) -> list[str]:
    """Look at the head and the end of each image file; every rank calls it, and each takes its share.

    Damage in the middle of a file is not found.

    Args:
        examples: Learns which of its images cannot be read.
        split: What to call them.
        world: The ranks.

    Returns:
        A line about images that are left out, if there are any.

    Raises:
        UserError: There are more than `examples.max_unreadable`.
    """
    mine = range(world.rank, len(examples), world.size)
    found = [pair for part in world.gather(_unreadable(examples, mine, split, world)) for pair in part]
    if not found:
        return []
    found.sort()
    count = len(found)
    if count > examples.max_unreadable:
        text = found[0][1]
        if count > 1:
            text = (
                f"`max-bad-images` must be at least the number of {split} images that cannot be read, but is "
                f"{examples.max_unreadable}, and there are {count:,} of {len(examples):,}. The first: {text}"
            )
        raise UserError(f"{text} {remedy(count)}")
    examples.unreadable |= {index for index, _ in found}
    reasons = " ".join(text for _, text in found[:_NUM_NAMED])
    more = f" And {count - _NUM_NAMED:,} more." if count > _NUM_NAMED else ""
    return [f"left out: {split} images that cannot be read: {count:,} of {len(examples):,}. {reasons}{more}"]


def _unreadable(examples: ImageExamples, indices: range, split: str, world: World) -> list[tuple[int, str]]:
    """Return which of some images cannot be read, and what is wrong with them."""
    if isinstance(examples.source, StoredImages):
        return []

    def look(index: int) -> tuple[int, str] | None:
        try:
            examples.source.look_at(index)
        except UnreadableImage as error:
            return index, str(error)
        return None

    found: list[tuple[int, str]] = []
    last_line = time.monotonic()
    with without_pillows_warnings(), ThreadPoolExecutor(_NUM_THREADS) as threads:
        for start in range(0, len(indices), _BLOCK):
            if world.is_main and time.monotonic() - last_line > _SECONDS_BETWEEN_LINES:
                print(f"{split} images: {start:,} of {len(indices):,} looked at", file=sys.stderr)
                last_line = time.monotonic()
            found += [pair for pair in threads.map(look, indices[start : start + _BLOCK]) if pair is not None]
    return found


def describe_images(examples: ImageExamples) -> list[str]:
    """Return lines on what a folder holds besides the images that are taken, and on classes without any."""
    source = examples.source
    lines = []
    if isinstance(source, FolderImages):
        left_out = source.left_out
        if left_out.suffixes:
            kinds = left_out.suffixes.most_common()
            shown = ", ".join(
                f"{count:,} {suffix or 'without an ending'}" for suffix, count in kinds[:_NUM_KINDS]
            )
            more = f", and {len(kinds) - _NUM_KINDS:,} more kinds" if len(kinds) > _NUM_KINDS else ""
            where = f"files in the class folders of `{source.path}`"
            lines.append(f"left out: {where} that are of kinds not read: {shown}{more}")
        if left_out.num_beside:
            lines.append(
                f"left out: images beside the class folders of `{source.path}`: {left_out.num_beside:,}"
            )
        lines += [f"left out: `{path}` is a link to a folder that it stands in" for path in left_out.loops]
    present = {examples.label(index) for index in _one_of_each(source.labels)}
    missing = [name for label, name in enumerate(examples.classes) if label not in present]
    if missing:
        part = f" ({source.split})" if isinstance(source, StoredImages) else ""
        count = f"{len(missing):,} of {len(examples.classes):,}"
        lines.append(f"warning: classes without an image in `{source.path}`{part}: {count}, {named(missing)}")
    return lines


def _one_of_each(labels: np.ndarray) -> list[int]:
    """Return the place of one image of each label."""
    return np.unique(labels, return_index=True)[1].tolist()


def describe_overlap(train: ImageExamples, valid: ImageExamples) -> list[str]:
    """Return a warning if validation images are those that the model learns."""
    one, other = train.source, valid.source
    if isinstance(one, StoredImages) and isinstance(other, StoredImages):
        is_same = np.array_equal(one.images, other.images)
    elif isinstance(one, FolderImages) and isinstance(other, FolderImages):
        is_same = _hold_the_same(one, other)
    else:
        is_same = False
    if not is_same:
        return []
    return [
        f"warning: the validation images in `{other.path}` are the training images. What is measured says nothing "
        "about others; keep some apart"
    ]


def _hold_the_same(one: FolderImages, other: FolderImages) -> bool:
    """Return whether two folders are one, or one is a copy of the other, by some of its files."""
    if one.files != other.files:
        return False
    if one.path.samefile(other.path):
        return True
    step = -(-len(one) // _NUM_COMPARED)
    return all(_are_equal(one.path / name, other.path / name) for name in islice(one.files, 0, None, step))


def _are_equal(one: Path, other: Path) -> bool:
    try:
        return filecmp.cmp(one, other, shallow=False)
    except OSError:
        return False


def named(names: Iterable[str]) -> str:
    """Return some names, quoted, and dots if there are more."""
    shown = list(names)
    return ", ".join(f"`{name}`" for name in shown[:_NUM_NAMED]) + (
        ", ..." if len(shown) > _NUM_NAMED else ""
    )
