"""What is shown of foreign text: one line, printable, short, and still the sentence that it was."""

import pickle
import re

from hypothesis import given
from hypothesis import strategies as st

from nmt.errors import LostRankError, UserError, one_line, printable, shown

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()) | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
)
LONE_SURROGATE = "\ud800"


@given(st.text(st.characters(categories=["Cc", "Cf", "Cs", "L", "Zs"]), max_size=3000))
def test_a_message_is_one_short_line_of_printable_characters(text: str) -> None:
    error = UserError(text)
    assert str(error).isprintable()
    assert len(str(error)) <= 2000
    str(error).encode("utf-8")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)  # as worker processes hand it on


@given(st.text(st.characters(categories=["L", "N", "P"]), max_size=200))
def test_what_prints_stays_as_it_is(text: str) -> None:
    assert one_line(text) == printable(text) == text


def test_escape_sequences_are_shown_and_not_sent() -> None:
    text = str(LostRankError("`\x1b]0;title\x07` is no name,\nbut \u202e\ud800."))
    assert text == r"`\x1b]0;title\x07` is no name, but \u202e\ud800."


def test_the_end_of_a_long_message_stays() -> None:
    text = str(UserError(f"`x` must be short, but is {'y' * 1_000_000}. Take a shorter one."))
    assert re.fullmatch(r"`x` must be short, but is y+\.\.\.y+\. Take a shorter one\.", text)
    assert len(text) < 150
    text = str(UserError(f"`x` must be short, but is {'y ' * 1_000_000}. Take a shorter one."))
    assert text.endswith("Take a shorter one.") and len(text) == 2000


@given(ANYTHING)
def test_any_value_is_shown_in_some_eighty_characters(value: object) -> None:
    text = shown(value)
    assert len(text) <= 80
    assert text.isprintable()


def test_values_without_end_are_shown() -> None:
    deep: object = ()
    for _ in range(100_000):
        deep = (deep, deep)
    assert shown(deep) == "((a tuple of 2, a tuple of 2), (a tuple of 2, a tuple of 2))"
    assert shown(10**5000) == "a number of some 5,000 digits"
    assert shown("x" * 1_000_000).startswith("'xxx")
    assert shown(1) == "1" and shown("de") == "'de'" and shown([1, "a"]) == "[1, 'a']"
