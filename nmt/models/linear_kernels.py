"""Linear layers of rows; the gradients of the bias and of a ReLU after the layer are a Triton kernel for GPUs.

The products are PyTorch's own. A column is summed in two stages, in float32 and always in the same order, so that
its sum has the same bits each time.

Shapes: N rows, I and O widths of inputs and outputs, C columns, P partial sums.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_ROWS, _COLUMNS = 16, 128  # that a program takes at once
_PROGRAMS_A_PROCESSOR = 8
_PARTIALS_AT_ONCE, _SUMS_AT_ONCE = 128, 32


@triton.jit
def _sum_columns(
    grad, hidden, masked, partials, num_rows, num_columns, rows_each,
    MASKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * rows_each
    end = tl.minimum(first + rows_each, num_rows)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(first, end, ROWS):
        rows = start + tl.arange(0, ROWS)
        is_in = (rows < end)[:, None] & (columns < num_columns)[None, :]
        at = rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
        x = tl.load(grad + at, mask=is_in, other=0.0)
        if MASKS:
            h = tl.load(hidden + at, mask=is_in, other=0.0)
            x = tl.where(h > 0.0, x, 0.0)
            tl.store(masked + at, x, mask=is_in)
        total += x.to(tl.float32)
    at = tl.program_id(1).to(tl.int64) * num_columns + columns
    tl.store(partials + at, tl.sum(total, 0), mask=columns < num_columns)


@triton.jit
def _sum_partials(
    partials, sums, num_partials, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, num_partials, ROWS):
        rows = start + tl.arange(0, ROWS)
        is_in = (rows < num_partials)[:, None] & (columns < num_columns)[None, :]
        at = rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
        total += tl.load(partials + at, mask=is_in, other=0.0)
    result = tl.sum(total, 0).to(sums.dtype.element_ty)
    tl.store(sums + columns, result, mask=columns < num_columns)


@cache
def num_processors(device: torch.device) -> int:
    """Return how many multiprocessors a GPU has; 2 for Triton's interpreter on a CPU."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def sum_partials(partials: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum the rows of (P, C) float32, always in the same order: (C,)."""
    num_partials, num_columns = partials.shape
    sums = torch.empty(num_columns, dtype=dtype, device=partials.device)
    launch: Any = _sum_partials[(triton.cdiv(num_columns, _SUMS_AT_ONCE),)]
    launch(
        partials, sums, num_partials, num_columns, ROWS=_PARTIALS_AT_ONCE, COLUMNS=_SUMS_AT_ONCE, num_warps=8
    )
    return sums


def sum_columns(grad: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sum the rows of a gradient, in float32; before that, set it to zero where a ReLU has set `hidden` to zero.

    Args:
        grad: (N, C) float, rows side by side.
        hidden: (N, C): what the ReLU returned.

    Returns:
        The gradient (N, C) of the ReLU's input, or `grad` itself without a ReLU; and the sums (C,). Both have the
        type of `grad`.
    """
    assert grad.is_contiguous() and (hidden is None or hidden.is_contiguous())
    num_rows, num_columns = grad.shape
    num_blocks = triton.cdiv(num_columns, _COLUMNS)
    wanted = max(1, num_processors(grad.device) * _PROGRAMS_A_PROCESSOR // num_blocks)
    rows_each = max(1, triton.cdiv(num_rows, wanted * _ROWS)) * _ROWS
    num_parts = max(1, triton.cdiv(num_rows, rows_each))
    masked = grad if hidden is None else torch.empty_like(grad)
    partials = torch.empty(num_parts, num_columns, dtype=torch.float32, device=grad.device)
    launch: Any = _sum_columns[(num_blocks, num_parts)]
    launch(
        grad, grad if hidden is None else hidden, masked, partials, num_rows, num_columns, rows_each,
        MASKS=hidden is not None, ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=4,
    )  # fmt: skip
    return masked, sum_partials(partials, grad.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor, *, has_relu: bool = False) -> Tensor:
    """Return x W^T + b, or max(x W^T + b, 0) if `has_relu`, with gradients.

    Args:
        x: (N, I).
        weight: (O, I).
        bias: (O,).
        has_relu: Whether a ReLU follows.

    Returns:
        (N, O).
    """
    return cast(Callable[..., Tensor], _Linear.apply)(x, weight, bias, has_relu)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, has_relu: bool) -> Tensor:
        # cuBLAS applies the ReLU while it writes the product.
        multiply = torch._addmm_activation if has_relu else torch.addmm
        out = multiply(bias, x, weight.t())
        ctx.save_for_backward(x, weight, out if has_relu else None)
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, hidden = ctx.saved_tensors
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        grad, bias_grad = sum_columns(grad.contiguous(), hidden)
        return (
            torch.mm(grad, weight) if needs_x else None,
            torch.mm(grad.t(), x) if needs_weight else None,
            bias_grad,
            None,
        )


def try_out(dtype: torch.dtype, device: torch.device) -> None:
    """Run each kernel once; raise Triton's error if Triton or the C compiler does not work."""
    x, weight = (torch.zeros(16, 16, dtype=dtype, device=device, requires_grad=True) for _ in range(2))
    bias = torch.zeros(16, dtype=dtype, device=device, requires_grad=True)
    with torch.enable_grad():
        for has_relu in (False, True):
            torch.autograd.grad(linear(x, weight, bias, has_relu=has_relu).sum(), [x, weight, bias])
