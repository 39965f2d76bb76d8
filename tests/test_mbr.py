"""Expected chrF over many candidates at once, against sacreBLEU, one pair at a time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu.metrics.chrf import CHRF

from nmt.generation.beam_search import Hypothesis
from nmt.translation.mbr import chrf_matrix, expected_chrf, rerank
from nmt.translation.translator import Translation

TEXTS = st.lists(st.text(alphabet="abä 👍.", max_size=12), min_size=1, max_size=8)


@given(TEXTS)
def test_each_pair_has_the_sentence_chrf_of_sacrebleu(texts: list[str]) -> None:
    expected = [[CHRF().sentence_score(x, [y]).score for y in texts] for x in texts]
    np.testing.assert_allclose(chrf_matrix(texts), expected, atol=1e-9)


@given(TEXTS)
def test_expectation_is_the_mean_over_all_candidates_repeated_ones_included(texts: list[str]) -> None:
    expected = [np.mean([CHRF().sentence_score(x, [y]).score for y in texts]) for x in texts]
    np.testing.assert_allclose(expected_chrf(texts), expected, atol=1e-9)


def make(texts: list[str]) -> Translation:
    hypotheses = [Hypothesis([5], -float(rank), [-1.0, -1.0]) for rank in range(len(texts))]
    return Translation("x", texts, hypotheses, np.array([5]))


def test_the_candidate_that_most_others_resemble_comes_first() -> None:
    reranked = rerank(make(["ganz anders", "ein Hund läuft", "ein Hund lief"]), nbest=3)
    assert reranked.texts[-1] == "ganz anders"
    assert [x.score for x in reranked.hypotheses][-1] == 0.0  # the scores go with their texts
    assert (
        rerank(make(["ganz anders", "ein Hund läuft", "ein Hund lief"]), nbest=1).texts == reranked.texts[:1]
    )


def test_equals_stay_in_the_order_of_the_model() -> None:
    reranked = rerank(make(["a b", "ab", "c"]), nbest=2)
    assert reranked.texts == ["a b", "ab"]


@pytest.mark.parametrize("texts", [[], [""], ["", ""]])
def test_nothing_to_choose_from_is_left_as_it_is(texts: list[str]) -> None:
    assert rerank(make(texts), nbest=2).texts == texts
