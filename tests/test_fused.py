"""The fused operations against their plain forms."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nmt.models import fused
from nmt.models.fused import Dropout, linear_cross_entropy, random_mask


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


def test_bfloat16_is_close_to_float64() -> None:
    torch.manual_seed(0)
    features = torch.randn(300, 16).bfloat16().requires_grad_()
    weight = torch.randn(50, 16).bfloat16().requires_grad_()
    target = torch.randint(0, 50, (300,))
    loss, _ = linear_cross_entropy(features, weight, target, label_smoothing=0.1)
    expected, _ = plain_loss(features.double(), weight.double(), target, 0.1)
    assert loss.dtype == torch.float32
    assert abs(loss.item() / expected.item() - 1) < 0.01


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5])
def test_dropout_drops_a_share_of_p_and_keeps_the_mean(p: float) -> None:
    torch.manual_seed(0)
    n = 1_000_003  # no multiple of four: four masks' numbers come from one word
    mask = random_mask(torch.empty(n), p)
    # Five standard deviations of a binomial count.
    assert abs((mask == 0).double().mean().item() - p) < 5 * (p * (1 - p) / n) ** 0.5 + 2**-16
    assert set(mask.unique().tolist()) == {0.0, mask.max().item()}
    assert abs(mask.max().item() * (1 - p) - 1) < 1e-4


def test_dropout_has_the_gradient_of_its_mask_and_is_off_in_evaluation() -> None:
    dropout = Dropout(0.5)
    x = torch.ones(1000, requires_grad=True)
    y = dropout(x)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())  # d(x * m)/dx = m, and x is 1
    assert 0 < (y == 0).sum() < 1000
    assert dropout.eval()(x) is x
