"""A translation does not depend on how sentences are batched: random Transformers, random sentences."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nmt.data.vocabulary import EOS_ID, PAD_ID, UNK_ID
from nmt.generation import generator as generator_module
from nmt.generation.beam_search import Beam, Candidates, Hypothesis
from nmt.generation.generator import Generator
from nmt.generation.options import DecodingOptions
from nmt.generation.select import select_best
from nmt.models.options import TransformerOptions
from nmt.models.transformer import Transformer

VOCABULARY_SIZE = 14
TIE = 1e-5  # totals that are nearer than this may change places in float32

SENTENCES = st.lists(
    st.lists(st.integers(UNK_ID, VOCABULARY_SIZE - 1), min_size=1, max_size=9), min_size=1, max_size=7
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Products this small are fastest on one thread, and slow where several test processes share cores."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def random_transformer(seed: int, dtype: torch.dtype) -> Transformer:
    """Make an untrained model whose weights are scaled up, so that its outputs are far from uniform."""
    torch.manual_seed(seed)
    options = TransformerOptions(
        encoder_layers=1 + seed % 2,
        decoder_layers=1 + seed // 2 % 2,
        encoder_embed_dim=16,
        decoder_embed_dim=16,
        encoder_ffn_embed_dim=24,
        decoder_ffn_embed_dim=24,
        encoder_attention_heads=2,
        decoder_attention_heads=4,
        encoder_normalize_before=bool(seed // 4 % 2),
        decoder_normalize_before=bool(seed // 4 % 2),
        encoder_learned_pos=bool(seed // 8 % 2),
        decoder_learned_pos=bool(seed // 8 % 2),
        max_source_positions=32,
        max_target_positions=32,
    )
    model = Transformer(
        options,
        source_vocabulary_size=VOCABULARY_SIZE,
        target_vocabulary_size=VOCABULARY_SIZE,
        pad_id=PAD_ID,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    return model.to(dtype).eval()


def make_generator(models: list[Transformer], beam: int) -> Generator:
    options = DecodingOptions(beam=beam, nbest=beam, max_len_a=1.0, max_len_b=4)
    return Generator(models, options, pad_id=PAD_ID, eos_id=EOS_ID, unk_id=UNK_ID)


def translate(generator: Generator, sentences: list[list[int]]) -> list[list[Hypothesis]]:
    longest = max(map(len, sentences))
    rows = [[*sentence, EOS_ID] + [PAD_ID] * (longest - len(sentence)) for sentence in sentences]
    return generator.generate(torch.tensor(rows))


@contextmanager
def recorded_gaps() -> Iterator[list[float]]:
    """Record the distances between neighbours in rank, at each step."""
    gaps: list[float] = []

    def select_and_record(beam: Beam, log_probs: Tensor) -> Candidates:
        totals = (beam.scores[:, :, None] + log_probs).flatten(1)
        ranked = totals.topk(min(totals.size(1), 2 * beam.scores.size(1) + 1), dim=1).values
        ranked = ranked[ranked.isfinite()]
        gaps.extend((ranked[:-1] - ranked[1:]).tolist())
        return select_best(beam, log_probs)

    with mock.patch.object(generator_module, "select_best", select_and_record):
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
