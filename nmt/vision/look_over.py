"""Check images before a model is trained on them, and tell the user about faults."""

import sys
import time
from concurrent.futures import ThreadPoolExecutor

from nmt.distributed import World
from nmt.errors import UserError
from nmt.vision.dataset import ImageExamples, remedy
from nmt.vision.image_files import UnreadableImage, without_pillows_warnings
from nmt.vision.stored import StoredImages

_NUM_THREADS = 16  # for file systems that answer slowly; the heads themselves are read one at a time
_BLOCK = 4096
_SECONDS_BETWEEN_LINES = 15
_NUM_NAMED = 5


def look_at_files(examples: ImageExamples, *, split: str, world: World) -> list[str]:
    """Look at the head and the end of each image file; every rank calls it, and each takes its share.

    Damage in the middle of a file is not found.

    Args:
        examples: Learns which of its images cannot be read.
        split: What to call the images in messages.
        world: The ranks.

    Returns:
        A line about images that are left out, if there are any.

    Raises:
        UserError: More than `examples.max_unreadable` images cannot be read.
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
    """Return the images that cannot be read, and what is wrong with them."""
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
