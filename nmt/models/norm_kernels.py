"""Dropout, residual connection and layer normalisation of rows, as one Triton kernel for GPUs in each direction.

Here p is the product of a linear layer and b its bias; x goes past the layer; w and c are the weight and the bias
of the normalisation:

    s = x + dropout(p + b)      y = w * (s - mean(s)) / sqrt(var(s) + eps) + c

`add_and_norm` computes both and returns y. `norm_beside` computes y from a given s = x. `add` computes only s. The
backward pass reads s in the type of the rows, and draws the dropout mask again from its seed. Gradients of w, c
and b are sums over all rows. Each program sums its own rows in float32, and then these sums are summed, always in
the same order, so that the results have the same bits each time.

Shapes: N rows, D model.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from nmt.models.linear_kernels import num_processors, sum_partials
from nmt.models.training_ops import in_16_bits

_PROGRAMS_A_PROCESSOR = 2


@triton.jit
def _is_kept(seed_at, rows, threshold, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Return what dropout keeps of some rows, (ROWS, BLOCK) bool; depends only on the seed and the place.

    One call of Philox gives eight numbers of 16 random bits each. Seven rounds are enough to pass the tests of
    randomness that its authors ran (Salmon et al., 2011).
    """
    places = tl.arange(0, BLOCK // 8)[None, :] + tl.zeros((ROWS, 1), tl.int32)
    zero = places * 0
    a, b, c, d = tl.philox(tl.load(seed_at), places, rows[:, None] + zero, zero, zero, n_rounds=7)
    words = tl.join(tl.join(a, b), tl.join(c, d))  # (ROWS, BLOCK/8, 2, 2)
    numbers = tl.join(words & 0xFFFF, words >> 16).reshape(ROWS, BLOCK)
    return numbers.to(tl.int32) >= threshold


@triton.jit
def _forward(
    x, product, product_bias, weight, bias, total, y, means, scales, seed_at,
    num_rows, num_columns, eps, threshold, keep_scale,
    ADDS: tl.constexpr, NORMS: tl.constexpr, DROPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    has_row, has_column = rows < num_rows, columns < num_columns
    is_in = has_row[:, None] & has_column[None, :]
    at = rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
    s = tl.load(x + at, mask=is_in, other=0.0).to(tl.float32)
    if ADDS:
        added = tl.load(product + at, mask=is_in, other=0.0).to(tl.float32)
        added += tl.load(product_bias + columns, mask=has_column, other=0.0).to(tl.float32)[None, :]
        if DROPS:
            added = tl.where(_is_kept(seed_at, rows, threshold, ROWS, BLOCK), added * keep_scale, 0.0)
        rounded = (s + added).to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=is_in)
        s = rounded.to(tl.float32)  # the same rounded numbers that the backward pass reads
    if NORMS:
        mean = tl.sum(s, 1) / num_columns
        centered = tl.where(is_in, s - mean[:, None], 0.0)
        scale = 1.0 / tl.sqrt(tl.sum(centered * centered, 1) / num_columns + eps)
        w = tl.load(weight + columns, mask=has_column, other=0.0).to(tl.float32)
        c = tl.load(bias + columns, mask=has_column, other=0.0).to(tl.float32)
        normed = centered * scale[:, None] * w[None, :] + c[None, :]
        tl.store(y + at, normed.to(y.dtype.element_ty), mask=is_in)
        tl.store(means + rows, mean, mask=has_row)
        tl.store(scales + rows, scale, mask=has_row)


@triton.jit
def _backward(
    grad, grad_beside, total, weight, means, scales, grad_x, grad_product, partials, seed_at,
    num_rows, num_columns, threshold, keep_scale,
    ADDS: tl.constexpr, NORMS: tl.constexpr, DROPS: tl.constexpr, HAS_BESIDE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK)
    has_column = columns < num_columns
    if NORMS:
        w = tl.load(weight + columns, mask=has_column, other=0.0).to(tl.float32)
    sum_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    sum_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    sum_product = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS):
        rows = start + tl.arange(0, ROWS)
        has_row = rows < num_rows
        is_in = has_row[:, None] & has_column[None, :]
        at = rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
        g = tl.load(grad + at, mask=is_in, other=0.0).to(tl.float32)
        if HAS_BESIDE:
            beside = tl.load(grad_beside + at, mask=is_in, other=0.0).to(tl.float32)
            if ADDS:  # both are gradients of y
                g += beside
        if NORMS:
            s = tl.load(total + at, mask=is_in, other=0.0).to(tl.float32)
            mean = tl.load(means + rows, mask=has_row, other=0.0)
            scale = tl.load(scales + rows, mask=has_row, other=0.0)
            normed = tl.where(is_in, (s - mean[:, None]) * scale[:, None], 0.0)
            sum_weight += g * normed
            sum_bias += g
            g = g * w[None, :]
            level = tl.sum(g, 1) / num_columns
            slope = tl.sum(g * normed, 1) / num_columns
            g = (g - level[:, None] - normed * slope[:, None]) * scale[:, None]
            if HAS_BESIDE and not ADDS:  # here `beside` is a gradient of s
                g += beside
            tl.store(grad_x + at, g.to(grad_x.dtype.element_ty), mask=is_in)
        if ADDS:
            if DROPS:
                g = tl.where(_is_kept(seed_at, rows, threshold, ROWS, BLOCK), g * keep_scale, 0.0)
                tl.store(grad_product + at, g.to(grad_product.dtype.element_ty), mask=is_in)
            sum_product += tl.where(is_in, g, 0.0)
    place = partials + tl.program_id(0).to(tl.int64) * (num_columns * (2 * NORMS + ADDS)) + columns
    if NORMS:
        tl.store(place, tl.sum(sum_weight, 0), mask=has_column)
        tl.store(place + num_columns, tl.sum(sum_bias, 0), mask=has_column)
    if ADDS:
        tl.store(place + num_columns * (2 * NORMS), tl.sum(sum_product, 0), mask=has_column)


class Product(NamedTuple):
    """The result of a linear layer in two parts. The next kernel, which reads the rows anyway, adds the bias."""

    rows: Tensor
    """(N, D)."""
    bias: Tensor
    """(D,)."""


class Norm(NamedTuple):
    """A layer normalisation."""

    weight: Tensor
    """(D,)."""
    bias: Tensor
    """(D,)."""
    eps: float


class Drop(NamedTuple):
    """Dropout from a seed."""

    probability: float
    """Rounded to a multiple of 2**-16."""
    seed: Tensor
    """int64; only the first number is read, and none if the probability is 0."""


def add_and_norm(x: Tensor, product: Product, norm: Norm, drop: Drop) -> tuple[Tensor, Tensor]:
    """Compute y as in the head of this file; x and the product are (N, D).

    Returns:
        y (N, D) twice, in the same memory, for two readers. The kernel adds the gradients of both.
    """
    return cast(Callable[..., tuple[Tensor, Tensor]], _AddAndNorm.apply)(x, *product, *norm, *drop)


def norm_beside(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """Compute y from s = x; return y and x, (N, D) each. The kernel adds the gradients of both."""
    return cast(Callable[..., tuple[Tensor, Tensor]], _NormBeside.apply)(x, *norm)


def add(x: Tensor, product: Product, drop: Drop) -> Tensor:
    """Compute only s: (N, D)."""
    return cast(Callable[..., Tensor], _Add.apply)(x, *product, *drop)


class _AddAndNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor, product: Tensor, product_bias: Tensor, weight: Tensor, bias: Tensor, eps: float,
        probability: float, seed: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.probability = probability
        total, y, means, scales = _run_forward(
            x, Product(product, product_bias), Norm(weight, bias, eps), Drop(probability, seed)
        )
        ctx.save_for_backward(total, means, scales, weight, seed)
        return y, y.view_as(y)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, grad: Tensor | None, beside: Tensor | None) -> tuple[Tensor | None, ...]:
        total, means, scales, weight, seed = ctx.saved_tensors
        first, second = (beside, None) if grad is None else (grad, beside)
        if first is None:
            return (None,) * 8
        grads = _run_backward(first, second, (total, means, scales, weight), Drop(ctx.probability, seed))
        grad_x, grad_product, (weight_grad, bias_grad, product_bias_grad) = grads
        return grad_x, grad_product, product_bias_grad, weight_grad, bias_grad, None, None, None


class _NormBeside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        total, y, means, scales = _run_forward(x, None, Norm(weight, bias, eps), None)
        ctx.save_for_backward(total, means, scales, weight)
        return y, x

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, grad: Tensor | None, beside: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return beside, None, None, None
        grad_x, _, (weight_grad, bias_grad) = _run_backward(grad, beside, ctx.saved_tensors, None)
        return grad_x, weight_grad, bias_grad, None


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, product: Tensor, product_bias: Tensor, probability: float, seed: Tensor
    ) -> Tensor:
        total, *_ = _run_forward(x, Product(product, product_bias), None, Drop(probability, seed))
        ctx.probability = probability
        ctx.save_for_backward(seed)
        return total

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (seed,) = ctx.saved_tensors
        grad_x, grad_product, (bias_grad,) = _run_backward(grad, None, None, Drop(ctx.probability, seed))
        return grad_x, grad_product, bias_grad, None, None


def _sizes(num_columns: int, num_numbers: int) -> tuple[int, int]:
    """Return how many rows a program takes at once, to have about `num_numbers` numbers, and its block's width."""
    block = max(16, triton.next_power_of_2(num_columns))
    return max(1, min(16, num_numbers // block)), block


def _run_forward(
    x: Tensor, product: Product | None, norm: Norm | None, drop: Drop | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return s, y, and for each row its mean and 1 / sqrt(var(s) + eps), (N,) float32.

    Without a product s is x. Without a norm y is x, and the last two are not filled.
    """
    x = x.contiguous()
    num_rows, num_columns = x.shape
    total = torch.empty_like(x) if product else x
    y = torch.empty_like(x) if norm else x
    means, scales = torch.empty(2, num_rows, dtype=torch.float32, device=x.device).unbind()
    threshold, keep_scale = in_16_bits(drop.probability if drop else 0.0)
    rows, block = _sizes(num_columns, 2048)
    launch: Any = _forward[(triton.cdiv(num_rows, rows),)]
    launch(
        x, *((product.rows.contiguous(), product.bias) if product else (x, x)),
        *(norm[:2] if norm else (x, x)), total, y, means, scales, drop.seed if drop else means,
        num_rows, num_columns, norm.eps if norm else 0.0, threshold, keep_scale,
        ADDS=product is not None, NORMS=norm is not None, DROPS=threshold > 0, ROWS=rows, BLOCK=block,
        num_warps=4,
    )  # fmt: skip
    return total, y, means, scales


def _run_backward(
    grad: Tensor, beside: Tensor | None, normed: tuple[Tensor, ...] | None, drop: Drop | None
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Return the gradients of x, of the product, and of w and c (with a norm) and b (with a product).

    Args:
        grad: (N, D): the gradient of y, or of s if nothing was normalised.
        beside: (N, D): a second gradient of y, or of s if nothing was added.
        normed: s, means and scales of `_run_forward`, and w; None if nothing was normalised.
        drop: The dropout of the product; None if nothing was added.
    """
    grad = grad.contiguous()
    beside = None if beside is None else beside.contiguous()
    num_rows, num_columns = grad.shape
    threshold, keep_scale = in_16_bits(drop.probability if drop else 0.0)
    drops = threshold > 0
    grad_x = torch.empty_like(grad) if normed else grad
    grad_product = torch.empty_like(grad) if drops else grad_x
    total, means, scales, weight = normed or (grad, grad, grad, grad)
    rows, block = _sizes(num_columns, 4096)
    num_programs = max(
        1, min(triton.cdiv(num_rows, rows), _PROGRAMS_A_PROCESSOR * num_processors(grad.device))
    )
    num_sums = 2 * (normed is not None) + (drop is not None)
    partials = torch.empty(num_programs, num_sums * num_columns, dtype=torch.float32, device=grad.device)
    launch: Any = _backward[(num_programs,)]
    launch(
        grad, grad if beside is None else beside, total, weight, means, scales, grad_x, grad_product, partials,
        drop.seed if drop else partials, num_rows, num_columns, threshold, keep_scale,
        ADDS=drop is not None, NORMS=normed is not None, DROPS=drops, HAS_BESIDE=beside is not None,
        ROWS=rows, BLOCK=block, num_warps=8,
    )  # fmt: skip
    return grad_x, grad_product, sum_partials(partials, grad.dtype).split(num_columns)


def try_out(dtype: torch.dtype, num_columns: int, device: torch.device) -> None:
    """Run the kernels once in each direction; raise Triton's error if Triton or the C compiler does not work."""
    x, rows = (torch.zeros(16, num_columns, dtype=dtype, device=device, requires_grad=True) for _ in range(2))
    bias = torch.zeros(num_columns, dtype=dtype, device=device, requires_grad=True)
    drop = Drop(0.5, torch.zeros(1, dtype=torch.int64, device=device))
    with torch.enable_grad():
        first, second = add_and_norm(x, Product(rows, bias), Norm(bias, bias, 1e-5), drop)
        torch.autograd.grad(first.sum() + second.sum(), [x, rows, bias])
