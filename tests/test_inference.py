"""The fast Transformer against its plain twin."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.id_search import padded, search
from support.int8_processor import needs_vnni
from support.random_transformer import TWO_LAYERS, VOCABULARY_SIZE, random_transformer

import nmt.models.inference
from nmt.data.vocabulary import EOS_ID, PAD_ID, UNK_ID
from nmt.models.inference import InferenceTransformer
from nmt.models.inference_parts import _attend
from nmt.models.transformer import Transformer

SENTENCES = st.lists(
    st.lists(st.integers(UNK_ID, VOCABULARY_SIZE - 1), min_size=1, max_size=9), min_size=1, max_size=12
)
# Also wider than rows of attention are made.
LONGER_SENTENCES = st.lists(
    st.lists(st.integers(UNK_ID, VOCABULARY_SIZE - 1), min_size=1, max_size=23), min_size=1, max_size=12
)


@contextmanager
def fresh_memory_is_not_a_number() -> Iterator[None]:
    """Let what is read before it is written show."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = before


def seldom_ending(seed: int, dtype: torch.dtype) -> Transformer:
    """Make a random model that goes on for long, so that the table of the past is full more than once."""
    model = random_transformer(seed, dtype)
    with torch.no_grad():
        model.output_weight[EOS_ID] *= 0.1
    return model


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    sentences=LONGER_SENTENCES,
    beam=st.integers(1, 5),
    is_whole=st.booleans(),
    tokens_at_once=st.sampled_from([1, 8, 40, 1024]),
)
def test_finds_what_the_plain_model_finds(
    seed: int, sentences: list[list[int]], beam: int, is_whole: bool, tokens_at_once: int
) -> None:
    """With tables of the past that are used whole, as bfloat16's on a CPU, and others; in several groups."""
    model = seldom_ending(seed, torch.float64)
    with (
        mock.patch("nmt.models.inference_state.multiplied_by_onednn", return_value=is_whole),
        mock.patch("nmt.models.inference._TOKENS_AT_ONCE", tokens_at_once),
        fresh_memory_is_not_a_number(),
    ):
        found = search(InferenceTransformer(model), sentences, beam)
    expected = search(model, sentences, beam)
    assert [[x.tokens for x in nbest] for nbest in found] == [[x.tokens for x in nbest] for nbest in expected]
    for nbest, nbest_expected in zip(found, expected, strict=True):
        assert [x.score for x in nbest] == pytest.approx([x.score for x in nbest_expected], abs=1e-10)


@pytest.mark.parametrize("neighbour", [[], [[9, 4, 8, 7, 6, 5]]])
def test_a_piece_with_the_id_of_padding_does_not_shorten_its_sentence(neighbour: list[list[int]]) -> None:
    model = random_transformer(3, torch.float64)
    sentences = [[5, PAD_ID, 7], *neighbour]
    [found, *_], [expected, *_] = (search(x, sentences, 2) for x in (InferenceTransformer(model), model))
    assert [x.tokens for x in found] == [x.tokens for x in expected]
    assert [x.score for x in found] == pytest.approx([x.score for x in expected], abs=1e-10)


def test_no_sentences_have_an_empty_memory() -> None:
    memory = InferenceTransformer(random_transformer(3, torch.float64)).encode(
        torch.empty((0, 4), dtype=torch.int64)
    )
    assert memory.parts.size(2) == 0


@pytest.mark.parametrize("is_whole", [False, True])
@pytest.mark.parametrize("beam", [1, 2])
def test_sentences_that_stay_go_on_as_if_the_others_had_never_been(is_whole: bool, beam: int) -> None:
    model = InferenceTransformer(random_transformer(3, torch.float64))
    sources = padded([[5, 6], [7, 8], [9, 4]])
    live = torch.tensor([2, 1])
    rows = (live[:, None] * beam + torch.arange(beam)).flatten()

    def steps(sources: torch.Tensor, count: int) -> Iterator[tuple[torch.Tensor, Any, Any]]:
        memory, state = model.encode(sources), model.start_state()
        tokens = torch.full((len(sources) * beam,), EOS_ID)
        for _ in range(count):
            yield model.step(tokens, memory, state), memory, state
            state.reorder_(torch.arange(len(tokens)))

    with (
        torch.inference_mode(),
        mock.patch("nmt.models.inference_state.multiplied_by_onednn", return_value=is_whole),
    ):
        *_, (_, memory, state) = steps(sources, 3)
        state.reorder_(rows)
        found = model.step(torch.full((len(rows),), EOS_ID), memory.keep(live), state)
        *_, (expected, _, _) = steps(sources[live], 4)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("activation_fn", ["relu", "gelu"])
@pytest.mark.parametrize("layernorm_embedding", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float64, 1e-12),
        (torch.float32, 1e-4),
        (torch.bfloat16, 0.15),
        pytest.param(torch.int8, 0.2, marks=needs_vnni),
    ],
)
def test_computes_the_same_logits_in_each_type(
    pre_norm: bool, activation_fn: str, layernorm_embedding: bool, dtype: torch.dtype, tolerance: float
) -> None:
    options = replace(
        TWO_LAYERS,
        encoder_normalize_before=pre_norm,
        decoder_normalize_before=pre_norm,
        activation_fn=activation_fn,
        layernorm_embedding=layernorm_embedding,
    )
    torch.manual_seed(0)
    sizes = {"source_vocabulary_size": 20, "target_vocabulary_size": 30, "pad_id": PAD_ID}
    plain = Transformer(options, **sizes).eval()
    with torch.no_grad():
        for module in plain.modules():
            if isinstance(module, torch.nn.LayerNorm):  # each of another range
                module.weight.uniform_(0.2, 2.0).mul_(torch.empty(()).uniform_(0.3, 1.5))
                module.bias.normal_(std=0.3)
    exact = Transformer(options, **sizes).double().eval()
    exact.load_state_dict(plain.state_dict())
    fast = InferenceTransformer(exact if dtype == torch.float64 else plain, dtype)
    source = padded([[5, 6, 7], [8], [9, 10, 11, 12]])
    target_input = torch.randint(3, 30, (6, 20))
    target_input[:, 0] = EOS_ID  # with which all begin
    with torch.inference_mode():
        expected = exact.decode(target_input, exact.encode(source))
        memory, state = fast.encode(source), fast.start_state()
        steps = [fast.project(fast.step(x, memory, state)) for x in target_input.unbind(dim=1)]
    found = torch.stack(steps, dim=1).double() + fast.logit_offset
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def test_in_bfloat16_likely_tokens_have_logits_near_zero_where_rounding_is_fine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = random_transformer(0, torch.float32)
    with torch.no_grad():
        model.output_weight *= 5.0  # as far apart as those of a trained model
    source = padded([[5, 6, 7], [8], [9, 10, 11, 12], [4], [5, 5], [7, 6]])
    tokens = torch.tensor([EOS_ID] * 6)
    with torch.inference_mode():
        expected = model.decode(tokens[:, None], model.encode(source)).squeeze(1).log_softmax(dim=1)
    errors = {}
    for with_offset in (True, False):
        if not with_offset:
            monkeypatch.setattr(nmt.models.inference, "_typical_normalizer", lambda _: 0.0)
        fast = InferenceTransformer(model, torch.bfloat16)
        assert (fast.logit_offset != 0.0) == with_offset
        with torch.inference_mode():
            features = fast.step(tokens, fast.encode(source), fast.start_state())
            # The features as they are, so that only what happens to the logits counts.
            exact = torch.nn.functional.linear(features.double(), model.output_weight.bfloat16().double())
            found = fast.project(features).float().log_softmax(dim=1)
        likely = expected > -4
        errors[with_offset] = (found - exact.log_softmax(dim=1))[likely].abs().mean()
    assert errors[True] < errors[False] / 2


def test_the_models_own_weights_stay_as_they_are() -> None:
    model = random_transformer(3, torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    search(InferenceTransformer(model, torch.bfloat16), [[5, 6]], 2)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_columns_without_descendants_make_room() -> None:
    # Hypotheses that all go on from the first one: of each older position one column is alive, so that 31
    # positions of 4 hypotheses fit into room for 64 columns.
    model = InferenceTransformer(random_transformer(0, torch.float64))
    with torch.inference_mode():
        memory, state = model.encode(padded([[5, 6], [7]])), model.start_state()
        sizes = []
        for _ in range(31):
            model.step(torch.full((8,), 5), memory, state)
            state.reorder_(torch.tensor([0, 0, 0, 0, 4, 4, 4, 4]))
            sizes.append(state.num_columns)
    assert max(sizes) <= 64
    assert state.length == 31


@pytest.mark.parametrize("beam", [1, 3])
def test_many_sentences_in_bfloat16_are_translated_like_a_few(beam: int) -> None:
    """From 64 sentences on, attention is in bfloat16: up to rounding it is that of a few sentences."""
    model = seldom_ending(7, torch.float32)
    with torch.no_grad():
        model.output_weight *= 4.0  # so that few choices are close
    fast = InferenceTransformer(model, torch.bfloat16)
    sentences = [[3 + (i * j) % (VOCABULARY_SIZE - 3) for j in range(1, 4 + i % 3)] for i in range(80)]
    assert fast.encode(padded(sentences)).parts.dtype == torch.bfloat16
    assert fast.encode(padded(sentences[:63])).parts.dtype == torch.float32
    together = search(fast, sentences, beam)
    apart = [x for i in range(0, 80, 40) for x in search(fast, sentences[i : i + 40], beam)]
    pairs = [(x[0], y[0]) for x, y in zip(together, apart, strict=True)]
    equal = [(x.score, y.score) for x, y in pairs if x.tokens == y.tokens]
    assert len(equal) >= 60  # rounding decides between the others
    for score, expected in equal:
        assert score == pytest.approx(expected, abs=0.2)


@pytest.mark.parametrize("has_mask", [False, True])
def test_attention_in_bfloat16_is_that_in_float64_up_to_rounding(has_mask: bool) -> None:
    torch.manual_seed(0)
    query, keys, values = (torch.randn(3, 2, n, 8).bfloat16() for n in (5, 16, 16))  # (B, H, K or N, E)
    mask = torch.zeros(3, 1, 5, 16)
    mask[:, :, :, 11:] = -torch.inf
    scores = query.double() @ keys.double().transpose(2, 3) + (mask if has_mask else 0.0)
    expected = (scores.softmax(dim=3) @ values.double()).transpose(1, 2).reshape(15, 16)
    found = _attend(query, keys, values, mask if has_mask else None)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, atol=0.03, rtol=0.03)
