"""Attention by our own kernels, beside plain masks: on a GPU, or elsewhere by Triton's interpreter."""

import numpy as np
import pytest
import torch

# Interpreters of older releases do not run with NumPy 2.4 and newer.
pytest.importorskip("triton", minversion=None if torch.cuda.is_available() else "3.9")

from nmt.data.packing import PackedShape, PackedTranslationBatch, pack_pairs
from nmt.models.packed_kernels import SOURCE, TARGET, attend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter computes in NumPy, which has no bfloat16.
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
TOLERANCE = 3e-2 if DEVICE == "cuda" else 1e-5
HEADS, SIZE = 2, 16
WIDTH = HEADS * SIZE
# Short ones that share a block, and some that need two or three.
LENGTHS = [(3, 5), (40, 60), (70, 50), (1, 1), (200, 30), (10, 300), (128, 128), (129, 127), (6, 6)]


def make_batch() -> PackedTranslationBatch:
    random = np.random.default_rng(0)
    pairs = [tuple(random.integers(4, 9, size=n) for n in lengths) for lengths in LENGTHS]
    shape = PackedShape.of(max_tokens=768, max_sentences=12, longest=300)
    return pack_pairs(pairs, shape).to(DEVICE)  # type: ignore[arg-type]


def parts(batch: PackedTranslationBatch, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the items and the parts of a side."""
    if side == SOURCE:
        return batch.source_items, batch.source_parts
    return batch.target_items, batch.target_parts


def reference(q, k, v, q_parts, k_parts, is_causal):
    """By a mask over the whole rows, in float64: (N, H*E)."""
    q, k, v = (x.double().unflatten(1, (HEADS, SIZE)).transpose(0, 1) for x in (q, k, v))
    mask = q_parts[:, None] == k_parts[None, :]
    mask = mask.tril() if is_causal else mask
    scores = (q @ k.transpose(1, 2)) / SIZE**0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
    return (weights @ v).transpose(0, 1).flatten(1)


@pytest.mark.parametrize(
    ("q_side", "k_side", "is_causal"),
    [(SOURCE, SOURCE, False), (TARGET, TARGET, True), (TARGET, SOURCE, False)],
    ids=["encoder", "decoder", "decoder to encoder"],
)
def test_attention_and_its_gradients_are_those_of_a_mask(q_side: int, k_side: int, is_causal: bool) -> None:
    batch = make_batch()
    (q_items, q_parts), (k_items, k_parts) = parts(batch, q_side), parts(batch, k_side)
    torch.manual_seed(1)
    is_self = q_side == k_side
    length = batch.shape.length
    first = torch.randn(length, (3 if is_self else 1) * WIDTH, device=DEVICE, dtype=DTYPE, requires_grad=True)
    second = None if is_self else torch.randn_like(first.detach().repeat(1, 2)).requires_grad_()
    tables = (q_items, k_items, q_parts, k_parts, q_parts)
    out = attend(first, second, tables, (HEADS, q_side, k_side, is_causal, 0.0))
    q, k, v = first.chunk(3, dim=1) if second is None else (first, *second.chunk(2, dim=1))
    expected = reference(q, k, v, q_parts, k_parts, is_causal)
    torch.testing.assert_close(out.double(), expected, rtol=TOLERANCE, atol=TOLERANCE)
    grad = torch.randn_like(out)
    inputs = [first] if second is None else [first, second]
    for ours, theirs in zip(
        torch.autograd.grad(out, inputs, grad),
        torch.autograd.grad(expected, inputs, grad.double()),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=4 * TOLERANCE)


def test_dropped_weights_are_the_same_in_both_passes() -> None:
    """With one head and values of ones: the output is linear in the values, so its gradient tells the weights."""
    batch = make_batch()
    items, own_parts = parts(batch, SOURCE)
    torch.manual_seed(2)
    qkv = torch.randn(batch.shape.length, 3 * WIDTH, device=DEVICE, dtype=DTYPE, requires_grad=True)
    seed = torch.tensor([7], device=DEVICE)
    settings = (HEADS, SOURCE, SOURCE, False, 0.4)
    tables = (items, items, own_parts, own_parts, seed)
    out = attend(qkv, None, tables, settings)
    again = attend(qkv, None, tables, settings)
    assert torch.equal(out, again)
    other = attend(qkv, None, (*tables[:4], seed + 1), settings)
    assert not torch.equal(out, other)
    # sum(out * g) is linear in the values: it equals sum(values * its gradient).
    grad = torch.randn_like(out)
    (found,) = torch.autograd.grad(out, qkv, grad)
    values, value_grad = qkv[:, 2 * WIDTH :].double(), found[:, 2 * WIDTH :].double()
    torch.testing.assert_close(
        (out.double() * grad.double()).sum(), (values * value_grad).sum(), rtol=TOLERANCE, atol=1e-2
    )
    # The gradient of a query by differences: what is dropped stays the same.
    if DEVICE == "cpu":
        step = torch.zeros_like(qkv)
        step[5, 3] = 1e-2
        ups, downs = (attend(qkv + sign * step, None, tables, settings) for sign in (1, -1))
        slope = ((ups - downs) * grad).sum() / 2e-2
        torch.testing.assert_close(slope.detach(), found[5, 3], rtol=1e-2, atol=1e-3)


def test_about_the_share_that_was_asked_for_is_dropped() -> None:
    batch = make_batch()
    items, own_parts = parts(batch, SOURCE)
    qkv = torch.zeros(batch.shape.length, 3 * WIDTH, device=DEVICE, dtype=DTYPE)
    qkv[:, 2 * WIDTH :] = (
        1.0  # with equal weights each output is the share that is kept, over the chance to be so
    )
    seed = torch.tensor([3], device=DEVICE)
    out = attend(qkv, None, (items, items, own_parts, own_parts, seed), (HEADS, SOURCE, SOURCE, False, 0.25))
    long_parts = out[batch.source_starts[4] : batch.source_starts[5]].float()  # 200 tokens
    assert long_parts.mean().item() == pytest.approx(1.0, abs=0.02)
    assert 0.01 < long_parts[:, ::SIZE].std().item() < 0.1  # sqrt(0.25 / 0.75 / 200) = 0.04
