"""The fused operations against their plain forms."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nmt.models import training_ops as fused
from nmt.models.training_ops import (
    Dropout,
    Linear,
    attend,
    embed,
    linear_cross_entropy,
    random_mask,
    split_heads,
)

# Largest relative error of a rounding: half a unit in the last of 8 and of 24 bits.
ROUNDING = {torch.bfloat16: 2**-8, torch.float32: 2**-24, torch.float64: 2**-53}
FAST_TYPES = [torch.float32, torch.float64]  # only the first has products of its own


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(deadline=None, max_examples=40)
@given(
    rows=st.lists(st.integers(0, 9), min_size=1, max_size=2),
    inner=st.integers(1, 40),
    outer=st.integers(1, 40),
    has_bias=st.booleans(),
    dtype=st.sampled_from(FAST_TYPES),
)
def test_a_linear_layer_equals_the_plain_one(
    rows: list[int], inner: int, outer: int, has_bias: bool, dtype: torch.dtype
) -> None:
    layer = Linear(inner, outer, bias=has_bias).to(dtype)
    x = randn(*rows, inner, dtype=dtype).requires_grad_()
    grad = randn(*rows, outer, seed=1, dtype=dtype)
    inputs = [x, *layer.parameters()]
    x64, *parameters64 = exact = [each.detach().double().requires_grad_() for each in inputs]
    output = layer(x)
    expected = F.linear(x64, *parameters64)
    gradients = torch.autograd.grad(output, inputs, grad)
    expected_gradients = torch.autograd.grad(expected, exact, grad.double())
    # A sum of k products of two numbers is off by k roundings of their magnitudes at most, and here |a| |b| < 36.
    num_rows = max(1, x[..., 0].numel())
    for one, other, terms in zip(
        (output, *gradients),
        (expected, *expected_gradients),
        (inner + 1, outer, num_rows, num_rows),
        strict=False,
    ):
        assert one.shape == other.shape and one.dtype == dtype
        torch.testing.assert_close(
            one.double(), other, rtol=0, atol=36 * terms * (terms + 1) * ROUNDING[dtype]
        )


@settings(deadline=None, max_examples=20)
@given(rows=st.integers(0, 30), classes=st.integers(2, 9), dim=st.integers(1, 5))
def test_an_embedding_has_the_gradient_of_the_plain_one(rows: int, classes: int, dim: int) -> None:
    ids = torch.randint(0, classes, (rows, 2), generator=torch.Generator().manual_seed(rows))
    weight = randn(classes, dim).requires_grad_()
    grad = randn(rows, 2, dim, seed=1)
    (gradient,) = torch.autograd.grad(embed(ids, weight, pad_id=1), weight, grad)
    plain = F.embedding(ids, weight, padding_idx=1)
    (expected,) = torch.autograd.grad(plain, weight, grad)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(embed(ids, weight, pad_id=1), plain)


def test_the_gradient_of_an_embedding_in_bfloat16_is_summed_in_float32() -> None:
    """One rounding: 1 + 1 + ... in bfloat16 would stop at 256."""
    weight = torch.zeros(3, 1, dtype=torch.bfloat16, requires_grad=True)
    embed(torch.full((1000,), 2), weight, pad_id=1).sum().backward()
    assert weight.grad is not None and weight.grad.flatten().tolist() == [0, 0, 1000]


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_split_heads_equals_the_views(parts: int) -> None:
    x = randn(2, 5, parts * 6).requires_grad_()
    views = x.unflatten(-1, (parts * 3, 2)).transpose(1, 2).chunk(parts, dim=1)
    split = split_heads(x, parts, 3)
    assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(split, views, strict=True))
    weights = [randn(2, 3, 5, 2, seed=i) for i in range(parts)]
    for used in range(1, parts + 1):  # a part without a gradient has the gradient zero
        gradients = [
            torch.autograd.grad(
                sum((a * b).sum() for a, b in zip(form[:used], weights, strict=False)), x, retain_graph=True
            )[0]
            for form in (split, views)
        ]
        assert torch.equal(*gradients)


@settings(deadline=None, max_examples=40)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    lengths=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    kind=st.sampled_from(["padding", "causal", "none"]),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    seed=st.integers(0, 2**31),
)
def test_attention_equals_pytorchs(
    batch: int, heads: int, lengths: tuple[int, int], kind: str, scale: float, seed: int
) -> None:
    num_queries, num_keys = lengths if kind != "causal" else (lengths[0], lengths[0])
    q, k, v = (
        (scale * randn(batch, heads, length, 4, seed=seed + i)).requires_grad_()
        for i, length in enumerate((num_queries, num_keys, num_keys))
    )
    mask = None
    if kind == "padding":
        generator = torch.Generator().manual_seed(seed)
        kept = torch.randint(1, num_keys + 1, (batch, 1, 1, 1), generator=generator)
        mask = torch.arange(num_keys) < kept
    is_causal = kind == "causal"
    output = attend(q, k, v, attention_mask=mask, is_causal=is_causal)
    plain = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
    expected = plain.transpose(1, 2).flatten(2)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    grad = randn(*output.shape, seed=seed)
    for one, other in zip(
        torch.autograd.grad(output, [q, k, v], grad),
        torch.autograd.grad(expected, [q, k, v], grad),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_dropped_attention_weights_have_no_gradient_and_the_others_that_of_their_mask() -> None:
    q, k, v = (randn(2, 2, 4, 3, seed=i).requires_grad_() for i in range(3))
    bias = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    torch.manual_seed(5)
    output = fused.attention(q, k, v, bias, dropout=0.4)
    torch.manual_seed(5)
    kept, scale = random_mask(torch.empty(4, 4, 4, dtype=torch.float64), 0.4)
    mask = scale * kept.double().view(2, 2, 4, 4)
    weights = (q @ k.transpose(-1, -2) / 3**0.5).softmax(-1)
    expected = ((weights * mask) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    grad = randn(*output.shape)
    for one, other in zip(
        torch.autograd.grad(output, [q, k, v], grad),
        torch.autograd.grad(expected, [q, k, v], grad),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def plain_loss(features: Tensor, weight: Tensor, target: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """fairseq's formula, class by class."""
    log_probs = F.log_softmax(features @ weight.t(), dim=-1)
    nll = -log_probs.gather(1, target[:, None]).sum()
    other = eps / (len(weight) - 1)
    return (1 - eps - other) * nll + other * -log_probs.sum(), nll


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(0, 50),
    dim=st.integers(1, 9),
    classes=st.integers(2, 30),
    eps=st.sampled_from([0.0, 0.1, 0.6]),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    at_once=st.sampled_from([1, 100, 10_000]),
    seed=st.integers(0, 2**31),
)
def test_linear_cross_entropy_equals_the_plain_form(
    tokens: int, dim: int, classes: int, eps: float, scale: float, at_once: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = (scale * torch.randn(tokens, dim, dtype=torch.float64, generator=generator)).requires_grad_()
    weight = torch.randn(classes, dim, dtype=torch.float64, generator=generator).requires_grad_()
    target = torch.randint(0, classes, (tokens,), generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(fused._LOGITS_AT_ONCE, "cpu", at_once)
        loss, nll = linear_cross_entropy(features, weight, target, label_smoothing=eps)
    expected_loss, expected_nll = plain_loss(features, weight, target, eps)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(nll, expected_nll.detach(), rtol=1e-10, atol=1e-9)
    gradients = torch.autograd.grad(3.0 * loss, [features, weight])
    expected = torch.autograd.grad(3.0 * expected_loss, [features, weight])
    for gradient, expected_gradient in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("frozen", ["weight", "features"])
def test_what_is_frozen_costs_no_product_and_changes_nothing(
    frozen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    given = {"features": torch.randn(20, 4).double(), "weight": torch.randn(7, 4).double()}
    target = torch.randint(0, 7, (20,))
    trained = {name: tensor.clone().requires_grad_() for name, tensor in given.items()}
    other = "features" if frozen == "weight" else "weight"

    def gradient(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        loss, _ = linear_cross_entropy(
            tensors["features"], tensors["weight"], target, label_smoothing=0.1, ignored=3
        )
        (found,) = torch.autograd.grad(2.0 * loss, [tensors[other]])
        return found

    expected = gradient(trained)
    products: list[int] = []
    product = fused.product
    monkeypatch.setattr(fused, "product", lambda a, b: products.append(0) or product(a, b))
    assert torch.equal(gradient({**trained, frozen: given[frozen]}), expected)
    assert len(products) == 2  # the logits, and one of the two gradients


def test_an_impossible_target_has_a_finite_loss() -> None:
    """In float32 exp(-1000) is 0; its logarithm must not be taken."""
    features = torch.tensor([[1000.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0]])
    loss, _ = linear_cross_entropy(features, weight, torch.tensor([1]), label_smoothing=0.0)
    assert loss.item() == 1000.0


def test_the_loss_without_gradients_is_the_same() -> None:
    torch.manual_seed(0)
    features, weight = torch.randn(20, 4), torch.randn(7, 4)
    target = torch.randint(0, 7, (20,))
    without = linear_cross_entropy(features, weight, target, label_smoothing=0.1)[0]
    loss = linear_cross_entropy(features.requires_grad_(), weight, target, label_smoothing=0.1)[0]
    torch.testing.assert_close(without, loss.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_the_loss_in_low_precision_is_off_by_its_roundings_alone(dtype: torch.dtype, eps: float) -> None:
    """With u the largest relative error of a rounding and D terms in a product of features and weights.

    A logit is off by d = D u' Z + u Z (u' is float32's, in which products are summed; Z bounds the sum of
    magnitudes), so the loss of a token is off by 2d, and its probabilities by 2d in sum. They are rounded once
    more, by u. Both gradients are sums of these errors times weights, or features; and are
    rounded at the end, and where the smoothing is subtracted.
    """
    num_tokens, dim, classes = 300, 16, 50
    features, weight = randn(num_tokens, dim, dtype=dtype), randn(classes, dim, seed=1, dtype=dtype)
    target = torch.randint(0, classes, (num_tokens,), generator=torch.Generator().manual_seed(2))
    inputs = [features.requires_grad_(), weight.requires_grad_()]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(fused._LOGITS_AT_ONCE, "cpu", 100 * classes)
        loss, nll = linear_cross_entropy(features, weight, target, label_smoothing=eps)
    expected_loss, expected_nll = plain_loss(*exact, target, eps)
    assert loss.dtype == nll.dtype == torch.float32
    u, u32 = ROUNDING[dtype], ROUNDING[torch.float32]
    largest_logit = (exact[0].abs() @ exact[1].abs().t()).max().item()
    # Softmax and sums in float32 add a few of its roundings for each class and token.
    of_logit = (dim * u32 + u) * largest_logit + (classes + num_tokens) * u32
    assert abs(loss.item() - expected_loss.item()) < 2 * num_tokens * of_logit
    assert abs(nll.item() - expected_nll.item()) < 2 * num_tokens * of_logit
    gradients = torch.autograd.grad(loss, inputs)
    expected = torch.autograd.grad(expected_loss, exact)
    of_probabilities = 2 * of_logit + 2 * u  # the difference from the target's distribution sums up to 2
    factors = (exact[1].abs().max().item(), exact[0].abs().sum().item())
    for gradient, expected_gradient, factor in zip(gradients, expected, factors, strict=True):
        assert gradient.dtype == dtype
        bound = of_probabilities * factor + 3 * u * (expected_gradient.abs() + eps * factor)
        assert ((gradient.double() - expected_gradient).abs() < bound).all()


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5])
def test_dropout_drops_a_share_of_p_and_keeps_the_mean(p: float) -> None:
    torch.manual_seed(0)
    n = 1_000_003  # no multiple of four: four masks' numbers come from one word
    mask, scale = random_mask(torch.empty(n), p)
    # Five standard deviations of a binomial count.
    assert abs((mask == 0).double().mean().item() - p) < 5 * (p * (1 - p) / n) ** 0.5 + 2**-16
    assert set(mask.unique().tolist()) == {0, 1}
    assert abs(scale * (1 - p) - 1) < 1e-4


def test_dropout_has_the_gradient_of_its_mask_and_is_off_in_evaluation() -> None:
    dropout = Dropout(0.5)
    x = torch.ones(1000, requires_grad=True)
    y = dropout(x)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())  # d(x * m)/dx = m, and x is 1
    assert 0 < (y == 0).sum() < 1000
    assert dropout.eval()(x) is x
