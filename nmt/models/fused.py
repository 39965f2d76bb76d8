"""Faster forms of a layer's operations for training on a CPU; their plain forms are in tests/test_fused.py.

On other devices PyTorch's own are taken.

Shapes: B sentences, T and S lengths, D model, H heads, E head size, V vocabulary.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


@cache
def _has_onednn() -> bool:
    """Return whether oneDNN has its AVX-512 products in float32 here, under the name that PyTorch gives them.

    They are at least as fast as those of MKL, which PyTorch takes by itself; on AMD's processors twice as fast.
    """
    has_name = hasattr(torch.ops, "mkldnn") and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return (
        has_name
        and torch.backends.mkldnn.is_available()
        and "AVX512" in torch.backends.cpu.get_cpu_capability()
    )


def is_elsewhere(x: Tensor) -> bool:
    """Return whether PyTorch's own operations are to be taken: on other devices, and by its compiler."""
    return x.device.type != "cpu" or torch.compiler.is_compiling()


def _is_for_onednn(x: Tensor, weight: Tensor) -> bool:
    if is_elsewhere(x) or not x.dtype == weight.dtype == torch.float32:
        return False
    # It has no products without any multiplication.
    return x.numel() > 0 and weight.numel() > 0 and _has_onednn()


def product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply (M, K) by (K, N), each of any strides."""
    if _is_for_onednn(a, b):
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return torch.mm(a, b)


class Linear(nn.Linear):
    """`nn.Linear`, in training with the products of oneDNN where they are faster."""

    def forward(self, x: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and _is_for_onednn(x, self.weight)):
            return F.linear(x, self.weight, self.bias)
        return cast(Callable[..., Tensor], _Linear.apply)(x, self.weight, self.bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, grad_rows = x.reshape(-1, x.size(-1)), grad.reshape(-1, grad.size(-1))
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            product(grad_rows, weight).view_as(x) if needs_x else None,
            product_over_rows(grad_rows, rows) if needs_weight else None,
            grad_rows.sum(dim=0) if needs_bias else None,
        )


def product_over_rows(a: Tensor, b: Tensor) -> Tensor:
    """Multiply the transpose of (N, I) by (N, J)."""
    # oneDNN is faster where the matrix that it has to transpose is the narrower one.
    return product(a.t(), b) if a.size(1) <= b.size(1) else product(b.t(), a).t()


class Dropout(nn.Module):
    """Dropout whose mask is drawn from random bytes on the CPU.

    PyTorch draws one 32-bit random number an element there; cutting 64-bit numbers into four gives the
    same masks' distribution, with the probability rounded to a multiple of 2**-16 (and the scale to match,
    so that the expectation is exact), several times as fast. A mask takes a byte an element.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        if is_elsewhere(x):
            return F.dropout(x, self.p)
        return cast(Callable[..., Tensor], _Drop.apply)(x, *random_mask(x, self.p))

    def extra_repr(self) -> str:
        return f"p={self.p}"


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.scale = scale
        return (x * mask).mul_(scale)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return (grad * ctx.saved_tensors[0]).mul_(ctx.scale), None, None


def random_mask(x: Tensor, p: float) -> tuple[Tensor, float]:
    """Draw a uint8 mask of x's shape, 0 with probability `p` and else 1, and the scale of what is kept."""
    threshold = min(round(p * 65536), 65535)
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    numbers = words.view(torch.int16)[: x.numel()].view(x.shape)
    return (numbers >= threshold - 32768).view(torch.uint8), 65536 / (65536 - threshold)


def embed(token_ids: Tensor, weight: Tensor, *, pad_id: int) -> Tensor:
    """Look up rows of (V, D); on a CPU the gradient of a row is summed in float32, whatever the type."""
    if not torch.is_grad_enabled() or is_elsewhere(token_ids):
        return F.embedding(token_ids, weight, pad_id)
    return cast(Callable[..., Tensor], _Embed.apply)(token_ids, weight, pad_id)


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token_ids: Tensor, weight: Tensor, pad_id: int) -> Tensor:
        ctx.save_for_backward(token_ids)
        ctx.shape, ctx.pad_id = weight.shape, pad_id
        return F.embedding(token_ids, weight)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        (token_ids,) = ctx.saved_tensors
        accurate = torch.promote_types(grad.dtype, torch.float32)
        total = torch.zeros(ctx.shape, dtype=accurate)
        total.index_add_(0, token_ids.flatten(), grad.reshape(-1, grad.size(-1)).to(accurate))
        total[ctx.pad_id] = 0.0
        return None, total.to(grad.dtype), None


def split_heads(x: Tensor, num_parts: int, num_heads: int) -> tuple[Tensor, ...]:
    """(B, T, num_parts * D) -> num_parts times (B, H, T, E), of which each is contiguous."""
    return cast(Callable[..., tuple[Tensor, ...]], _SplitHeads.apply)(x, num_parts, num_heads)


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, num_parts: int, num_heads: int) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.shape = x.shape
        return x.unflatten(-1, (num_parts, num_heads, -1)).permute(2, 0, 3, 1, 4).contiguous().unbind()

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None, None]:
        first = next(grad for grad in grads if grad is not None)
        total = first.new_empty(ctx.shape)
        num_heads = first.size(1)
        for part, grad in zip(total.unflatten(-1, (len(grads), num_heads, -1)).unbind(2), grads, strict=True):
            # (B, T, H, E) and (B, H, T, E)
            part.zero_() if grad is None else part.copy_(grad.transpose(1, 2))
        return total, None, None


def attention(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, *, dropout: float) -> Tensor:
    """Compute softmax(Q K^T / sqrt(E) + bias) V for each head by plain batched products.

    For sentences this is faster on a CPU than PyTorch's, whose backward pass is made for long sequences.

    Args:
        query: (B, H, T, E).
        keys: (B, H, S, E).
        values: (B, H, S, E).
        bias: Broadcastable to (B, H, T, S): 0 where attention is allowed, else minus infinity.
        dropout: Probability with which an attention weight is dropped.

    Returns:
        (B, T, D): the heads side by side.
    """
    return cast(Callable[..., Tensor], _Attention.apply)(query, keys, values, bias, dropout)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, dropout: float
    ) -> Tensor:
        batch, heads, length, size = query.shape
        q, k, v = (x.flatten(0, 1) for x in (query, keys, values))  # (B, H, T, E) -> (B*H, T, E)
        bias = bias.expand(batch, heads, -1, -1).flatten(0, 1)
        scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=size**-0.5)
        weights = torch.softmax(scores, dim=-1, out=scores)  # (B*H, T, S), formed in float32
        mask, ctx.scale = random_mask(weights, dropout) if dropout else (None, 1.0)
        ctx.save_for_backward(q, k, v, weights, mask)
        ctx.heads = heads
        attended = torch.bmm(weights if mask is None else (weights * mask).mul_(ctx.scale), v)
        return attended.view(batch, heads, length, size).transpose(1, 2).reshape(batch, length, heads * size)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights, mask = ctx.saved_tensors
        # (B, T, D) -> (B*H, T, E)
        grad = grad.unflatten(-1, (ctx.heads, -1)).transpose(1, 2).flatten(0, 1)
        used = weights if mask is None else (weights * mask).mul_(ctx.scale)
        grad_v = torch.bmm(used.transpose(1, 2), grad)
        grad_weights = torch.bmm(grad, v.transpose(1, 2))
        if mask is not None:
            grad_weights.mul_(mask).mul_(ctx.scale)
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        grad_scores *= q.size(-1) ** -0.5
        grad_q, grad_k = torch.bmm(grad_scores, k), torch.bmm(grad_scores.transpose(1, 2), q)
        split = (x.unflatten(0, (-1, ctx.heads)) for x in (grad_q, grad_k, grad_v))
        return *split, None, None
