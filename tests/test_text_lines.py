"""The reader: `\\n` alone ends a line."""

import gzip
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmt.data.text_lines import check_file, decode_lines, find_file, read_lines
from nmt.errors import UserError

BOM = b"\xef\xbb\xbf"


def reference_lines(data: bytes) -> list[bytes]:
    lines = data.removeprefix(BOM).split(b"\n")
    return lines[:-1] if lines[-1] == b"" else lines


# Bytes that are likely to meet, and whatever else
_bytes = st.lists(
    st.sampled_from([b"\n", b"\r", b"\x0c", b"a", "\u2028\u0085é".encode(), BOM]) | st.binary()
).map(b"".join)


@given(data=_bytes, is_compressed=st.booleans())
def test_lines_are_what_split_gives(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, is_compressed: bool
) -> None:
    path = tmp_path_factory.mktemp("lines") / ("text.gz" if is_compressed else "text")
    path.write_bytes(gzip.compress(data) if is_compressed else data)
    assert list(read_lines(path)) == reference_lines(data)


def test_file_or_its_compressed_form_is_found(tmp_path: Path) -> None:
    (tmp_path / "train.de.gz").touch()
    (tmp_path / "train.en").touch()
    assert find_file(f"{tmp_path}/train", "de") == tmp_path / "train.de.gz"
    assert find_file(f"{tmp_path}/train", "en") == tmp_path / "train.en"
    with pytest.raises(UserError, match=r"train\.fr must exist"):
        find_file(f"{tmp_path}/train", "fr")


@pytest.mark.parametrize(
    ("data", "num_lines"), [(b"a", 1), (b"a\n", 1), (b"\n", 1), (b"a\rb\xc2\x85c\x0cd\xe2\x80\xa8e\n\nf", 3)]
)
def test_check_counts_lines(tmp_path: Path, data: bytes, num_lines: int) -> None:
    (tmp_path / "text").write_bytes(data)
    assert check_file(tmp_path / "text").num_lines == num_lines


@pytest.mark.parametrize("data", [b"", BOM])
def test_empty_file_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "text").write_bytes(data)
    with pytest.raises(UserError, match="text must hold one sentence per line, but is empty"):
        check_file(tmp_path / "text")


@pytest.mark.parametrize("bad", [b"\xff", b"\xc3", b"\xed\xa0\x80"])
@pytest.mark.parametrize("num_before", [0, 7, 200_000])
def test_line_that_is_not_utf8_is_named(tmp_path: Path, bad: bytes, num_before: int) -> None:
    data = "ein schöner Tag\n".encode() * num_before + b"x" + bad + b"\ny\n"
    (tmp_path / "text").write_bytes(data)
    with pytest.raises(UserError, match=f"text, line {num_before + 1}:"):
        check_file(tmp_path / "text")
    with pytest.raises(UserError, match=f"text, line {num_before + 11}:"):
        decode_lines(data, tmp_path / "text", first_line=11)


def test_character_cut_by_the_end_of_the_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"a\nb\xc3")
    with pytest.raises(UserError, match="text, line 2:"):
        check_file(tmp_path / "text")


def test_damaged_gzip_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(b"a sentence\n" * 1000)
    for name, data in {
        "cut.gz": whole[:-20],
        "plain.gz": b"a sentence\n",
        "bent.gz": whole[:30] + b"xx" + whole[32:],
    }.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=f"{name} must be a whole gzip file"):
            check_file(tmp_path / name)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_decoded_lines_are_split_at_newlines_only_and_end_before_a_carriage_return(text: str) -> None:
    lines = [line.rstrip("\r") for line in text.split("\n")]
    assert decode_lines((text + "\n").encode(), Path("text"), first_line=1) == lines


@pytest.mark.parametrize("num_lines", [1, 100_000])
def test_compressed_text_whose_name_does_not_say_so_is_not_told_to_be_converted(
    tmp_path: Path, num_lines: int
) -> None:
    (tmp_path / "text").write_bytes(gzip.compress(b"a sentence\n" * num_lines))
    with pytest.raises(UserError, match=r"text must be text, but is compressed.*`\.gz`"):
        check_file(tmp_path / "text")
    with pytest.raises(UserError, match=r"text must be text, but is compressed.*`\.gz`"):
        decode_lines((tmp_path / "text").read_bytes(), tmp_path / "text", first_line=1)
