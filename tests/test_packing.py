"""Packed batches: the same pairs, loss and gradient as padded ones, in rows of one shape."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.packed_pairs import make_pairs, shape_for
from support.random_transformer import random_transformer

from nmt.data.batching import Window, cut_packed, plan_window
from nmt.data.limits import BatchLimits
from nmt.data.options import BatchingOptions
from nmt.data.order import Permutation
from nmt.data.packing import PackedShape, pack_pairs, packed_limits
from nmt.data.parallel_dataset import collate_pairs
from nmt.data.vocabulary import EOS_ID, PAD_ID
from nmt.translation.loss import packed_translation_loss, translation_loss

LENGTHS = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=9)


@given(LENGTHS, st.integers(0, 30))
def test_a_packed_batch_holds_each_pair_and_what_fills_it_is_padding(lengths, slack):
    pairs = make_pairs(lengths)
    shape = shape_for(lengths, slack=slack)
    batch = pack_pairs(pairs, shape)
    source_starts, target_starts = batch.source_starts.tolist(), batch.target_starts.tolist()
    for i, (source, target) in enumerate(pairs):
        own_source, own_target = (
            slice(starts[i], starts[i + 1]) for starts in (source_starts, target_starts)
        )
        assert batch.source[own_source].tolist() == source.tolist()
        assert batch.target[own_target].tolist() == target.tolist()
        assert batch.target_input[own_target].tolist() == [EOS_ID, *target[:-1].tolist()]
        assert batch.source_positions[own_source].tolist() == list(range(len(source)))
        assert batch.target_positions[own_target].tolist() == list(range(len(target)))
    assert batch.source[source_starts[len(pairs)] :].eq(PAD_ID).all()
    assert batch.target[target_starts[len(pairs)] :].eq(PAD_ID).all()
    for starts in (source_starts, target_starts):
        assert len(starts) == shape.num_parts + 1 and starts[0] == 0 and starts[-1] == shape.length
        assert all(0 <= end - start <= shape.longest for start, end in pairwise(starts))
    # A part with targets has something to attend to.
    assert all(
        source_end > source_start
        for source_start, source_end, target_start, target_end in zip(
            source_starts, source_starts[1:], target_starts, target_starts[1:], strict=False
        )
        if target_end > target_start
    )
    assert batch.num_targets == sum(len(target) for _, target in pairs)
    assert batch.num_examples == len(pairs)


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.integers(0, 15), st.sampled_from([0.0, 0.1]))
def test_loss_and_gradient_of_a_packed_batch_are_those_of_the_padded_one(lengths, seed, label_smoothing):
    pairs = make_pairs(lengths, seed)
    model = random_transformer(seed, torch.float64)
    outputs, gradients = [], []
    for compute, batch in (
        (translation_loss, collate_pairs(pairs)),
        (packed_translation_loss, pack_pairs(pairs, shape_for(lengths, slack=seed))),
    ):
        output = compute(model, batch, label_smoothing=label_smoothing)
        outputs.append(torch.stack([output.loss, output.sums["nll"]]).detach())
        gradients.append(torch.autograd.grad(output.loss, list(model.parameters())))
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    for padded, packed in zip(*gradients, strict=True):
        torch.testing.assert_close(padded, packed, rtol=1e-10, atol=1e-10)


@given(LENGTHS, st.integers(12, 60), st.none() | st.integers(1, 5))
def test_packed_cuts_keep_the_order_and_both_limits(lengths, max_tokens, max_sentences):
    sizes = np.array(lengths, dtype=np.int32)
    batches = cut_packed(sizes, max_tokens=max_tokens, max_sentences=max_sentences)
    assert np.concatenate(batches).tolist() == list(range(len(sizes)))
    for batch, following in zip(batches, [*batches[1:], None], strict=True):
        assert sizes[batch].sum(axis=0).max() <= max_tokens
        assert max_sentences is None or len(batch) <= max_sentences
        if following is not None:  # one more would not have fitted
            more = sizes[[*batch, following[0]]].sum(axis=0).max() > max_tokens
            assert more or len(batch) == max_sentences


def test_packed_windows_hold_every_pair_once_in_random_order():
    sizes = np.random.default_rng(1).integers(1, 20, size=(500, 2)).astype(np.int32)
    limits = BatchLimits(64, max_sentences=32, is_packed=True)
    first, second = (
        plan_window(
            sizes, [(limits, 0)], window=Window(Permutation(500, seed=1, epoch=epoch), number=0, size=500)
        )
        for epoch in (1, 2)
    )
    assert sorted(np.concatenate(first).tolist()) == list(range(500))
    assert [batch.tolist() for batch in first] != [batch.tolist() for batch in second]
    # Padding is no part of what counts: batches are nearly full.
    assert np.mean([sizes[batch].sum(axis=0).max() for batch in first]) > 0.75 * 64


def test_a_batch_that_does_not_fit_its_shape_is_a_fault_of_the_program():
    with pytest.raises(AssertionError):
        pack_pairs(make_pairs([(5, 5)] * 20), PackedShape.of(max_tokens=20, max_sentences=4, longest=12))


@pytest.mark.parametrize("max_tokens", [400_000, 40_000_000])
def test_a_row_has_no_more_parts_than_a_gpu_starts_programs(max_tokens):
    sizes = np.full((1000, 2), 1, np.int32)
    limits = packed_limits(BatchingOptions(max_tokens=max_tokens), sizes)
    shape = PackedShape.of(max_tokens=max_tokens, max_sentences=limits.max_sentences, longest=1)
    assert 30_000 < limits.max_sentences < shape.num_parts <= 65_535
    assert (shape.num_parts - limits.max_sentences) * shape.longest >= shape.length  # fillers fill a row
