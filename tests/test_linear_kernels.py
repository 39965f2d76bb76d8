"""Linear layers with our own gradients of biases and ReLU, beside plain ones.

On a GPU, or elsewhere by Triton's interpreter.
"""

import pytest
import torch
import torch.nn.functional as F

# Interpreters of older releases do not run with NumPy 2.4 and newer.
pytest.importorskip("triton", minversion=None if torch.cuda.is_available() else "3.9")

from nmt.models import linear_kernels
from nmt.models.linear_kernels import linear, sum_columns, sum_partials

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = [torch.bfloat16, torch.float16] if DEVICE == "cuda" else []  # NumPy has no bfloat16


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


@pytest.mark.parametrize(
    ("num_rows", "num_columns"), [(1, 24), (15, 256), (16, 512), (1001, 24), (530, 129), (37, 1536)]
)
@pytest.mark.parametrize("has_relu", [False, True])
def test_columns_are_summed_after_what_a_relu_did_to_them(
    num_rows: int, num_columns: int, has_relu: bool
) -> None:
    torch.manual_seed(num_rows)
    grad, hidden = randn(num_rows, num_columns), randn(num_rows, num_columns).relu()
    expected = grad * (hidden > 0) if has_relu else grad
    masked, sums = sum_columns(grad, hidden if has_relu else None)
    assert torch.equal(masked, expected)
    torch.testing.assert_close(sums.double(), expected.double().sum(dim=0), rtol=1e-5, atol=1e-4)
    assert torch.equal(sums, sum_columns(grad, hidden if has_relu else None)[1])


def test_no_rows_sum_to_zeros() -> None:
    masked, sums = sum_columns(randn(0, 40), randn(0, 40))
    assert masked.shape == (0, 40)
    assert torch.equal(sums, torch.zeros(40, device=DEVICE))


@pytest.mark.parametrize("num_partials", [1, 128, 300])
def test_partial_sums_are_summed(num_partials: int) -> None:
    partials = randn(num_partials, 77)
    sums = sum_partials(partials, torch.float32)
    torch.testing.assert_close(sums.double(), partials.double().sum(dim=0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("has_relu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *ON_GPU])
def test_a_linear_layer_has_the_gradients_of_the_plain_one(has_relu: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    x, weight, bias = (randn(*shape, dtype=dtype).requires_grad_() for shape in ((50, 32), (48, 32), (48,)))
    grad = randn(50, 48, dtype=dtype)
    plain = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    expected = F.linear(*plain)
    expected = expected.relu() if has_relu else expected
    out = linear(x, weight, bias, has_relu=has_relu)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    found = torch.autograd.grad(out, [x, weight, bias], grad)
    wanted = torch.autograd.grad(expected, plain, grad.double())
    for ours, theirs in zip(found, wanted, strict=True):
        # Where a rounded output is zero its gradient is left out: some numbers of a sum.
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=10 * tolerance)


def test_what_is_not_trained_has_no_gradient() -> None:
    x, weight, bias = randn(5, 8), randn(6, 8), randn(6).requires_grad_()
    grad = randn(5, 6)
    (found,) = torch.autograd.grad(linear(x, weight, bias), bias, grad)
    torch.testing.assert_close(found, grad.sum(dim=0))


def test_gradients_may_come_in_any_strides() -> None:
    x, weight, bias = (randn(*shape).requires_grad_() for shape in ((5, 8), (6, 8), (6,)))
    grad = randn(6, 5).t()
    found = torch.autograd.grad(linear(x, weight, bias), [x, weight, bias], grad)
    wanted = torch.autograd.grad(F.linear(x, weight, bias), [x, weight, bias], grad)
    torch.testing.assert_close(found, wanted)


def test_the_kernels_can_be_tried_out() -> None:
    linear_kernels.try_out(torch.float32, torch.device(DEVICE))
