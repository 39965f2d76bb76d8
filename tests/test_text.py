"""What a blank line is, and what is left out of a line before anything reads it."""

import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmt.data.text import clean_line, is_blank

NOTHING_TO_SEE = [
    "",
    " ",
    "\t",
    "\r",
    "\u00a0\u3000",  # no-break and ideographic space
    "\u0085",  # NEXT LINE
    "\u2028\u2029",
    "\u00ad",  # soft hyphen
    "\u200b\u200c\u200d\u2060",  # zero width: space, non-joiner, joiner, word joiner
    "\u200e\u200f\u202a\u202c\u2066\u2069\u061c",  # marks of direction
    "\ufeff",
    "\ufe0f\U000e0101",  # selectors of variants
    "\u3164\u115f\uffa0",  # fillers of Hangul
    "\u180e\u034f",
    "\u2800",  # the blank of braille
    "\x00\x07\x1b",
]


@pytest.mark.parametrize("line", NOTHING_TO_SEE)
def test_a_line_with_nothing_to_be_seen_is_blank(line: str) -> None:
    assert is_blank(line)
    assert clean_line(line) == ""


@pytest.mark.parametrize("line", ["a", "\u00ada", " .", "\u200d\u0301", "\u0600", "▁", "\ue000"])
def test_whatever_is_drawn_makes_a_line(line: str) -> None:
    assert not is_blank(line)
    assert clean_line(line) == line


@given(st.text(st.sampled_from("".join(NOTHING_TO_SEE)), max_size=8))
def test_blank_stays_blank_when_put_together(line: str) -> None:
    assert is_blank(line)
    assert not is_blank(line + "a") and not is_blank("a" + line)


def test_all_white_space_of_unicode_is_blank() -> None:
    spaces = [chr(i) for i in range(sys.maxunicode + 1) if chr(i).isspace()]
    assert "\u0085" in spaces
    assert all(map(is_blank, spaces))


def test_no_letter_or_number_is_blank() -> None:
    """But for the fillers of Hangul, which Unicode counts among the letters."""
    drawn = [chr(i) for i in range(sys.maxunicode + 1) if unicodedata.category(chr(i))[0] in "LN"]
    assert {x for x in drawn if is_blank(x)} == set("\u115f\u1160\u3164\uffa0")


def test_line_ends_and_byte_order_marks_are_left_out() -> None:
    assert clean_line("\ufeffa b\r") == "a b"
    assert clean_line("\ufeff\ufeffa\r\r") == "a"
    assert clean_line(" a\rb ") == " a\rb "
