"""Two parallel text files, read once from front to back, as blocks of pairs."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from nmt.data.text_lines import LineBuffer, TextReader
from nmt.errors import UserError

BLOCK_BYTES = 4 * 2**20  # both sides together


class Block(NamedTuple):
    """Consecutive pairs; each side holds `num_pairs` lines, each with a newline at its end."""

    first_line: int  # 1-based number of its first line in the files
    num_pairs: int
    source: bytes
    target: bytes


def read_blocks(source: Path, target: Path, *, block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
    """Cut two files at the same lines, into blocks of about `block_bytes` (more only for a longer pair).

    Memory holds a few blocks, even if the lengths of the two sides differ much.

    Raises:
        UserError: The files have different numbers of lines (both counts are given), or a .gz is damaged.
    """
    with ExitStack() as stack:
        sides = [LineBuffer(stack.enter_context(TextReader(path))) for path in (source, target)]
        first_line = 1
        while True:
            at_hand = [side.fill(block_bytes // 2) for side in sides]
            num_pairs = min(at_hand)
            if num_pairs == 0:
                break
            yield Block(first_line, num_pairs, *(side.take(num_pairs) for side in sides))
            first_line += num_pairs
        counts = [first_line - 1 + side.count_rest() for side in sides]
        if counts[0] != counts[1]:
            raise unequal_counts(source, counts[0], target, counts[1])


def unequal_counts(source: Path, num_source: int, target: Path, num_target: int) -> UserError:
    """Say that two files are not parallel."""
    return UserError(
        f"{source} and {target} must have the same number of lines, "
        f"but have {num_source:,} and {num_target:,}. "
        "Line i of one must be the translation of line i of the other."
    )
