"""Notes for the user on a folder of images: other files in it, and missing classes."""

from collections.abc import Iterable, Sequence

import numpy as np

from nmt.errors import counted
from nmt.vision.sources import FolderImages, ImageSource, StoredImages

_NUM_NAMED = 5
_NUM_KINDS = 8


def describe_images(source: ImageSource, classes: Sequence[str]) -> list[str]:
    """Return lines on files that are not used, and on classes without images."""
    lines = []
    if isinstance(source, FolderImages):
        left_out = source.left_out
        if left_out.suffixes:
            kinds = left_out.suffixes.most_common()
            shown = ", ".join(
                f"{count:,} {suffix or 'without an ending'}" for suffix, count in kinds[:_NUM_KINDS]
            )
            more = f", and {counted(len(kinds) - _NUM_KINDS, 'more kind')}" if len(kinds) > _NUM_KINDS else ""
            where = f"files in the class folders of `{source.path}`"
            lines.append(f"left out: {where} that are of kinds not read: {shown}{more}")
        if left_out.num_beside:
            lines.append(
                f"left out: images beside the class folders of `{source.path}`: {left_out.num_beside:,}"
            )
        lines += [f"left out: `{path}` is a link to a folder that it stands in" for path in left_out.loops]
    present = {source.classes[label] for label in np.unique(source.labels)}
    missing = [name for name in classes if name not in present]
    if missing:
        part = f" ({source.split})" if isinstance(source, StoredImages) else ""
        count = f"{len(missing):,} of {len(classes):,}"
        lines.append(f"warning: classes without an image in `{source.path}`{part}: {count}, {named(missing)}")
    return lines


def named(names: Iterable[str]) -> str:
    """Return the first names, quoted, and dots if there are more."""
    shown = list(names)
    return ", ".join(f"`{name}`" for name in shown[:_NUM_NAMED]) + (
        ", ..." if len(shown) > _NUM_NAMED else ""
    )
