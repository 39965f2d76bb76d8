"""Attention within the sentences of packed rows, as Triton kernels for GPUs.

FlashAttention gives every sentence, however short, its own program of 128 queries and 128 keys, and as many
programs as the longest sentence has blocks. Here neighbouring sentences share a program as long as they fit into a
block. A table of items says which tokens each program works on:

    row of tokens   | sentence 0 | sentence 1 | sentence 2 |   sentence 3, longer than a block   |
    groups          |               group 0                |              group 1                |
    items           |               block 0                |       block 1      |    block 2     |

The backward pass recomputes scores (Dao et al., 2022). If all queries of a group are in one block, one program
computes all gradients of the group. The keys of longer groups take a second recomputation. Gradients are written
where the gradient of the projection is read, so that nothing is copied. Sums are always in the same order, so that
they have the same bits each time.

Shapes: N, M tokens of the rows of queries and keys, H heads, E head size, I items of a table.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128
# Keys that a block of queries takes at once: few enough for the results to stay in registers.
FORWARD_KEYS, BACKWARD_KEYS = 32, 32


@triton.jit
def _keep(seed, head, rows, columns, num_columns, dropout):
    """Return which attention weights dropout keeps; depends only on the seed and on their place."""
    return tl.rand(seed + head, rows * num_columns + columns) >= dropout


@triton.jit
def _allowed(q_part, k_part, q_at, k_at, CAUSAL: tl.constexpr):
    allowed = q_part[:, None] == k_part[None, :]
    if CAUSAL:
        allowed = allowed & (k_at[None, :] <= q_at[:, None])
    return allowed


@triton.jit
def _is_alone(items, item, Q_SIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Return whether one block holds all queries of an item's group."""
    num_queries = tl.load(items + item * 6 + Q_SIDE + 1) - tl.load(items + item * 6 + Q_SIDE)
    return (num_queries > 0) & (num_queries <= BLOCK)


@triton.jit
def _forward(
    q, k, v, out, lse, items, q_parts, k_parts, seed_at, scale, dropout,
    q_stride, k_stride, out_stride, num_q, num_k,
    OTHER: tl.constexpr, CAUSAL: tl.constexpr, DROPS: tl.constexpr, E: tl.constexpr,
    BLOCK: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    item, head = tl.program_id(0), tl.program_id(1)
    start, end = tl.load(items + item * 6), tl.load(items + item * 6 + 1)
    if start < end:
        first, last = tl.load(items + item * 6 + OTHER), tl.load(items + item * 6 + OTHER + 1)
        sizes = tl.arange(0, E)
        q_at = start + tl.arange(0, BLOCK)
        q_in = q_at < end
        query = tl.load(
            q + q_at[:, None] * q_stride + head * E + sizes[None, :], mask=q_in[:, None], other=0.0
        )
        q_part = tl.load(q_parts + q_at, mask=q_in, other=-1)
        highest = tl.full((BLOCK,), -float("inf"), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        summed = tl.zeros((BLOCK, E), tl.float32)
        for first_k in range(first, last, KEYS):
            k_at = first_k + tl.arange(0, KEYS)
            k_in = k_at < last
            at = k_at[:, None] * k_stride + head * E + sizes[None, :]
            key = tl.load(k + at, mask=k_in[:, None], other=0.0)
            value = tl.load(v + at, mask=k_in[:, None], other=0.0)
            k_part = tl.load(k_parts + k_at, mask=k_in, other=-2)
            scores = tl.dot(query, tl.trans(key)) * scale
            scores = tl.where(_allowed(q_part, k_part, q_at, k_at, CAUSAL), scores, -float("inf"))
            higher = tl.maximum(highest, tl.max(scores, 1))
            # A row that has found no key so far stays at minus infinity. Then 0 is subtracted instead, because
            # infinity minus infinity is not a number.
            base = tl.where(higher == -float("inf"), 0.0, higher)
            weights = tl.exp(scores - base[:, None])
            shrink = tl.exp(highest - base)
            total = total * shrink + tl.sum(weights, 1)
            if DROPS:
                kept = _keep(tl.load(seed_at), head, q_at[:, None], k_at[None, :], num_k, dropout)
                weights = tl.where(kept, weights / (1.0 - dropout), 0.0)
            summed = summed * shrink[:, None] + tl.dot(weights.to(value.dtype), value)
            highest = higher
        is_empty = total == 0.0
        total = tl.where(is_empty, 1.0, total)
        summed = summed / total[:, None]
        place = q_at[:, None] * out_stride + head * E + sizes[None, :]
        tl.store(out + place, summed.to(out.dtype.element_ty), mask=q_in[:, None])
        # With infinity here, the weights of a row without keys are zero in the backward pass, too.
        tl.store(
            lse + head * num_q + q_at, tl.where(is_empty, float("inf"), highest + tl.log(total)), mask=q_in
        )


@triton.jit
def _backward_queries(
    q, k, v, out, grad_out, lse, delta, grad_q, grad_k, grad_v, items, q_parts, k_parts, seed_at, scale, dropout,
    q_stride, k_stride, out_stride, grad_q_stride, grad_k_stride, num_q, num_k,
    OWN: tl.constexpr, OTHER: tl.constexpr, CAUSAL: tl.constexpr, DROPS: tl.constexpr, E: tl.constexpr,
    BLOCK: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    item, head = tl.program_id(0), tl.program_id(1)
    start, end = tl.load(items + item * 6), tl.load(items + item * 6 + 1)
    if start < end:
        # If all queries of a group are in this block, no other block adds to the gradients of its keys.
        is_alone = _is_alone(items, item, OWN, BLOCK)
        first, last = tl.load(items + item * 6 + OTHER), tl.load(items + item * 6 + OTHER + 1)
        sizes = tl.arange(0, E)
        q_at = start + tl.arange(0, BLOCK)
        q_in = q_at < end
        query = tl.load(
            q + q_at[:, None] * q_stride + head * E + sizes[None, :], mask=q_in[:, None], other=0.0
        )
        place = q_at[:, None] * out_stride + head * E + sizes[None, :]
        grad = tl.load(grad_out + place, mask=q_in[:, None], other=0.0)
        result = tl.load(out + place, mask=q_in[:, None], other=0.0)
        q_delta = tl.sum(grad.to(tl.float32) * result.to(tl.float32), 1)
        tl.store(delta + head * num_q + q_at, q_delta, mask=q_in)
        q_lse = tl.load(lse + head * num_q + q_at, mask=q_in, other=float("inf"))
        q_part = tl.load(q_parts + q_at, mask=q_in, other=-1)
        summed = tl.zeros((BLOCK, E), tl.float32)
        for first_k in range(first, last, KEYS):
            k_at = first_k + tl.arange(0, KEYS)
            k_in = k_at < last
            at = k_at[:, None] * k_stride + head * E + sizes[None, :]
            key = tl.load(k + at, mask=k_in[:, None], other=0.0)
            value = tl.load(v + at, mask=k_in[:, None], other=0.0)
            k_part = tl.load(k_parts + k_at, mask=k_in, other=-2)
            allowed = _allowed(q_part, k_part, q_at, k_at, CAUSAL)
            scores = tl.dot(query, tl.trans(key)) * scale
            weights = tl.where(allowed, tl.exp(scores - q_lse[:, None]), 0.0)
            grad_weights = tl.dot(grad, tl.trans(value))
            used = weights
            if DROPS:
                kept = _keep(tl.load(seed_at), head, q_at[:, None], k_at[None, :], num_k, dropout)
                used = tl.where(kept, weights / (1.0 - dropout), 0.0)
                grad_weights = tl.where(kept, grad_weights / (1.0 - dropout), 0.0)
            grad_scores = (weights * (grad_weights - q_delta[:, None]) * scale).to(key.dtype)
            summed += tl.dot(grad_scores, key)
            if is_alone:
                k_place = k_at[:, None] * grad_k_stride + head * E + sizes[None, :]
                sum_v = tl.dot(tl.trans(used.to(grad.dtype)), grad)
                tl.store(grad_v + k_place, sum_v.to(grad_v.dtype.element_ty), mask=k_in[:, None])
                sum_k = tl.dot(tl.trans(grad_scores), query)
                tl.store(grad_k + k_place, sum_k.to(grad_k.dtype.element_ty), mask=k_in[:, None])
        place = q_at[:, None] * grad_q_stride + head * E + sizes[None, :]
        tl.store(grad_q + place, summed.to(grad_q.dtype.element_ty), mask=q_in[:, None])


@triton.jit
def _backward_keys(
    q, k, v, grad_out, lse, delta, grad_k, grad_v, items, q_parts, k_parts, seed_at, scale, dropout,
    q_stride, k_stride, out_stride, grad_k_stride, num_q, num_k,
    OTHER: tl.constexpr, CAUSAL: tl.constexpr, DROPS: tl.constexpr, E: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    item, head = tl.program_id(0), tl.program_id(1)
    start, end = tl.load(items + item * 6), tl.load(items + item * 6 + 1)
    if (start < end) & (not _is_alone(items, item, OTHER, BLOCK)):
        first, last = tl.load(items + item * 6 + OTHER), tl.load(items + item * 6 + OTHER + 1)
        sizes = tl.arange(0, E)
        k_at = start + tl.arange(0, BLOCK)
        k_in = k_at < end
        at = k_at[:, None] * k_stride + head * E + sizes[None, :]
        key = tl.load(k + at, mask=k_in[:, None], other=0.0)
        value = tl.load(v + at, mask=k_in[:, None], other=0.0)
        k_part = tl.load(k_parts + k_at, mask=k_in, other=-2)
        sum_k = tl.zeros((BLOCK, E), tl.float32)
        sum_v = tl.zeros((BLOCK, E), tl.float32)
        for first_q in range(first, last, BLOCK):
            q_at = first_q + tl.arange(0, BLOCK)
            q_in = q_at < last
            query = tl.load(
                q + q_at[:, None] * q_stride + head * E + sizes[None, :], mask=q_in[:, None], other=0.0
            )
            place = q_at[:, None] * out_stride + head * E + sizes[None, :]
            grad = tl.load(grad_out + place, mask=q_in[:, None], other=0.0)
            q_lse = tl.load(lse + head * num_q + q_at, mask=q_in, other=float("inf"))
            q_delta = tl.load(delta + head * num_q + q_at, mask=q_in, other=0.0)
            q_part = tl.load(q_parts + q_at, mask=q_in, other=-1)
            allowed = _allowed(q_part, k_part, q_at, k_at, CAUSAL)
            scores = tl.dot(query, tl.trans(key)) * scale
            weights = tl.where(allowed, tl.exp(scores - q_lse[:, None]), 0.0)
            grad_weights = tl.dot(grad, tl.trans(value))
            used = weights
            if DROPS:
                kept = _keep(tl.load(seed_at), head, q_at[:, None], k_at[None, :], num_k, dropout)
                used = tl.where(kept, weights / (1.0 - dropout), 0.0)
                grad_weights = tl.where(kept, grad_weights / (1.0 - dropout), 0.0)
            sum_v += tl.dot(tl.trans(used.to(grad.dtype)), grad)
            grad_scores = weights * (grad_weights - q_delta[:, None]) * scale
            sum_k += tl.dot(tl.trans(grad_scores.to(query.dtype)), query)
        place = k_at[:, None] * grad_k_stride + head * E + sizes[None, :]
        tl.store(grad_k + place, sum_k.to(grad_k.dtype.element_ty), mask=k_in[:, None])
        tl.store(grad_v + place, sum_v.to(grad_v.dtype.element_ty), mask=k_in[:, None])


# The six columns of an item: start and end of the block; start and end of its group of parts in the source; the
# same in the target. These two numbers are the columns of the two group starts.
SOURCE, TARGET = 2, 4


@torch.library.custom_op("nmt::attend_packed", mutates_args=())
def attend_packed(
    q: Tensor, k: Tensor, v: Tensor, q_items: Tensor, k_items: Tensor, q_parts: Tensor, k_parts: Tensor,
    seed: Tensor, num_heads: int, q_side: int, k_side: int, is_causal: bool, dropout: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute softmax(Q K^T / sqrt(E)) V for each head; each token attends only within its part.

    Args:
        q: (N, H*E) bfloat16 or float16; columns side by side, rows with any stride.
        k: (M, H*E), with the same stride between rows as `v`.
        v: (M, H*E).
        q_items: (I, 6) int32: blocks of at most 128 queries; unused items are empty.
        k_items: (I, 6) int32: blocks of keys.
        q_parts: (N,) int32: the part of each query.
        k_parts: (M,) int32: the part of each key.
        seed: (1,) int64, for dropout.
        num_heads: H.
        q_side: SOURCE or TARGET: the column of an item where the queries of its group begin.
        k_side: The same for keys.
        is_causal: Each token attends to tokens up to itself.
        dropout: Probability with which an attention weight is dropped.

    Returns:
        (N, H*E), and, for the backward pass, the logarithms of the normalisers (H, N) float32.
    """
    num_q, size = q.size(0), q.size(1) // num_heads
    out = torch.empty((num_q, q.size(1)), dtype=q.dtype, device=q.device)
    lse = torch.empty((num_heads, num_q), dtype=torch.float32, device=q.device)
    _forward[(q_items.size(0), num_heads)](
        q, k, v, out, lse, q_items, q_parts, k_parts, seed, size**-0.5, dropout,
        q.stride(0), k.stride(0), out.stride(0), num_q, k.size(0),
        OTHER=k_side, CAUSAL=is_causal, DROPS=dropout > 0.0, E=size, BLOCK=BLOCK,
        KEYS=FORWARD_KEYS, num_warps=8, num_stages=1,
    )  # fmt: skip
    return out, lse


@attend_packed.register_fake
def _(q: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    num_heads: int = others[7]
    out = q.new_empty((q.size(0), q.size(1)))
    return out, q.new_empty((num_heads, q.size(0)), dtype=torch.float32)


@torch.library.custom_op("nmt::attend_packed_backward", mutates_args=())
def attend_packed_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    q_items: Tensor, k_items: Tensor, q_parts: Tensor, k_parts: Tensor, seed: Tensor,
    num_heads: int, q_side: int, k_side: int, is_causal: bool, dropout: float, is_self: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradient of queries, and that of keys and values side by side; if `is_self`, all three together.

    Args:
        grad: (N, H*E): the gradient of `out`, which `attend_packed` returned.
        is_self: Whether queries, keys and values are columns of one tensor.

    All others are those of `attend_packed`.

    Returns:
        (N, H*E) and (M, 2*H*E); if `is_self` (N, 3*H*E) and nothing.
    """
    num_q, width = q.shape
    num_k, size = k.size(0), width // num_heads
    if is_self:
        first = torch.empty((num_q, 3 * width), dtype=q.dtype, device=q.device)
        second = first.new_empty(0)
        grad_q, grad_k, grad_v = first.split(width, dim=1)
    else:
        first = torch.empty((num_q, width), dtype=q.dtype, device=q.device)
        second = torch.empty((num_k, 2 * width), dtype=q.dtype, device=q.device)
        grad_q = first
        grad_k, grad_v = second.split(width, dim=1)
    grad = grad.contiguous()
    delta = torch.empty_like(lse)
    shared: dict[str, Any] = {
        **{"CAUSAL": is_causal, "DROPS": dropout > 0.0, "E": size, "BLOCK": BLOCK},
        **{"num_warps": 8, "num_stages": 1},
    }
    _backward_queries[(q_items.size(0), num_heads)](
        q, k, v, out, grad, lse, delta, grad_q, grad_k, grad_v, q_items, q_parts, k_parts, seed, size**-0.5,
        dropout, q.stride(0), k.stride(0), out.stride(0), grad_q.stride(0), grad_k.stride(0), num_q, num_k,
        OWN=q_side, OTHER=k_side, KEYS=BACKWARD_KEYS, **shared,
    )  # fmt: skip
    _backward_keys[(k_items.size(0), num_heads)](
        q, k, v, grad, lse, delta, grad_k, grad_v, k_items, q_parts, k_parts, seed, size**-0.5, dropout,
        q.stride(0), k.stride(0), out.stride(0), grad_k.stride(0), num_q, num_k, OTHER=q_side, **shared,
    )  # fmt: skip
    return first, second


@attend_packed_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    is_self: bool = others[-1]
    width = q.size(1)
    if is_self:
        return q.new_empty((q.size(0), 3 * width)), q.new_empty(0)
    return q.new_empty((q.size(0), width)), q.new_empty((k.size(0), 2 * width))


def attend(
    q: Tensor, kv: Tensor | None, tables: tuple[Tensor, ...], settings: tuple[int | bool | float, ...]
) -> Tensor:
    """Let a row attend to itself or to another row, with gradients.

    Args:
        q: (N, H*E); or, if `kv` is None, (N, 3*H*E): queries, keys and values side by side.
        kv: (M, 2*H*E): keys and values side by side.
        tables: The arguments `q_items` to `seed` of `attend_packed`.
        settings: The arguments `num_heads` to `dropout` of `attend_packed`.

    Returns:
        (N, H*E).
    """
    result: Tensor = _Attend.apply(q, kv, tables, settings)  # type: ignore[no-untyped-call]
    return result


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, kv: Tensor | None, tables: tuple[Tensor, ...], settings: tuple[Any, ...]
    ) -> Tensor:
        q, k, v = q.chunk(3, dim=1) if kv is None else (q, *kv.chunk(2, dim=1))
        out, lse = attend_packed(q, k, v, *tables, *settings)
        ctx.save_for_backward(q, k, v, out, lse, *tables)
        ctx.settings, ctx.is_self = settings, kv is None
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        q, k, v, out, lse, *tables = ctx.saved_tensors
        first, second = attend_packed_backward(grad, q, k, v, out, lse, *tables, *ctx.settings, ctx.is_self)
        return first, None if ctx.is_self else second, None, None


def try_out(dtype: torch.dtype, head_size: int, device: torch.device) -> None:
    """Attend once, forward and backward; raise Triton's error if Triton or the C compiler does not work."""
    length = 16
    items = torch.tensor([[0, length, 0, length, 0, length]], dtype=torch.int32, device=device)
    parts = torch.zeros(length, dtype=torch.int32, device=device)
    qkv = torch.zeros(length, 3 * head_size, dtype=dtype, device=device, requires_grad=True)
    with torch.enable_grad():
        out = attend(qkv, None, (items, items, parts, parts, parts), (1, SOURCE, SOURCE, False, 0.0))
        torch.autograd.grad(out.sum(), qkv)
    torch.cuda.synchronize(device)
