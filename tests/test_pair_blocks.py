"""Blocks of pairs: both sides are cut at the same line."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmt.data.pair_blocks import read_blocks
from nmt.errors import UserError

BOM = b"\xef\xbb\xbf"

# Bytes that are likely to meet, and whatever else
_bytes = st.lists(
    st.sampled_from([b"\n", b"\r", b"\x0c", b"a", "\u2028\u0085é".encode(), BOM]) | st.binary()
).map(b"".join)


@given(
    pairs=st.lists(st.tuples(_bytes, _bytes), max_size=40),
    last_newlines=st.tuples(st.booleans(), st.booleans()),
    block_bytes=st.integers(2, 300),
)
@settings(deadline=None)
def test_blocks_are_whole_pairs_in_order(
    tmp_path_factory: pytest.TempPathFactory,
    pairs: list[tuple[bytes, bytes]],
    last_newlines: tuple[bool, bool],
    block_bytes: int,
) -> None:
    folder = tmp_path_factory.mktemp("blocks")
    # A last line must not be empty, or leaving out its newline would leave out the line.
    sides = [
        [side.replace(b"\n", b"") for side in column] + [b"end"] for column in zip(*pairs, strict=True)
    ] or [
        [b"x"],
        [b"y"],
    ]
    paths = [folder / "source", folder / "target"]
    for path, lines, last_newline in zip(paths, sides, last_newlines, strict=True):
        path.write_bytes(BOM + b"\n".join(lines) + b"\n" * last_newline)
    blocks = list(read_blocks(*paths, block_bytes=block_bytes))
    assert b"".join(block.source for block in blocks) == b"".join(line + b"\n" for line in sides[0])
    assert b"".join(block.target for block in blocks) == b"".join(line + b"\n" for line in sides[1])
    next_line = 1
    for block in blocks:
        assert block.first_line == next_line
        assert block.num_pairs == block.source.count(b"\n") == block.target.count(b"\n") > 0
        next_line += block.num_pairs


def test_blocks_are_of_the_size_asked_for_however_the_sides_differ(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes((b"x" * 99 + b"\n") * 5000)
    (tmp_path / "target").write_bytes(b"y\n" * 5000)
    blocks = list(read_blocks(tmp_path / "source", tmp_path / "target", block_bytes=20_000))
    assert max(len(block.source) + len(block.target) for block in blocks) <= 20_000
    assert 50 <= len(blocks) <= 60


def test_line_longer_than_a_block_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"x" * 1_000_000 + b"\nz")
    (tmp_path / "target").write_bytes(b"y\nz")
    blocks = list(read_blocks(tmp_path / "source", tmp_path / "target", block_bytes=1000))
    assert blocks[0].source == b"x" * 1_000_000 + b"\n"
    assert sum(block.num_pairs for block in blocks) == 2


@pytest.mark.parametrize(("num_source", "num_target"), [(3, 1234), (1234, 3), (0, 2)])
def test_different_numbers_of_lines_are_both_counted(
    tmp_path: Path, num_source: int, num_target: int
) -> None:
    (tmp_path / "source").write_bytes(b"a b\n" * num_source)
    (tmp_path / "target").write_bytes(b"c d e\n" * num_target)
    with pytest.raises(UserError, match=f"{num_source:,} and {num_target:,}"):
        list(read_blocks(tmp_path / "source", tmp_path / "target", block_bytes=100))
