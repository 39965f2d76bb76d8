"""The search on tables of probabilities: by hand, and against slower searches."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.slow_beam_search import exhaustive_search, score, slow_beam_search, slow_greedy_search
from support.table_model import (
    BOS,
    EOS,
    PAD,
    UNK,
    A,
    B,
    NextProbabilities,
    TableModel,
    from_table,
    random_table,
)

from nmt.generation.beam_search import Candidates, Hypothesis, best, extend, keep, start
from nmt.generation.generator import Generator
from nmt.generation.options import DecodingOptions
from nmt.generation.select import best_candidates, num_candidates

# With 2 beams:
# step 0: a .6, b .4                                                   both go on
# step 1: ab .6*.65 = .39, b</s> .4*.9 = .36, a</s> .6*.25 = .15, aa .6*.1 = .06
#         b</s> has rank 1 and is finished, a</s> has rank 2 and is dropped; ab and aa go on
# step 2: ab</s> .39*.5 = .195, aba .39*.3 = .117, abb .078, aa</s> .06
#         ab</s> has rank 0: the second one that is finished, so this is the end
TABLE = from_table(
    {
        (): {A: 0.6, B: 0.4},
        (A,): {EOS: 0.25, A: 0.1, B: 0.65},
        (B,): {EOS: 0.9, A: 0.05, B: 0.05},
        (A, B): {EOS: 0.5, A: 0.3, B: 0.2},
    }
)


def search(
    probabilities: NextProbabilities,
    options: DecodingOptions,
    *,
    limit: int = 10,
    names: tuple[int, ...] = (0,),
) -> list[list[Hypothesis]]:
    """Decode one sentence for each name, with the same length limit for all."""
    model = TableModel(probabilities, max_target_positions=limit + 1)
    generator = Generator([model], options, pad_id=PAD, eos_id=EOS, unk_id=UNK)
    return generator.generate(torch.tensor([[name] for name in names]))


def test_two_beams_on_a_table_worked_out_by_hand() -> None:
    (hypotheses,) = search(TABLE, DecodingOptions(beam=2, nbest=2))
    assert [hypothesis.tokens for hypothesis in hypotheses] == [[B], [A, B]]
    assert hypotheses[0].score == pytest.approx(math.log(0.36) / 2)
    assert hypotheses[1].score == pytest.approx(math.log(0.195) / 3)
    assert hypotheses[0].token_scores == pytest.approx([math.log(0.4), math.log(0.9)])
    assert hypotheses[1].token_scores == pytest.approx([math.log(0.6), math.log(0.65), math.log(0.5)])


def test_nbest_returns_the_best_ones() -> None:
    (hypotheses,) = search(TABLE, DecodingOptions(beam=2, nbest=1))
    assert [hypothesis.tokens for hypothesis in hypotheses] == [[B]]


@pytest.mark.parametrize(
    ("lenpen", "winner"),
    [
        (1.0, [B]),  # ln .36 / 2 = -.511 against ln .195 / 3 = -.545
        (2.0, [A, B]),  # ln .36 / 4 = -.255 against ln .195 / 9 = -.182
        (0.0, [B]),  # ln .36 against ln .195
    ],
)
def test_length_penalty_chooses_the_winner(lenpen: float, winner: list[int]) -> None:
    (hypotheses,) = search(TABLE, DecodingOptions(beam=2, lenpen=lenpen))
    assert hypotheses[0].tokens == winner


def test_unnormalized_score_is_the_sum_of_log_probabilities() -> None:
    (hypotheses,) = search(TABLE, DecodingOptions(beam=2, nbest=2, unnormalized=True))
    assert [hypothesis.score for hypothesis in hypotheses] == pytest.approx([math.log(0.36), math.log(0.195)])


def test_greedy_search_takes_the_most_probable_token() -> None:
    # a .6; ab .65 against eos .25; ab</s> .5
    (hypotheses,) = search(TABLE, DecodingOptions(beam=1))
    assert hypotheses[0].tokens == [A, B]


def test_at_the_length_limit_eos_is_forced_with_its_true_probability() -> None:
    # Step 1 is the last: b</s> .4*.9 = .36 and a</s> .6*.25 = .15, though ab has .39.
    (hypotheses,) = search(TABLE, DecodingOptions(beam=2, nbest=2), limit=1)
    assert [hypothesis.tokens for hypothesis in hypotheses] == [[B], [A]]
    assert [hypothesis.score for hypothesis in hypotheses] == pytest.approx(
        [math.log(0.36) / 2, math.log(0.15) / 2]
    )


def test_eos_is_forbidden_before_the_shortest_length() -> None:
    # Step 1 without eos: ab .39, aa .06, ba .02, bb .02; step 2: ab</s> .39*.5 = .195, aba .117, abb .078,
    # aa</s> .06. ab</s> is finished, aba and abb go on and end for certain: aba</s> .117.
    (hypotheses,) = search(TABLE, DecodingOptions(beam=2, nbest=2, min_len=2))
    assert [hypothesis.tokens for hypothesis in hypotheses] == [[A, B, A], [A, B]]
    assert [hypothesis.score for hypothesis in hypotheses] == pytest.approx(
        [math.log(0.117) / 4, math.log(0.195) / 3]  # -.536, -.545
    )


def test_length_limit_goes_before_the_shortest_length() -> None:
    (hypotheses,) = search(TABLE, DecodingOptions(beam=2, min_len=5), limit=1)
    assert hypotheses[0].tokens == [B]


def test_empty_hypothesis_only_without_a_shortest_length() -> None:
    table = from_table({(): {EOS: 0.9, A: 0.1}})
    assert search(table, DecodingOptions(beam=1, min_len=0))[0][0].tokens == []
    assert search(table, DecodingOptions(beam=1))[0][0].tokens == [A]


def test_unk_penalty_is_subtracted_and_stays_in_the_score() -> None:
    table = from_table({(): {UNK: 0.6, A: 0.4}})
    (hypotheses,) = search(table, DecodingOptions(beam=2, nbest=2, unkpen=1.0))
    assert [hypothesis.tokens for hypothesis in hypotheses] == [[A], [UNK]]
    assert hypotheses[1].score == pytest.approx((math.log(0.6) - 1.0) / 2)


def test_pad_is_never_chosen_and_its_probability_goes_to_nobody() -> None:
    table = from_table({(): {PAD: 0.9, A: 0.1}})
    (hypotheses,) = search(table, DecodingOptions(beam=2))
    assert hypotheses[0].tokens == [A]
    assert hypotheses[0].token_scores == pytest.approx([math.log(0.1), 0.0])


def test_temperature_divides_the_logits() -> None:
    # p ** (1/2), normalised: sqrt(.8) / (sqrt(.8) + sqrt(.2)) = 2/3
    table = from_table({(): {A: 0.8, B: 0.2}})
    (hypotheses,) = search(table, DecodingOptions(beam=1, temperature=2.0))
    assert hypotheses[0].token_scores[0] == pytest.approx(math.log(2 / 3))


def test_equal_candidates_are_taken_in_the_order_of_tokens() -> None:
    table = from_table({(): {A: 0.25, B: 0.25, UNK: 0.25, BOS: 0.25}})
    (hypotheses,) = search(table, DecodingOptions(beam=2, nbest=2))
    assert [hypothesis.tokens for hypothesis in hypotheses] == [[BOS], [UNK]]


def test_output_that_is_not_a_number_gives_an_empty_hypothesis() -> None:
    def not_a_number(name: int, prefix: tuple[int, ...]) -> list[float]:
        return [math.nan] * 6 if name == 1 else list(TABLE(name, prefix))

    broken, sound = search(not_a_number, DecodingOptions(beam=2), names=(1, 0))
    assert broken == [Hypothesis(tokens=[], score=-math.inf, token_scores=[-math.inf])]
    assert sound == search(TABLE, DecodingOptions(beam=2))[0]


def test_a_hypothesis_that_ends_below_rank_k_is_dropped() -> None:
    beam, finished = start(torch.tensor([5]), beam_size=2, dtype=torch.float64)
    candidates = Candidates(
        scores=torch.tensor([[-1.0, -2.0, -3.0, -4.0]]).double(),
        token_scores=torch.tensor([[-1.0, -2.0, -3.0, -4.0]]).double(),
        tokens=torch.tensor([[A, EOS, EOS, B]]),
        parents=torch.tensor([[0, 0, 1, 1]]),
    )
    beam, rows = extend(beam, candidates, finished, eos_id=EOS, lenpen=1.0)
    assert finished.counts.tolist() == [1]
    assert best(finished, nbest=2) == [[Hypothesis(tokens=[], score=-2.0, token_scores=[-2.0])]]
    assert beam.tokens.tolist() == [[[A], [B]]]
    assert rows.tolist() == [0, 1]


def test_the_first_to_finish_are_kept_even_if_later_ones_are_better() -> None:
    beam, finished = start(torch.tensor([5]), beam_size=1, dtype=torch.float64)
    for total in (-3.0, -1.0):  # the sentence is done after the first; nothing may be added then
        ending = Candidates(
            scores=torch.tensor([[total, -5.0]]).double(),
            token_scores=torch.tensor([[total, -5.0]]).double(),
            tokens=torch.tensor([[EOS, A]]),
            parents=torch.tensor([[0, 0]]),
        )
        beam, _ = extend(beam, ending, finished, eos_id=EOS, lenpen=1.0)
        assert beam.is_done.tolist() == [True]
    assert best(finished, nbest=1)[0][0].score == -3.0


def test_results_return_to_their_sentences_after_others_have_left() -> None:
    beam, finished = start(torch.tensor([5, 5, 5]), beam_size=1, dtype=torch.float64)
    beam, rows = keep(beam, torch.arange(3), live=torch.tensor([0, 2]))
    assert rows.tolist() == [0, 2]
    beam, _ = extend(beam, _two_best([[EOS, A], [EOS, A]]), finished, eos_id=EOS, lenpen=1.0)
    assert finished.counts.tolist() == [1, 0, 1]


def test_rows_name_the_parents_across_the_batch() -> None:
    beam, finished = start(torch.tensor([5, 5]), beam_size=2, dtype=torch.float64)
    candidates = Candidates(
        scores=torch.zeros(2, 4).double(),
        token_scores=torch.zeros(2, 4).double(),
        tokens=torch.full((2, 4), A),
        parents=torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0]]),
    )
    _, rows = extend(beam, candidates, finished, eos_id=EOS, lenpen=1.0)
    assert rows.tolist() == [1, 0, 3, 3]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    vocabulary_size=st.integers(4, 9),
    beam=st.integers(1, 6),
    limit=st.integers(0, 7),
    num_sentences=st.integers(1, 4),
    lenpen=st.sampled_from([0.0, 0.6, 1.0, 1.7]),
    min_len=st.integers(0, 3),
    unkpen=st.sampled_from([0.0, 1.5]),
    temperature=st.sampled_from([0.7, 1.0]),
    repetition_penalty=st.sampled_from([0.8, 1.0, 1.5]),
)
def test_equals_the_slow_search(
    seed: int,
    vocabulary_size: int,
    beam: int,
    limit: int,
    num_sentences: int,
    lenpen: float,
    min_len: int,
    unkpen: float,
    temperature: float,
    repetition_penalty: float,
) -> None:
    options = DecodingOptions(
        beam=beam,
        nbest=beam,
        lenpen=lenpen,
        min_len=min_len,
        unkpen=unkpen,
        temperature=temperature,
        repetition_penalty=repetition_penalty,
    )
    table = random_table(seed, vocabulary_size)
    results = search(table, options, limit=limit, names=tuple(range(num_sentences)))
    for name, hypotheses in enumerate(results):
        expected = slow_beam_search(table, name, limit=limit, options=options)
        assert [hypothesis.tokens for hypothesis in hypotheses] == [tokens for tokens, _ in expected]
        assert [x.score for x in hypotheses] == pytest.approx([value for _, value in expected], abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), limit=st.integers(0, 8), min_len=st.integers(0, 2))
def test_one_beam_equals_greedy_search(seed: int, limit: int, min_len: int) -> None:
    options = DecodingOptions(beam=1, min_len=min_len)
    table = random_table(seed, 7)
    for name, (hypothesis,) in enumerate(search(table, options, limit=limit, names=(0, 1, 2))):
        assert hypothesis.tokens == slow_greedy_search(table, name, limit=limit, options=options)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), lenpen=st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_len=st.integers(0, 1))
def test_a_beam_wide_enough_equals_exhaustive_search(seed: int, lenpen: float, min_len: int) -> None:
    # 3 words and at most 3 tokens: 40 sequences, min_len of them aside. With a beam of 40 nothing is pruned
    # and the search cannot stop before all have ended.
    options = DecodingOptions(beam=40, nbest=40, lenpen=lenpen, min_len=min_len)
    table = random_table(seed, 5)
    expected = exhaustive_search(table, 0, vocabulary_size=5, limit=3, options=options)
    assert len(expected) == 40 - min_len
    (hypotheses,) = search(table, options, limit=3)
    assert [hypothesis.tokens for hypothesis in hypotheses] == [tokens for tokens, _ in expected]
    assert [x.score for x in hypotheses] == pytest.approx([value for _, value in expected])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), beam=st.integers(1, 5))
def test_finished_hypotheses_are_never_extended(seed: int, beam: int) -> None:
    # Each result is one path through the table that ends where its eos is; its scores are that path's.
    options = DecodingOptions(beam=beam, nbest=beam)
    table = random_table(seed, 6, sharpness=1.0)
    for name, hypotheses in enumerate(search(table, options, limit=6, names=(0, 1, 2))):
        assert len({tuple(hypothesis.tokens) for hypothesis in hypotheses}) == beam
        for hypothesis in hypotheses:
            assert EOS not in hypothesis.tokens
            assert PAD not in hypothesis.tokens
            assert len(hypothesis.token_scores) == len(hypothesis.tokens) + 1
            total = score(table, name, hypothesis.tokens, limit=6, options=options)
            assert sum(hypothesis.token_scores) == pytest.approx(total)
            assert hypothesis.score == pytest.approx(total / len(hypothesis.token_scores))


@settings(max_examples=50, deadline=None)
@given(data=st.data(), beam_size=st.integers(1, 4), vocabulary_size=st.integers(2, 6))
def test_selection_equals_sorting_with_ties(
    data: st.DataObject, beam_size: int, vocabulary_size: int
) -> None:
    # Few different values, so that there are many ties; all but those at the last place are ordered by index.
    size = beam_size * vocabulary_size
    numbers = data.draw(st.lists(st.integers(-3, 0), min_size=size, max_size=size))
    log_probs = torch.tensor(numbers, dtype=torch.float64).view(1, beam_size, vocabulary_size)
    beam, _ = start(torch.tensor([1]), beam_size=beam_size, dtype=torch.float64)
    beam = replace(beam, scores=torch.zeros_like(beam.scores))
    scores = log_probs[0]
    chosen = best_candidates(scores, beam)
    places = (chosen.parents * vocabulary_size + chosen.tokens)[0].tolist()
    expected = sorted(range(size), key=lambda place: (-numbers[place], place))[: num_candidates(beam_size)]
    assert [numbers[place] for place in places] == [numbers[place] for place in expected]
    assert places == sorted(places, key=lambda place: (-numbers[place], place))
    last = numbers[expected[-1]]
    sure = [place for place in expected if numbers[place] > last]
    assert places[: len(sure)] == sure
    assert chosen.token_scores[0].tolist() == [numbers[place] for place in places]


@settings(max_examples=100, deadline=None)
@given(
    data=st.data(),
    seed=st.integers(0, 10**6),
    size=st.integers(100, 700),
    beam_size=st.integers(1, 20),
    is_coarse=st.booleans(),
)
def test_best_candidates_are_those_of_a_sort(
    data: st.DataObject, seed: int, size: int, beam_size: int, is_coarse: bool
) -> None:
    # Around the depth from which rows are searched as tables; coarse values make for ties.
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(3 * beam_size, size, generator=generator)
    so_far = torch.randn(3, beam_size, generator=generator)
    if is_coarse:
        scores, so_far = (4 * scores).round(), so_far.round()
    scores[1, data.draw(st.integers(1, size - 1)) :] = -math.inf
    so_far[2, 1:] = -math.inf
    beam, _ = start(torch.tensor([1, 1, 1]), beam_size=beam_size, dtype=torch.float32)
    beam = replace(beam, scores=so_far)
    chosen = best_candidates(scores, beam)
    log_probs = scores.view(3, beam_size, size)
    totals = (so_far[:, :, None] + log_probs).flatten(1)
    ordered = totals.sort(dim=1, descending=True).values
    assert torch.equal(chosen.scores, ordered[:, : num_candidates(beam_size)])
    places = chosen.parents * size + chosen.tokens
    assert torch.equal(totals.gather(1, places), chosen.scores)
    assert torch.equal(log_probs.flatten(1).gather(1, places), chosen.token_scores)
    for row, values in zip(places.tolist(), chosen.scores.tolist(), strict=True):
        ranked = list(zip([-x for x in values], row, strict=True))
        assert ranked == sorted(set(ranked))


def _two_best(tokens: list[list[int]]) -> Candidates:
    """Two candidates a sentence, of one hypothesis each."""
    scores = torch.tensor([[-1.0, -2.0]] * len(tokens), dtype=torch.float64)
    return Candidates(scores, scores, torch.tensor(tokens), torch.zeros(len(tokens), 2, dtype=torch.int64))
