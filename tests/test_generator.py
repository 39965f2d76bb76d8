"""Models and search together: limits, ensembles, sentences that leave the batch, options."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.table_model import EOS, PAD, UNK, A, B, TableModel, from_table, random_table

from nmt.errors import UserError
from nmt.generation.adjust import penalize_repetition_
from nmt.generation.beam_search import Hypothesis
from nmt.generation.generator import Generator
from nmt.generation.options import DecodingOptions

ENDLESS = from_table(
    {(A,) * length: {A: 0.9, EOS: 0.1} for length in range(101)}
)  # greedy search never ends it


def generator(models: list[TableModel], options: DecodingOptions) -> Generator:
    return Generator(models, options, pad_id=PAD, eos_id=EOS, unk_id=UNK)


def padded(sentences: list[list[int]]) -> torch.Tensor:
    longest = max(map(len, sentences))
    return torch.tensor([sentence + [PAD] * (longest - len(sentence)) for sentence in sentences])


def test_length_limit_is_the_sentences_own() -> None:
    source = padded([[A, EOS], [A, A, A, A, EOS]])
    options = DecodingOptions(beam=1, max_len_a=1.5, max_len_b=1)
    results = generator([TableModel(ENDLESS)], options).generate(source)
    assert [len(hypothesis.tokens) for (hypothesis,) in results] == [4, 8]  # 1.5*2 + 1; int(1.5*5 + 1)


def test_length_limit_is_at_most_what_the_model_takes() -> None:
    # Positions of the decoder: the start token and 6 others.
    model = TableModel(ENDLESS, max_target_positions=7)
    (hypothesis,) = generator([model], DecodingOptions(beam=1)).generate(padded([[A, EOS]]))[0]
    assert hypothesis.tokens == [A] * 6


def test_length_limit_of_an_ensemble_is_the_smallest() -> None:
    models = [TableModel(ENDLESS, max_target_positions=7), TableModel(ENDLESS, max_target_positions=5)]
    (hypothesis,) = generator(models, DecodingOptions(beam=1)).generate(padded([[A, EOS]]))[0]
    assert hypothesis.tokens == [A] * 4


def test_eos_at_the_limit_keeps_its_true_score() -> None:
    model = TableModel(ENDLESS, max_target_positions=3)
    (hypothesis,) = generator([model], DecodingOptions(beam=1)).generate(padded([[A, EOS]]))[0]
    assert hypothesis.token_scores == pytest.approx([math.log(0.9), math.log(0.9), math.log(0.1)])


def test_ensemble_averages_probabilities() -> None:
    first, second, third = (random_table(seed, 7) for seed in range(3))

    def mean(name: int, prefix: tuple[int, ...]) -> list[float]:
        return [
            sum(ps) / 3 for ps in zip(*(table(name, prefix) for table in (first, second, third)), strict=True)
        ]

    options = DecodingOptions(beam=4, nbest=4)
    source = torch.tensor([[0, EOS], [4, EOS]])
    together = generator([TableModel(first), TableModel(second), TableModel(third)], options).generate(source)
    expected = generator([TableModel(mean)], options).generate(source)
    assert_same(together, expected)


@pytest.mark.parametrize("weights", [(), (0.7, 0.2, 0.1), (7.0, 2.0, 1.0)])
@pytest.mark.parametrize("kind", ["probabilities", "log-probabilities"])
def test_ensemble_joins_models_by_weighted_means(weights: tuple[float, ...], kind: str) -> None:
    tables = [random_table(seed, 7) for seed in range(3)]
    shares = [weight / sum(weights) for weight in weights] or [1 / 3] * 3

    def mean(name: int, prefix: tuple[int, ...]) -> list[float]:
        each = zip(*(table(name, prefix) for table in tables), strict=True)
        if kind == "probabilities":
            return [sum(share * p for share, p in zip(shares, ps, strict=True)) for ps in each]
        products = [math.prod(p**share for share, p in zip(shares, ps, strict=True)) for ps in each]
        return [product / sum(products) for product in products]

    options = DecodingOptions(beam=4, nbest=4)
    joined = replace(options, ensemble_weights=weights, ensemble_by=kind)
    source = torch.tensor([[0, EOS], [4, EOS]])
    together = generator([TableModel(table) for table in tables], joined).generate(source)
    assert_same(together, generator([TableModel(mean)], options).generate(source))


def test_options_of_ensembles_must_suit_the_models() -> None:
    models = [TableModel(ENDLESS)] * 3
    with pytest.raises(UserError, match="`ensemble-weights` must be 3 numbers"):
        generator(models, DecodingOptions(ensemble_weights=(1.0, 2.0)))
    with pytest.raises(UserError, match="`ensemble-weights` must come with several models"):
        generator(models[:1], DecodingOptions(ensemble_weights=(1.0,)))
    with pytest.raises(UserError, match="`ensemble-by` must come with several models"):
        generator(models[:1], DecodingOptions(ensemble_by="log-probabilities"))


def test_repetition_penalty_divides_positive_logits_and_multiplies_negative_ones() -> None:
    logits = torch.tensor([[3.0, -1.0, 4.0], [3.0, -1.0, 4.0]])
    penalize_repetition_(logits, torch.tensor([[0, 1, 0], [2, 2, 2]]), penalty=2.0)
    assert logits.tolist() == [[1.5, -2.0, 4.0], [3.0, -1.0, 2.0]]
    less = torch.tensor([[1.0, -3.0, 2.0]])  # by 2, which the model has subtracted
    penalize_repetition_(less, torch.tensor([[0, 1, 0]]), penalty=2.0, offset=2.0)
    assert less.tolist() == [[1.5 - 2, -2.0 - 2, 4.0 - 2]]


def test_ensemble_of_one_model_twice_is_the_model() -> None:
    table = random_table(5, 7)
    options = DecodingOptions(beam=3, nbest=3)
    source = torch.tensor([[0, EOS]])
    twice = generator([TableModel(table), TableModel(table)], options).generate(source)
    assert_same(twice, generator([TableModel(table)], options).generate(source))


def test_done_sentences_leave_the_batch() -> None:
    # Sentence A ends after one token, sentence B goes on to its limit of 4.
    def probabilities(name: int, prefix: tuple[int, ...]) -> list[float]:
        ends = name == A and len(prefix) == 1
        return [0.0, 0.0, 1.0, 0.0, 0.0, 0.0] if ends else [0.0, 0.0, 0.2, 0.0, 0.8, 0.0]

    model = TableModel(probabilities)
    options = DecodingOptions(beam=1, max_len_a=0, max_len_b=4)
    generator([model], options).generate(torch.tensor([[A, EOS], [B, EOS]]))
    assert model.num_rows == [2, 2, 1, 1, 1]


@settings(max_examples=30, deadline=None)
@given(data=st.data(), seed=st.integers(0, 10**6), beam=st.integers(1, 4))
def test_a_sentence_does_not_depend_on_its_neighbours(data: st.DataObject, seed: int, beam: int) -> None:
    sentences = data.draw(st.lists(st.lists(st.integers(3, 6), max_size=4), min_size=1, max_size=6))
    sources = [[3 + i, *rest, EOS] for i, rest in enumerate(sentences)]  # the first token names the sentence
    order = data.draw(st.permutations(range(len(sources))))
    options = DecodingOptions(beam=beam, nbest=beam, max_len_a=1.0, max_len_b=1)
    search = generator([TableModel(random_table(seed, 8, sharpness=1.0))], options)
    together = search.generate(padded([sources[i] for i in order]))
    for place, i in enumerate(order):
        assert search.generate(padded([sources[i]])) == [together[place]]


def test_scores_are_as_accurate_as_the_model() -> None:
    table = random_table(1, 7)
    source = torch.tensor([[0, EOS]])
    exact = generator([TableModel(table)], DecodingOptions()).generate(source)[0][0].score
    rounded = (
        generator([TableModel(table, dtype=torch.float32)], DecodingOptions()).generate(source)[0][0].score
    )
    halved = (
        generator([TableModel(table, dtype=torch.float16)], DecodingOptions()).generate(source)[0][0].score
    )
    assert rounded == pytest.approx(exact, abs=1e-5)
    assert torch.tensor(rounded).double().item() == rounded  # a float32 number
    assert torch.tensor(exact).double().item() != exact
    assert halved == pytest.approx(exact, abs=1e-2)


def test_an_empty_batch_has_no_results() -> None:
    assert (
        generator([TableModel(ENDLESS)], DecodingOptions()).generate(torch.empty((0, 0), dtype=torch.int64))
        == []
    )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (DecodingOptions(beam=0), "`beam` must be at least 1, but is 0"),
        (DecodingOptions(beam=2, nbest=3), r"`nbest` must be from 1 to beam \(2\), but is 3"),
        (DecodingOptions(nbest=0), "`nbest` must be"),
        (DecodingOptions(lenpen=math.nan), "`lenpen` must be from -5 to 5"),
        (DecodingOptions(lenpen=0.5, unnormalized=True), "`lenpen` must be left out"),
        (DecodingOptions(min_len=-1), "`min-len` must be at least 0"),
        (DecodingOptions(max_len_a=-1.0), "`max-len-a` must be from 0 to"),
        (DecodingOptions(max_len_b=-1), "`max-len-b` must be at least 0"),
        (DecodingOptions(unkpen=math.inf), "`unkpen` must be at most 1"),
        (DecodingOptions(temperature=0.0), "`temperature` must be from 1e-06 to"),
        (DecodingOptions(repetition_penalty=0.0), "`repetition-penalty` must be from 1e-06 to"),
        (DecodingOptions(sampling_topk=5), "`sampling-topk` must come with `sampling`"),
        (DecodingOptions(seed=5), "`seed` must come with `sampling`"),
        (DecodingOptions(sampling=True, sampling_topk=0), "`sampling-topk` must be at least 1"),
        (DecodingOptions(sampling=True, sampling_topp=0.0), "`sampling-topp` must be above 0"),
        (
            DecodingOptions(sampling=True, sampling_topp=0.5, sampling_topk=2),
            "`sampling-topp` must be left out",
        ),
        (DecodingOptions(sampling=True, seed=-1), "`seed` must be from 0"),
        (DecodingOptions(ensemble_weights=(0.5, -1.0)), "`ensemble-weights` must be numbers above 0"),
    ],
)
def test_options_without_sense_are_refused(options: DecodingOptions, text: str) -> None:
    with pytest.raises(UserError, match=text):
        options.check()


def assert_same(results: list[list[Hypothesis]], expected: list[list[Hypothesis]]) -> None:
    """Compare tokens strictly and scores up to rounding."""
    assert [[x.tokens for x in nbest] for nbest in results] == [
        [x.tokens for x in nbest] for nbest in expected
    ]
    for nbest, nbest_expected in zip(results, expected, strict=True):
        assert [x.score for x in nbest] == pytest.approx([x.score for x in nbest_expected])


def ends_after_one_token_but_for_a(name: int, prefix: tuple[int, ...]) -> list[float]:
    ends = name != A and len(prefix) == 1
    return [0.0, 0.0, 1.0, 0.0, 0.0, 0.0] if ends else [0.0, 0.0, 0.1, 0.0, 0.5, 0.4]


@pytest.mark.parametrize("beam", [1, 2])
def test_stragglers_may_be_given_up_and_the_others_keep_their_results(beam: int) -> None:
    options = DecodingOptions(beam=beam, nbest=1, max_len_a=0, max_len_b=9)
    sources = torch.tensor([[A, EOS]] + [[B, EOS]] * 31)
    search = generator([TableModel(ends_after_one_token_but_for_a)], options)
    results = search.generate(sources)
    found = search.generate(sources, may_drop_stragglers=True)
    assert len(results[0]) == 1
    assert found == [[], *results[1:]]


def test_stragglers_are_given_up_at_twice_the_steps_of_half_of_the_sentences() -> None:
    # The others are done with the second step, so what is left is given up with the fourth.
    options = DecodingOptions(beam=1, max_len_a=0, max_len_b=9)
    for num_stragglers, num_steps in ((2, 4), (3, 10)):  # one in 16 of 32 is two
        model = TableModel(ends_after_one_token_but_for_a)
        sources = torch.tensor([[A, EOS]] * num_stragglers + [[B, EOS]] * (32 - num_stragglers))
        found = generator([model], options).generate(sources, may_drop_stragglers=True)
        assert len(model.num_rows) == num_steps
        assert [len(x) for x in found[:num_stragglers]] == [int(num_stragglers > 2)] * num_stragglers
