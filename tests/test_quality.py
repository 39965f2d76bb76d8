"""The signals that need no reference, worked out by hand."""

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmt.translation.quality import Signals, copied_share, find_signals, num_missing_numbers, repeated_share

FINE = Signals(0.1, 0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("tokens", "share"),
    [
        ("", 0.0),
        ("a", 0.0),
        ("a b c", 0.0),
        ("a a a a", 2 / 3),  # three bigrams, one kind
        ("a b a b a", 2 / 4),  # ab, ba, ab, ba
    ],
)
def test_repetition_is_the_share_of_bigrams_that_came_before(tokens: str, share: float) -> None:
    assert repeated_share(tokens.split()) == pytest.approx(share)


@pytest.mark.parametrize(
    ("source", "text", "num_missing"),
    [
        ("3 dogs and 4 cats", "3 Hunde und 4 Katzen", 0),
        ("3 dogs and 4 cats", "4 Hunde", 1),
        ("3 dogs, 3 cats", "3 Tiere", 1),  # one of the two
        ("1,000.50 dollars", "1.000,50 Dollar", 0),
        ("in 1999.", "1999", 0),  # the full stop belongs to the sentence
        ("at 12:30", "um 12.30 Uhr", 0),
        ("٣ dogs", "3 Hunde", 0),  # ARABIC-INDIC DIGIT THREE
        ("two dogs", "Hunde", 0),
        ("a dog", "7 Hunde", 0),
    ],
)
def test_numbers_in_digits_must_come_back(source: str, text: str, num_missing: int) -> None:
    assert num_missing_numbers(source, text) == num_missing


@pytest.mark.parametrize(
    ("source", "text", "share"),
    [
        ("a dog runs fast", "A dog, runs fast!", 1.0),
        ("a dog runs fast", "ein dog läuft fast", 0.5),
        ("Anna Smith", "Anna Smith", 0.0),  # too few words to tell
        ("1 2 3 4", "1 2 3 4", 0.0),
    ],
)
def test_copied_words_are_counted_without_case_and_punctuation(source: str, text: str, share: float) -> None:
    assert copied_share(source, text) == pytest.approx(share)


def test_confidence_is_the_mean_log_probability_and_length_a_softened_ratio() -> None:
    signals = find_signals(
        "x", "y", source_tokens=range(5), tokens=range(15), token_scores=[-1.0, -2.0, -0.5, -0.5]
    )
    assert signals.low_confidence == pytest.approx(1.0)
    assert signals.strange_length == pytest.approx(math.log(20 / 10))


def test_length_is_strange_in_either_direction() -> None:
    sizes = [(5, 15), (15, 5)]
    up, down = (
        find_signals("x", "y", source_tokens=range(s), tokens=range(t), token_scores=[0.0]) for s, t in sizes
    )
    assert up.strange_length == down.strange_length > 0


@pytest.mark.parametrize(
    ("signals", "flags"),
    [
        (FINE, []),
        (Signals(1.5, 0.0, 0.0, 0.0, 0.0), ["low_confidence"]),
        (Signals(0.1, 1.0, 0.5, 0.0, 0.0), ["strange_length", "repetition"]),
        (Signals(0.1, 0.0, 0.0, 0.9, 2.0), ["copied_source", "missing_number"]),
    ],
)
def test_a_flag_is_raised_beyond_its_limit(signals: Signals, flags: list[str]) -> None:
    assert signals.flags == flags


@given(st.text(), st.text(), st.lists(st.integers(3, 9)), st.lists(st.integers(3, 9)))
def test_any_text_has_finite_signals(
    source: str, text: str, source_tokens: Sequence[int], tokens: Sequence[int]
) -> None:
    signals = find_signals(
        source, text, source_tokens=source_tokens, tokens=tokens, token_scores=[-1.0] * len(tokens)
    )
    values = vars(signals).values()
    assert all(math.isfinite(value) and value >= 0 for value in values)
