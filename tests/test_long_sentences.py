"""Cutting long texts, and joining what became of the parts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmt.generation.beam_search import Hypothesis
from nmt.translation.long_sentences import join_hypotheses, join_texts, split_ids, split_text


def words(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize(
    ("text", "limit", "parts"),
    [
        ("a b c", 3, ["a b c"]),
        ("A b. C d! E f?", 2, ["A b.", "C d!", "E f?"]),
        ("a b c. d e", 3, ["a b c.", "d e"]),
        ("a, b; c d", 2, ["a, b;", "c d"]),  # the better mark goes first
        ("a b, c d", 2, ["a b,", "c d"]),
        ("a, b c d e, f", 4, ["a,", "b c d e,", "f"]),
        ("a b c d", 2, ["a b", "c d"]),
        ('"A b." C d', 2, ['"A b."', "C d"]),
        ("3.5 a 2.5 b", 2, ["3.5 a", "2.5 b"]),  # no cut within a number
        ("क ख। ग घ", 2, ["क ख।", "ग घ"]),
        ("ا ب؟ ج د، ه", 2, ["ا ب؟", "ج د،", "ه"]),
        ("  a  ", 1, ["a"]),
        ("   ", 1, []),
    ],
)
def test_texts_are_cut_at_the_best_place_near_the_middle(text: str, limit: int, parts: list[str]) -> None:
    assert split_text(text, limit=limit, count_pieces=words) == parts


def test_chinese_is_cut_after_its_own_marks_and_without_marks_in_the_middle() -> None:
    assert split_text("你好。再见。", limit=3, count_pieces=len) == ["你好。", "再见。"]
    assert split_text("一二三四", limit=2, count_pieces=len) == ["一二", "三四"]


@given(st.text(alphabet="ab .,;!。", max_size=60), st.integers(1, 10))
def test_no_part_is_too_long_and_nothing_is_lost(text: str, limit: int) -> None:
    parts = split_text(text, limit=limit, count_pieces=len)
    assert all(0 < len(part) <= limit and part == part.strip() for part in parts)
    assert "".join("".join(parts).split()) == "".join(text.split())


def test_translations_are_joined_as_the_language_is_written() -> None:
    assert join_texts(["Eins.", "", "Zwei."], language="de") == "Eins. Zwei."
    for language in ("zh-Hans", "zho_Hant", "jpn", "tha_Thai"):
        assert join_texts(["一。", "二。"], language=language) == "一。二。"
    for language in ("kor_Hang", "deu_Latn", "zh_Latn"):
        assert join_texts(["A.", "B."], language=language) == "A. B."


def test_joined_hypotheses_keep_a_score_for_each_token() -> None:
    one = [Hypothesis([5, 6], -1.0, [-1.0, -1.0, -1.0]), Hypothesis([5], -2.0, [-2.0, -2.0])]
    other = [Hypothesis([7], -0.5, [-0.5, -0.5])]
    best, second = join_hypotheses([one, other], lenpen=1.0)
    assert best.tokens == [5, 6, 2, 7]
    assert best.token_scores == [-1.0, -1.0, -1.0, -0.5, -0.5]
    assert best.score == pytest.approx(-4.0 / 5)
    assert second.tokens == [5, 2, 7]  # the other part has but one
    assert second.score == pytest.approx(-5.0 / 4)
    assert join_hypotheses([one, other], lenpen=0.0)[0].score == pytest.approx(-4.0)


def test_joined_ids_are_split_again() -> None:
    assert list(split_ids([5, 6, 2, 7])) == [[5, 6], [7]]
    assert list(split_ids([5])) == [[5]]
    assert list(split_ids([])) == [[]]
