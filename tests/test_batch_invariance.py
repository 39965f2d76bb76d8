"""A translation does not depend on how sentences are batched: random Transformers, random sentences."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.random_transformer import VOCABULARY_SIZE, random_transformer
from support.tiny_translation_model import WORDS, write_tiny_model
from torch import Tensor

from nmt.data.vocabulary import EOS_ID, PAD_ID, UNK_ID
from nmt.generation import choice as choice_module
from nmt.generation import roster
from nmt.generation.beam_search import Beam, Candidates, Hypothesis
from nmt.generation.generator import Generator
from nmt.generation.options import DecodingOptions
from nmt.generation.select import best_candidates
from nmt.models.inference import InferenceTransformer
from nmt.models.transformer import Transformer
from nmt.translation.batch_runner import Batching
from nmt.translation.long_sentences import split_ids
from nmt.translation.request import Translation
from nmt.translation.translator import Translator

pytestmark = pytest.mark.usefixtures("one_thread")

TIE = 1e-5  # totals that are nearer than this may change places in float32

SENTENCES = st.lists(
    st.lists(st.integers(UNK_ID, VOCABULARY_SIZE - 1), min_size=1, max_size=9), min_size=1, max_size=7
)


def make_generator(models: list[Transformer], beam: int, *, sampling: bool = False) -> Generator:
    """Make a generator whose models are the fast ones; `test_inference.py` compares them with the plain ones."""
    options = DecodingOptions(beam=beam, nbest=beam, max_len_a=1.0, max_len_b=4, sampling=sampling)
    fast = [InferenceTransformer(model) for model in models]
    return Generator(fast, options, pad_id=PAD_ID, eos_id=EOS_ID, unk_id=UNK_ID)


def translate(
    generator: Generator, sentences: list[list[int]], lines: list[int] | None = None
) -> list[list[Hypothesis]]:
    longest = max(map(len, sentences))
    rows = [[*sentence, EOS_ID] + [PAD_ID] * (longest - len(sentence)) for sentence in sentences]
    numbers = None if lines is None else torch.tensor(lines)
    return generator.generate(torch.tensor(rows), lines=numbers)


def translate_in_batches(
    generator: Generator, sentences: list[list[int]], seed: int
) -> list[list[Hypothesis]]:
    """Translate in a random order and in batches of random sizes; return results in the order of sentences."""
    random = Random(seed)
    order = random.sample(range(len(sentences)), len(sentences))
    results: dict[int, list[Hypothesis]] = {}
    while order:
        size = random.choice((1, 7, 40, 150))
        batch, order = order[:size], order[size:]
        found = translate(generator, [sentences[i] for i in batch], lines=batch)
        results.update(zip(batch, found, strict=True))
    return [results[i] for i in range(len(sentences))]


def tokens_of(results: list[list[Hypothesis]]) -> list[list[list[int]]]:
    return [[hypothesis.tokens for hypothesis in nbest] for nbest in results]


@contextmanager
def recorded_gaps() -> Iterator[list[float]]:
    """Record the distances between neighbours in rank, at each step."""
    gaps: list[float] = []

    def record(values: Tensor, count: int) -> None:
        ranked = values.topk(min(values.size(1), count), dim=1).values
        distances = ranked[:, :-1] - ranked[:, 1:]
        gaps.extend(distances[distances.isfinite()].tolist())

    def choose_and_record(scores: Tensor, beam: Beam) -> Candidates:
        log_probs = scores.unflatten(0, beam.scores.shape)  # (B, K, V)
        record((beam.scores[:, :, None] + log_probs).flatten(1), 2 * beam.scores.size(1) + 1)
        return best_candidates(scores, beam)

    with mock.patch.object(choice_module, "best_candidates", choose_and_record):
        yield gaps


def has_tie(exact: Generator, sentence: list[int]) -> bool:
    """Say whether the search, in float64, ever had to choose between totals that are nearly equal."""
    with recorded_gaps() as gaps:
        (hypotheses,) = translate(exact, [sentence])
    scores = [hypothesis.score for hypothesis in hypotheses]
    gaps.extend(better - worse for better, worse in pairwise(scores))
    return min(gaps) < TIE


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), sentences=SENTENCES, beam=st.integers(1, 5), data=st.data())
def test_float64_translations_are_the_same_in_any_batch(
    seed: int, sentences: list[list[int]], beam: int, data: st.DataObject
) -> None:
    generator = make_generator([random_transformer(seed, torch.float64)], beam)
    alone = [translate(generator, [sentence])[0] for sentence in sentences]
    order = data.draw(st.permutations(range(len(sentences))))
    cut = data.draw(st.integers(1, len(order)))
    for part in (order[:cut], order[cut:]):
        if not part:
            continue
        for i, hypotheses in zip(part, translate(generator, [sentences[i] for i in part]), strict=True):
            assert [x.tokens for x in hypotheses] == [x.tokens for x in alone[i]]
            assert [x.score for x in hypotheses] == pytest.approx([x.score for x in alone[i]], abs=1e-10)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), sentences=SENTENCES, beam=st.integers(1, 5))
def test_float32_translations_are_the_same_but_for_ties(
    seed: int, sentences: list[list[int]], beam: int
) -> None:
    generator = make_generator([random_transformer(seed, torch.float32)], beam)
    exact = make_generator([random_transformer(seed, torch.float64)], beam)
    together = translate(generator, sentences)
    for sentence, hypotheses in zip(sentences, together, strict=True):
        (alone,) = translate(generator, [sentence])
        if [x.tokens for x in hypotheses] != [x.tokens for x in alone]:
            assert has_tie(exact, sentence), (hypotheses, alone)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("sampling", [False, True])
def test_a_thousand_sentences_for_each_of_ten_models(seed: int, sampling: bool) -> None:
    # 10,000 sentences in two random orders and batchings: equal in float64, and in float32 but for ties.
    random = Random(seed)
    sentences = [random.choices(range(UNK_ID, VOCABULARY_SIZE), k=random.randint(1, 12)) for _ in range(1000)]
    exact = make_generator([random_transformer(seed, torch.float64)], 3, sampling=sampling)
    one, other = (translate_in_batches(exact, sentences, seed=order) for order in (1, 2))
    assert tokens_of(one) == tokens_of(other)

    rounded = make_generator([random_transformer(seed, torch.float32)], 3, sampling=sampling)
    one, other = (translate_in_batches(rounded, sentences, seed=order) for order in (1, 2))
    differing = [i for i, (a, b) in enumerate(zip(tokens_of(one), tokens_of(other), strict=True)) if a != b]
    assert len(differing) <= 5  # of 1,000
    if not sampling:  # a number that falls on the edge between two tokens is the tie of sampling
        assert all(has_tie(exact, sentences[i]) for i in differing)


OPTIONS = DecodingOptions(beam=3, nbest=3, max_len_a=1.0, max_len_b=4)
LARGE = [Batching(), Batching(700, 600), Batching(3000, 2048, 40), Batching(10**6, 10**5, 200)]
SMALL = [Batching(1, 1), Batching(), Batching(7, 60), Batching(20, 2048, 9)]


def through_the_translator(
    translator: Translator, lines: list[str], batching: Batching, seed: int
) -> list[Translation]:
    """Translate in a random order, as the commands do; return results in the order of lines."""
    order = Random(seed).sample(range(len(lines)), len(lines))
    found = translator.translate_lines((lines[i] for i in order), OPTIONS, batching=batching)
    results = dict(zip(order, found, strict=True))
    return [results[i] for i in range(len(lines))]


def compare_batchings(folder: Path, num_lines: int, batchings: list[Batching]) -> int:
    """Translate random lines, long ones too, each batching in another order; return how many tie in float32."""
    random = Random(num_lines)
    lines = [
        " ".join(random.choices(WORDS, k=random.choice((1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 40))))
        for _ in range(num_lines)
    ]
    rounded, exact = (Translator.load(folder) for _ in range(2))
    exact = Translator([model.double() for model in exact.models], exact.task, device="cpu")
    search = Generator(exact.fast_models, OPTIONS, pad_id=PAD_ID, eos_id=EOS_ID, unk_id=UNK_ID)
    strict, first = (
        [through_the_translator(x, lines, batching, seed) for seed, batching in enumerate(batchings)]
        for x in (exact, rounded)
    )
    for results in strict[1:]:
        for one, other in zip(strict[0], results, strict=True):
            assert (one.texts, one.num_parts) == (other.texts, other.num_parts)
            for a, b in zip(one.hypotheses, other.hypotheses, strict=True):
                assert a.tokens == b.tokens and a.score == pytest.approx(b.score, abs=1e-10)
    differing = {
        i
        for results in first[1:]
        for i, (one, other) in enumerate(zip(first[0], results, strict=True))
        if one.texts != other.texts
    }
    for i in differing:
        parts = split_ids(first[0][i].source_ids.tolist())
        assert any(has_tie(search, part) for part in parts), lines[i]
    return len(differing)


def test_lines_are_translated_alike_in_any_order_and_batching(tmp_path: Path) -> None:
    assert compare_batchings(write_tiny_model(tmp_path / "model"), 60, SMALL) <= 1


@pytest.mark.slow
def test_ten_thousand_lines_are_translated_alike_in_any_order_and_batching(tmp_path: Path) -> None:
    num_ties = compare_batchings(write_tiny_model(tmp_path / "model"), 10_000, LARGE)
    print(f"{num_ties} of 10,000 lines have a tie")  # pytest -rP shows it
    assert num_ties <= 20


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), sentences=SENTENCES)
def test_the_cached_search_equals_full_forward_passes(seed: int, sentences: list[list[int]]) -> None:
    # Teacher forcing of each result through the decoder without a state gives the scores of the search.
    model = random_transformer(seed, torch.float64)
    results = translate(make_generator([model], 3), sentences)
    for sentence, hypotheses in zip(sentences, results, strict=True):
        memory = model.encode(torch.tensor([[*sentence, EOS_ID]]))
        for hypothesis in hypotheses:
            logits = model.decode(torch.tensor([[EOS_ID, *hypothesis.tokens]]), memory)[0]
            target = torch.tensor([*hypothesis.tokens, EOS_ID])
            expected = logits.log_softmax(dim=1).gather(1, target[:, None]).squeeze(1)
            assert hypothesis.token_scores == pytest.approx(expected.tolist(), abs=1e-9)


def test_ensemble_of_transformers_is_batch_invariant() -> None:
    generator = make_generator([random_transformer(seed, torch.float64) for seed in (1, 2)], 4)
    sentences = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 4]]
    alone = [translate(generator, [sentence])[0] for sentence in sentences]
    together = translate(generator, sentences)
    assert [[x.tokens for x in nbest] for nbest in together] == [[x.tokens for x in nbest] for nbest in alone]


def test_the_random_models_tell_sentences_apart_and_end_some_early() -> None:
    # The tests above would mean little if all translations were equal or all ran to their limit.
    sentences = [[4 + i, 13 - i, 4 + i, 5] for i in range(10)]
    num_different, num_early = 0, 0
    for seed in range(8):
        results = translate(make_generator([random_transformer(seed, torch.float64)], 3), sentences)
        translations = [tuple(nbest[0].tokens) for nbest in results]
        num_different += len(set(translations))
        num_early += sum(len(tokens) < len(sentences[0]) + 1 + 4 for tokens in translations)
    assert num_different > 8 * 5
    assert num_early > 8


def test_what_is_drawn_for_many_short_sentences_is_what_is_drawn_for_few() -> None:
    # More sentences than are drawn at once: each part has fewer rows than there are sentences.
    generator = make_generator([random_transformer(3, torch.float64)], 2, sampling=True)
    sentences = [[UNK_ID + i % 9, UNK_ID + i % 7] for i in range(600)]
    lines = list(range(600))
    together = translate(generator, sentences, lines)
    apart = [
        result
        for first in range(0, 600, 50)
        for result in translate(generator, sentences[first : first + 50], lines[first : first + 50])
    ]
    assert tokens_of(together) == tokens_of(apart)


def test_sentences_that_are_given_up_and_begun_anew_are_translated_as_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = Random(3)
    lines = [" ".join(random.choices(WORDS, k=random.randint(1, 9))) for _ in range(120)]
    loaded = Translator.load(write_tiny_model(tmp_path / "model"))
    translator = Translator([model.double() for model in loaded.models], loaded.task, device="cpu")
    batching = Batching(max_tokens=200)
    expected = through_the_translator(translator, lines, batching, seed=0)
    monkeypatch.setattr(roster, "_STRAGGLING_SHARE", 2)
    monkeypatch.setattr(roster, "_STRAGGLING_TIMES", 1.0)
    num_given_up = 0
    generate = Generator.generate

    def count(*args: Any, **options: Any) -> list[list[Hypothesis]]:
        nonlocal num_given_up
        results = generate(*args, **options)
        num_given_up += results.count([])
        return results

    monkeypatch.setattr(Generator, "generate", count)
    found = through_the_translator(translator, lines, batching, seed=0)
    assert num_given_up > 10
    assert [x.texts for x in found] == [x.texts for x in expected]
