"""Minimum Bayes risk: scores of all pairs at once, against sacreBLEU, one pair at a time; and what is chosen."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from support.tiny_translation_model import MAX_POSITIONS, WORDS

from nmt.errors import UserError
from nmt.generation.options import DecodingOptions
from nmt.translation.batch_runner import Batching
from nmt.translation.mbr import PairScores, choose, pair_scores
from nmt.translation.translator import Translator

TEXTS = st.lists(st.text(alphabet="abä 👍.", max_size=12), min_size=1, max_size=8)
LONGER = st.lists(
    st.lists(st.sampled_from(["ein", "Hund", "läuft,", "7.", "über"]), max_size=9).map(" ".join),
    min_size=1,
    max_size=6,
)
LINES = [f"the {WORDS[i % 16]} {WORDS[i % 11]}" for i in range(12)]


def slow_score(metric: str, hypothesis: str, reference: str) -> float:
    scorer = CHRF() if metric == "chrf" else BLEU(effective_order=True)
    return scorer.sentence_score(hypothesis, [reference]).score


def slow_choice(texts: list[str], metric: str, nbest: int) -> list[str]:
    """Choose by a loop over all pairs; texts that come again are left out."""
    expected = {x: round(sum(slow_score(metric, x, y) for y in texts) / len(texts), 9) for x in texts}
    return sorted(dict.fromkeys(texts), key=lambda text: -expected[text])[:nbest]


@settings(max_examples=60, deadline=None)
@given(TEXTS | LONGER)
@pytest.mark.parametrize("metric", ["chrf", "bleu"])
def test_each_pair_has_the_sentence_score_of_sacrebleu(metric: str, texts: list[str]) -> None:
    expected = [[slow_score(metric, x, y) for y in texts] for x in texts]
    np.testing.assert_allclose(make_scores(metric)(texts), expected, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(LONGER, st.integers(1, 4))
@pytest.mark.parametrize("metric", ["chrf", "bleu"])
def test_the_choice_is_that_of_a_loop_over_all_pairs(metric: str, texts: list[str], nbest: int) -> None:
    chosen = [texts[i] for i in choose(texts, pair_scores=make_scores(metric), nbest=nbest)]
    assert chosen == slow_choice(texts, metric, nbest)


def make_scores(metric: str) -> PairScores:
    return pair_scores("chrf" if metric == "chrf" else "bleu", target_lang="de")


def test_the_candidate_that_most_others_resemble_comes_first() -> None:
    texts = ["ganz anders", "ein Hund läuft", "ein Hund lief"]
    order = choose(texts, pair_scores=make_scores("chrf"), nbest=3)
    assert order[-1] == 0
    assert choose(texts, pair_scores=make_scores("chrf"), nbest=1) == order[:1]


def test_equals_stay_in_their_order_and_repetitions_count_but_come_once() -> None:
    assert choose(["a b", "ab", "c"], pair_scores=make_scores("chrf"), nbest=2) == [0, 1]
    assert choose(["x", "abc", "x", "abd"], pair_scores=make_scores("chrf"), nbest=4)[0] == 0
    assert choose(["x", "x"], pair_scores=make_scores("chrf"), nbest=2) == [0]


@pytest.mark.parametrize("texts", [[], [""], ["a"]])
def test_nothing_to_choose_from_is_left_as_it_is(texts: list[str]) -> None:
    assert choose(texts, pair_scores=make_scores("chrf"), nbest=2) == list(range(len(texts)))


def candidates(translator: Translator, lines: list[str], options: DecodingOptions) -> list[list[str]]:
    return [translation.texts for translation in translator.translate_lines(lines, options)]


SEARCHED = DecodingOptions(beam=4, nbest=4)
DRAWN = DecodingOptions(sampling=True, beam=16, nbest=16, seed=7, sampling_topp=0.9, temperature=0.7)
OVER = {
    "nbest": (DecodingOptions(mbr="chrf", beam=4), [SEARCHED]),
    "samples": (
        DecodingOptions(mbr="chrf", samples=16, seed=7, sampling_topp=0.9, temperature=0.7),
        [DRAWN],
    ),
    "both": (
        DecodingOptions(
            mbr="chrf", samples=16, mbr_over="both", beam=4, seed=7, sampling_topp=0.9, temperature=0.7
        ),
        [SEARCHED, DRAWN],
    ),
    "both, by BLEU": (
        DecodingOptions(
            mbr="bleu", samples=16, mbr_over="both", beam=4, seed=7, sampling_topp=0.9, temperature=0.7
        ),
        [SEARCHED, DRAWN],
    ),
}


@pytest.mark.parametrize("over", OVER)
def test_candidates_are_what_search_and_sampling_give_by_themselves(
    translator: Translator, over: str
) -> None:
    options, parts = OVER[over]
    assert options.mbr is not None
    found = [candidates(translator, LINES, part) for part in parts]
    expected = [
        slow_choice([text for part in of_line for text in part], options.mbr, 1)[0]
        for of_line in zip(*found, strict=True)
    ]
    chosen = [translation.text for translation in translator.translate_lines(LINES, options)]
    assert chosen == expected
    assert chosen != [translation[0] for translation in found[0]]  # not just the most probable ones


def test_what_is_chosen_depends_on_the_seed_and_on_no_batch(translator: Translator) -> None:
    options = DecodingOptions(mbr="chrf", samples=8, seed=3)
    chosen = candidates(translator, LINES, options)
    for batching in (Batching(batch_size=1), Batching(max_tokens=40), Batching(buffer_size=5)):
        other = translator.translate_lines(LINES, options, batching=batching)
        assert [x.texts for x in other] == chosen
    assert candidates(translator, LINES, DecodingOptions(mbr="chrf", samples=8, seed=4)) != chosen


def test_parts_of_a_long_line_are_chosen_apart_and_n_best_are_different_texts(translator: Translator) -> None:
    parts = ["the old dog sees the big cat. the tree sings.", "a red bird sings, a small cat runs; the tree"]
    assert all(len(ids) < MAX_POSITIONS for ids in translator.task.source_segmenter.encode(parts))
    (long,) = translator.translate_lines([" ".join(parts)], DecodingOptions(mbr="chrf", beam=4, nbest=2))
    apart = candidates(translator, parts, DecodingOptions(mbr="chrf", beam=4, nbest=2))
    assert long.texts == [" ".join(both) for both in zip(*apart, strict=True)]
    assert all(len(set(texts)) == len(texts) for texts in apart)


def test_from_python(translator: Translator) -> None:
    assert translator.translate(["the dog", ""], mbr="chrf", samples=8)[1] == ""
    (found,) = translator.translate_with_scores(["the dog"], mbr="bleu", beam=4, nbest=3)
    (searched,) = translator.translate_with_scores(["the dog"], beam=4, nbest=4)
    assert 1 < len(found) <= 3 and set(map(str, found)) <= set(
        map(str, searched)
    )  # scores go with their texts


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (lambda: DecodingOptions(samples=4), "`samples` must come with `mbr`"),
        (lambda: DecodingOptions(mbr_over="both"), "`mbr-over` must come with `mbr`"),
        (lambda: DecodingOptions(mbr="chrf", beam=1), "`mbr` must have candidates to choose from, but has 1"),
        (lambda: DecodingOptions(mbr="chrf", samples=1), "`mbr` must have candidates to choose from"),
        (lambda: DecodingOptions(mbr="chrf", samples=-1), "`samples` must be at least 0"),
        (lambda: DecodingOptions(mbr="chrf", sampling=True), "`sampling` must be left out with `mbr`"),
        (lambda: DecodingOptions(mbr="chrf", mbr_over="both"), "must come with `samples`"),
        (lambda: DecodingOptions(mbr="chrf", samples=4, mbr_over="nbest"), "Take `mbr-over` both"),
        (lambda: DecodingOptions(mbr="chrf", samples=4, nbest=5), "`nbest` must be from 1 to candidates (4)"),
        (lambda: DecodingOptions(mbr="chrf", seed=4), "`seed` must come with `sampling`"),
    ],
)
def test_options_that_make_no_sense_together_are_refused(
    options: Callable[[], DecodingOptions], text: str
) -> None:
    with pytest.raises(UserError) as error:
        options().check()
    assert text in str(error.value)
