"""Translations that are drawn at random: against a slow sampler, and against the probabilities."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.slow_beam_search import next_log_probs, slow_greedy_search
from support.table_model import EOS, PAD, UNK, NextProbabilities, TableModel, random_table

from nmt.generation import generator as generator_module
from nmt.generation.beam_search import Hypothesis
from nmt.generation.generator import Generator
from nmt.generation.options import DecodingOptions
from nmt.generation.random_streams import start_streams, uniform

MASK = 2**64 - 1


def absorb(state: int, value: int) -> int:
    """SplitMix64's finaliser in unsigned numbers, as Steele, Lea and Flood give it."""
    x = ((state ^ value) + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def slow_number(seed: int, line: int, sample: int, step: int) -> float:
    state = 0
    for value in (seed, line, sample, step):
        state = absorb(state, value)
    return (state >> 24) / 2**40


def slow_sample(
    probabilities: NextProbabilities,
    name: int,
    line: int,
    sample: int,
    *,
    limit: int,
    options: DecodingOptions,
) -> tuple[list[int], float]:
    """Draw one translation token by token; return it with its score."""
    prefix: tuple[int, ...] = ()
    total = 0.0
    while True:
        log_probs = next_log_probs(probabilities, name, prefix, limit=limit, options=options)
        order = list(range(len(log_probs)))
        if options.sampling_topk is not None or options.sampling_topp is not None:
            order.sort(key=lambda token: -log_probs[token])
        order = order[: options.sampling_topk]
        if options.sampling_topp is not None:
            all_mass = sum(math.exp(log_probs[token]) for token in order)
            mass, count = 0.0, 0
            # Python sums more exactly than by adding up, so that adding may fall short of the sum.
            while count < len(order) and mass < options.sampling_topp * all_mass:
                mass += math.exp(log_probs[order[count]])
                count += 1
            order = order[:count]
        ends = list(itertools.accumulate(math.exp(log_probs[token]) for token in order))
        point = slow_number(options.seed or 0, line, sample, len(prefix)) * ends[-1]
        token = next(token for token, end in zip(order, ends, strict=True) if point < end)
        total += log_probs[token]
        if token == EOS:
            return list(prefix), total / (len(prefix) + 1) ** options.lenpen
        prefix = (*prefix, token)


def draw(
    probabilities: NextProbabilities,
    options: DecodingOptions,
    *,
    limit: int = 10,
    names: tuple[int, ...] = (0,),
    lines: tuple[int, ...] | None = None,
) -> list[list[Hypothesis]]:
    model = TableModel(probabilities, max_target_positions=limit + 1)
    generator = Generator([model], options, pad_id=PAD, eos_id=EOS, unk_id=UNK)
    numbers = None if lines is None else torch.tensor(lines)
    return generator.generate(torch.tensor([[name] for name in names]), lines=numbers)


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**63 - 1),
    lines=st.lists(st.integers(0, 2**40), min_size=1, max_size=4),
    num_samples=st.integers(1, 3),
    step=st.integers(0, 1000),
)
def test_random_numbers_are_those_of_the_hash_in_unsigned_numbers(
    seed: int, lines: list[int], num_samples: int, step: int
) -> None:
    numbers = uniform(start_streams(seed, torch.tensor(lines), num_samples), step)
    pairs = itertools.product(lines, range(num_samples))
    assert numbers.tolist() == [slow_number(seed, line, sample, step) for line, sample in pairs]


def test_random_numbers_are_spread_evenly_over_lines_samples_and_steps() -> None:
    streams = start_streams(1, torch.arange(100), 10)
    numbers = torch.stack([uniform(streams, step) for step in range(20)], dim=1)  # (1000, 20)
    counts = numbers.flatten().histc(bins=10, min=0, max=1)
    assert (counts - 2000).abs().max() < 5 * math.sqrt(2000 * 0.9)  # five standard deviations
    correlations = torch.corrcoef(numbers.T) - torch.eye(20, dtype=numbers.dtype)
    assert correlations.abs().max() < 5 / math.sqrt(1000)


@settings(max_examples=60, deadline=None)
@given(
    table=st.integers(0, 10**6),
    seed=st.integers(0, 10**6),
    vocabulary_size=st.integers(4, 9),
    beam=st.integers(1, 4),
    limit=st.integers(0, 7),
    lines=st.lists(st.integers(0, 10**9), min_size=1, max_size=4),
    restriction=st.sampled_from([{}, {"sampling_topk": 2}, {"sampling_topp": 0.7}, {"sampling_topp": 1.0}]),
    min_len=st.integers(0, 2),
    temperature=st.sampled_from([0.7, 1.0, 1.5]),
)
def test_equals_the_slow_sampler(
    table: int,
    seed: int,
    vocabulary_size: int,
    beam: int,
    limit: int,
    lines: list[int],
    restriction: dict[str, float],
    min_len: int,
    temperature: float,
) -> None:
    options = DecodingOptions(
        beam=beam,
        nbest=beam,
        sampling=True,
        seed=seed,
        min_len=min_len,
        temperature=temperature,
        sampling_topk=2 if "sampling_topk" in restriction else None,
        sampling_topp=restriction.get("sampling_topp"),
    )
    probabilities = random_table(table, vocabulary_size)
    names = tuple(range(len(lines)))
    results = draw(probabilities, options, limit=limit, names=names, lines=tuple(lines))
    for name, line, hypotheses in zip(names, lines, results, strict=True):
        expected = [
            slow_sample(probabilities, name, line, sample, limit=limit, options=options)
            for sample in range(beam)
        ]
        expected.sort(key=lambda result: -result[1])
        assert [x.score for x in hypotheses] == pytest.approx([score for _, score in expected], abs=1e-12)
        # The order of equal translations means nothing.
        assert sorted(x.tokens for x in hypotheses) == sorted(tokens for tokens, _ in expected)


def test_what_is_drawn_does_not_depend_on_how_many_rows_are_drawn_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def draws() -> list[list[Hypothesis]]:
        options = DecodingOptions(beam=7, nbest=7, sampling=True, seed=3)
        return draw(
            random_table(2, 9, sharpness=0.5), options, limit=6, names=(0, 1, 2, 3), lines=(5, 6, 8, 9)
        )

    together = draws()
    for rows in (1, 3, 10):
        monkeypatch.setattr(generator_module, "_ROWS_DRAWN_AT_ONCE", {"cpu": rows})
        assert draws() == together


def test_tokens_are_drawn_as_often_as_they_are_probable() -> None:
    table = random_table(3, 8, sharpness=1.0)
    options = DecodingOptions(beam=5000, nbest=5000, sampling=True, min_len=0)
    (hypotheses,) = draw(table, options, limit=1)
    total = sum(p for token, p in enumerate(table(0, ())) if token != PAD)
    for token, p in enumerate(table(0, ())):
        share = 0.0 if token == PAD else p / total
        count = sum((x.tokens or [EOS])[0] == token for x in hypotheses)
        assert abs(count - 5000 * share) <= 5 * math.sqrt(5000 * share * (1 - share)), token


def test_the_most_probable_token_alone_is_greedy_search() -> None:
    table = random_table(7, 8)
    options = DecodingOptions(beam=1, sampling=True, sampling_topk=1)
    results = draw(table, options, limit=6, names=tuple(range(10)))
    greedy = DecodingOptions(beam=1)
    for name, (hypothesis,) in enumerate(results):
        assert hypothesis.tokens == slow_greedy_search(table, name, limit=6, options=greedy)


def test_another_seed_draws_others_and_the_same_seed_the_same() -> None:
    def tokens(seed: int) -> list[list[int]]:
        options = DecodingOptions(beam=20, nbest=20, sampling=True, seed=seed)
        return [x.tokens for x in draw(random_table(1, 9, sharpness=0.5), options)[0]]

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)


def test_output_that_is_not_a_number_gives_an_empty_hypothesis() -> None:
    def not_a_number(name: int, prefix: tuple[int, ...]) -> list[float]:
        return [math.nan] * 6

    options = DecodingOptions(beam=2, nbest=1, sampling=True)
    assert draw(not_a_number, options) == [[Hypothesis(tokens=[], score=-math.inf, token_scores=[-math.inf])]]
