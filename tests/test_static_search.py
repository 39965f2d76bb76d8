"""The search in place, whose steps a GPU replays, run plainly: it equals the other search, and asks nothing."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_transformer import VOCABULARY_SIZE, random_transformer

from nmt.data.vocabulary import EOS_ID, PAD_ID, UNK_ID
from nmt.generation import static_search as module
from nmt.generation.beam_search import Hypothesis
from nmt.generation.generator import Generator
from nmt.generation.options import DecodingOptions
from nmt.generation.static_search import StaticSearch
from nmt.models.inference import InferenceTransformer

pytestmark = pytest.mark.usefixtures("one_thread")

SENTENCES = st.lists(
    st.lists(st.integers(UNK_ID, VOCABULARY_SIZE - 1), min_size=1, max_size=9), min_size=1, max_size=7
)


@st.composite
def decoding_options(draw: st.DrawFn, num_models: int) -> DecodingOptions:
    beam = draw(st.integers(1, 5))
    is_drawn = draw(st.integers(0, 3)) == 0
    restriction: dict[str, Any] = {}
    if is_drawn:
        restriction = draw(st.sampled_from(({}, {"sampling_topk": 3}, {"sampling_topp": 0.7}, {"seed": 5})))
    if num_models > 1:
        restriction["ensemble_by"] = draw(st.sampled_from(("probabilities", "log-probabilities")))
    unnormalized = draw(st.booleans())
    return DecodingOptions(
        beam=beam,
        nbest=draw(st.integers(1, beam)),
        lenpen=1.0 if unnormalized else draw(st.sampled_from((0.0, 0.6, 1.0, 1.7))),
        unnormalized=unnormalized,
        min_len=draw(st.sampled_from((0, 1, 4))),
        max_len_a=draw(st.sampled_from((0.0, 1.0, 2.5))),
        max_len_b=draw(st.sampled_from((0, 1, 4, 9))),
        unkpen=draw(st.sampled_from((0.0, 0.5, -0.5))),
        temperature=draw(st.sampled_from((1.0, 0.5, 2.0))),
        no_repeat_ngram_size=draw(st.integers(0, 3)),
        repetition_penalty=draw(st.sampled_from((1.0, 1.3, 0.8))),
        sampling=is_drawn,
        **restriction,
    )


@st.composite
def forced_prefixes(draw: st.DrawFn, num_sentences: int) -> torch.Tensor | None:
    if draw(st.booleans()):
        return None
    words = st.lists(st.integers(UNK_ID, VOCABULARY_SIZE - 1), max_size=7)
    rows = draw(st.lists(words, min_size=num_sentences, max_size=num_sentences))
    whole = draw(st.lists(st.booleans(), min_size=num_sentences, max_size=num_sentences))
    rows = [[*row, EOS_ID] if is_whole else row for row, is_whole in zip(rows, whole, strict=True)]
    return padded(rows)


def padded(rows: list[list[int]]) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [PAD_ID] * (longest - len(row)) for row in rows], dtype=torch.int64)


def sources(sentences: list[list[int]]) -> torch.Tensor:
    return padded([[*sentence, EOS_ID] for sentence in sentences])


def generators(seeds: list[int], options: DecodingOptions) -> tuple[Generator, Generator]:
    """Make the search in place and the other one, with the same models."""
    fast = [InferenceTransformer(random_transformer(seed, torch.float64)) for seed in seeds]
    ids = {"pad_id": PAD_ID, "eos_id": EOS_ID, "unk_id": UNK_ID}
    return Generator(fast, options, **ids, static_search=StaticSearch(fast)), Generator(fast, options, **ids)


def assert_same(found: list[list[Hypothesis]], expected: list[list[Hypothesis]]) -> None:
    assert [[x.tokens for x in nbest] for nbest in found] == [[x.tokens for x in nbest] for nbest in expected]
    for one, other in zip(found, expected, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a.score == pytest.approx(b.score, abs=1e-9)
            assert a.token_scores == pytest.approx(b.token_scores, abs=1e-9)


@pytest.fixture
def short_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tables be so small that searches outgrow them, and go on in smaller ones, all the time."""
    monkeypatch.setattr(module, "_STEPS", (2, 4, 8))
    monkeypatch.setattr(module, "_SENTENCES", (1, 2, 4))
    monkeypatch.setattr(module, "_SOURCE_LENGTHS", (3, 6))
    monkeypatch.setattr(module, "_KEPT_SHARE", 1)
    monkeypatch.setattr(module, "_FEWEST_ROWS", 0)
    monkeypatch.setattr(module, "_STEPS_A_LOOK", 1)


@pytest.mark.usefixtures("short_lists")
@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 10**6), sentences=SENTENCES, data=st.data())
def test_all_options_find_what_the_other_search_finds(
    seed: int, sentences: list[list[int]], data: st.DataObject
) -> None:
    num_models = data.draw(st.sampled_from((1, 1, 2)))
    options = data.draw(decoding_options(num_models))
    prefixes = data.draw(forced_prefixes(len(sentences)))
    static, other = generators([seed + i for i in range(num_models)], options)
    source = sources(sentences)
    expected = other.generate(source, prefixes)
    assert_same(static.generate(source, prefixes), expected)
    assert_same(static.generate(source, prefixes), expected)  # where the first search has left its tables
