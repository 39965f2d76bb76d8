"""Dropout, residual connection and normalisation in one kernel, beside plain ones.

On a GPU, or elsewhere by Triton's interpreter.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

# Interpreters of older releases do not run with NumPy 2.4 and newer.
pytest.importorskip("triton", minversion=None if torch.cuda.is_available() else "3.9")

from nmt.models import norm_kernels
from nmt.models.norm_kernels import Drop, Norm, Product, add, add_and_norm, norm_beside

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter computes in NumPy, which has no bfloat16.
TYPES = [torch.float32, *([torch.bfloat16, torch.float16] if DEVICE == "cuda" else [])]
SIZES = [(37, 24), (1, 256), (33, 512), (7, 1024), (3, 2048), (260, 40)]  # (N, D)
NAMES = ("x", "product", "product_bias", "weight", "bias")


def make_inputs(num_rows: int, dim: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return x, product, its bias, and the weight and bias of a normalisation; rows far from zero."""
    torch.manual_seed(num_rows)
    rows = [torch.randn(num_rows, dim, device=DEVICE) * 2 + shift for shift in (3.0, -1.0)]
    vectors = [torch.randn(dim, device=DEVICE) for _ in range(3)]
    return [t.to(dtype).requires_grad_() for t in (*rows, *vectors)]


def seed_of(number: int) -> Tensor:
    return torch.tensor([number], device=DEVICE)


def mask_of(num_rows: int, dim: int, drop: Drop) -> Tensor:
    """Return what dropout multiplies with: the sum of nothing and of ones that are dropped."""
    zeros = torch.zeros(num_rows, dim, device=DEVICE)
    return add(zeros, Product(zeros, torch.ones(dim, device=DEVICE)), drop)


def assert_same(
    ours: Callable[[list[Tensor]], tuple[Tensor, Tensor]],
    plain: Callable[[list[Tensor]], tuple[Tensor, Tensor]],
    inputs: list[Tensor],
    *,
    weights: tuple[float, float] = (1.0, 1.0),
) -> None:
    """Compare outputs and gradients, in float64 what is plain; each output with a gradient of its own."""
    tolerance = 2e-5 if inputs[0].dtype == torch.float32 else 3e-2
    accurate = [t.detach().double().requires_grad_() for t in inputs]
    found, expected = ours(inputs), plain(accurate)
    grads = [torch.randn_like(out) * weight for out, weight in zip(found, weights, strict=True)]
    for one, other in zip(found, expected, strict=True):
        scale = (
            float(other.detach().abs().max()) + 1.0
        )  # terms that cancel each other were rounded at their size
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance * scale)
    found_grads = torch.autograd.grad(found, inputs, grads, allow_unused=True)
    wanted_grads = torch.autograd.grad(expected, accurate, [g.double() for g in grads], allow_unused=True)
    for name, one, other in zip(NAMES, found_grads, wanted_grads, strict=True):
        assert (one is None) == (other is None), name
        if one is not None:
            scale = float(other.abs().max()) + 1.0
            torch.testing.assert_close(
                one.double(), other, rtol=tolerance, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize(("num_rows", "dim"), SIZES)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", TYPES)
def test_post_norm_is_the_plain_one(num_rows: int, dim: int, dropout: float, dtype: torch.dtype) -> None:
    drop = Drop(dropout, seed_of(9))
    mask = mask_of(num_rows, dim, drop).double()

    def ours(t: list[Tensor]) -> tuple[Tensor, Tensor]:
        return add_and_norm(t[0], Product(t[1], t[2]), Norm(t[3], t[4], 1e-5), drop)

    def plain(t: list[Tensor]) -> tuple[Tensor, Tensor]:
        y = F.layer_norm(t[0] + mask * (t[1] + t[2]), (dim,), t[3], t[4], 1e-5)
        return y, y

    assert_same(ours, plain, make_inputs(num_rows, dim, dtype))


@pytest.mark.parametrize(("num_rows", "dim"), SIZES)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", TYPES)
def test_pre_norm_is_the_plain_one(num_rows: int, dim: int, dropout: float, dtype: torch.dtype) -> None:
    """The block doubles what it reads."""
    drop = Drop(dropout, seed_of(11))
    mask = mask_of(num_rows, dim, drop).double()

    def ours(t: list[Tensor]) -> tuple[Tensor, Tensor]:
        y, past = norm_beside(t[0], Norm(t[3], t[4], 1e-5))
        return add(past, Product(2 * y + t[1], t[2]), drop), y

    def plain(t: list[Tensor]) -> tuple[Tensor, Tensor]:
        y = F.layer_norm(t[0], (dim,), t[3], t[4], 1e-5)
        return t[0] + mask * (2 * y + t[1] + t[2]), y

    assert_same(ours, plain, make_inputs(num_rows, dim, dtype))


@pytest.mark.parametrize("which", [0, 1])
def test_either_reader_may_have_no_gradient(which: int) -> None:
    x, product, product_bias, weight, bias = make_inputs(6, 24)
    drop = Drop(0.0, seed_of(0))
    grad = torch.randn(6, 24, device=DEVICE)
    plain = F.layer_norm(x + product + product_bias, (24,), weight, bias)
    ours = add_and_norm(x, Product(product, product_bias), Norm(weight, bias, 1e-5), drop)[which]
    inputs = [x, product, product_bias, weight, bias]
    found, wanted = (torch.autograd.grad(y, inputs, grad) for y in (ours, plain))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    y_or_x = norm_beside(x, Norm(weight, bias, 1e-5))[which]
    plain_y_or_x = (F.layer_norm(x, (24,), weight, bias), x)[which]
    found, wanted = (torch.autograd.grad(y, [x], grad) for y in (y_or_x, plain_y_or_x))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_rows_without_variance_are_not_divided_by_zero() -> None:
    x, product, product_bias, weight, bias = make_inputs(4, 24)
    with torch.no_grad():
        x.fill_(5.0), product.fill_(-2.0), product_bias.zero_()
    drop = Drop(0.0, seed_of(0))
    y, _ = add_and_norm(x, Product(product, product_bias), Norm(weight, bias, 1e-5), drop)
    torch.testing.assert_close(y, bias.expand(4, 24))
    grads = torch.autograd.grad(y, [x, weight, bias], torch.randn(4, 24, device=DEVICE))
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9])
def test_about_the_share_that_was_asked_for_is_dropped(dropout: float) -> None:
    num_rows, dim = 200, 512
    mask = mask_of(num_rows, dim, Drop(dropout, seed_of(3)))
    kept = mask > 0
    assert mask[kept].unique().numel() == 1
    assert mask[kept][0].item() == pytest.approx(1 / (1 - dropout), rel=1e-3)
    deviation = (dropout * (1 - dropout)) ** 0.5
    assert kept.float().mean().item() == pytest.approx(
        1 - dropout, abs=5 * deviation / (num_rows * dim) ** 0.5
    )
    # No row, and no column, is far from the share either; and neighbours do not go together.
    for along in (0, 1):
        size = mask.size(along)
        shares = kept.float().mean(dim=along)
        assert (shares - (1 - dropout)).abs().max().item() < 5 * deviation / size**0.5
        first, second = kept.float().narrow(along, 0, size - 1), kept.float().narrow(along, 1, size - 1)
        covariance = ((first - first.mean()) * (second - second.mean())).mean().item()
        assert abs(covariance) < 5 * deviation**2 / first.numel() ** 0.5


def test_the_seed_alone_decides_what_is_dropped() -> None:
    drops = [Drop(0.5, seed_of(number)) for number in (1, 1, 2, 1 + 2**40)]
    one, again, other, far = (mask_of(20, 64, drop) for drop in drops)
    assert torch.equal(one, again)
    for different in (other, far):
        share = (one == different).float().mean().item()
        assert share == pytest.approx(0.5, abs=5 * 0.5 / one.numel() ** 0.5)
    # Rows do not depend on how many there are.
    assert torch.equal(mask_of(7, 64, drops[0]), one[:7])


def test_gradients_may_come_in_any_strides() -> None:
    x, product, product_bias, weight, bias = make_inputs(24, 24)
    drop = Drop(0.0, seed_of(0))
    y, _ = add_and_norm(x, Product(product, product_bias), Norm(weight, bias, 1e-5), drop)
    plain = F.layer_norm(x + product + product_bias, (24,), weight, bias)
    grad = torch.randn(24, 24, device=DEVICE).t()
    found, wanted = (torch.autograd.grad(out, [x, product_bias], grad) for out in (y, plain))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_the_kernels_can_be_tried_out() -> None:
    norm_kernels.try_out(torch.float32, 40, torch.device(DEVICE))
