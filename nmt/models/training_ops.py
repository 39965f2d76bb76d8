"""A model's operations, each in the best form for the device.

Training on a CPU has its own forms; tests/test_fused.py has plain ones to compare with. Other devices use
PyTorch's operators, except for the loss.

Shapes: B sentences, T and S lengths, N tokens, D model, H heads, E head size, V vocabulary.
"""

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nmt.system import onednn
from nmt.system.slower import works

# The most logits in memory at a time. On a CPU they fit into its caches (8 MB in float32: 250 tokens of 8,000
# classes); elsewhere there are enough to keep the device busy.
_LOGITS_AT_ONCE = {"cpu": 2_000_000}
_LOGITS_AT_ONCE_ELSEWHERE = 64_000_000
_LOGITS_OF_KERNEL_AT_ONCE = 192_000_000  # of two bytes each; the kernel needs no other memory

LEAST_WIDTH = 16
"""Least width of rows of attention scores: on a CPU, PyTorch's softmax is ten times slower on narrower rows."""


def is_elsewhere(x: Tensor) -> bool:
    """Return whether to use PyTorch's own operators: on devices other than a CPU, and under its compiler."""
    return x.device.type != "cpu" or torch.compiler.is_compiling()


def _is_for_onednn(x: Tensor, weight: Tensor) -> bool:
    if is_elsewhere(x) or not x.dtype == weight.dtype == torch.float32:
        return False
    # oneDNN does not take empty products.
    return x.numel() > 0 and weight.numel() > 0 and onednn.has_fast_float32()


def product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply (M, K) by (K, N); both may have any strides."""
    if _is_for_onednn(a, b):
        return onednn.product(a, b.t(), None)
    return torch.mm(a, b)


class Linear(nn.Linear):
    """`nn.Linear` that uses oneDNN's products in training where they are faster."""

    def forward(self, x: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and _is_for_onednn(x, self.weight)):
            return F.linear(x, self.weight, self.bias)
        return cast(Callable[..., Tensor], _Linear.apply)(x, self.weight, self.bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn.product(x, weight, bias)

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


class Dropout(nn.Dropout):
    """Dropout whose mask is drawn from random bytes on the CPU.

    PyTorch draws a 32-bit random number for each element on a CPU. Cutting 64-bit numbers into four is several
    times as fast. The probability is rounded to a multiple of 2**-16. A mask takes one byte for each element.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        if is_elsewhere(x):
            return super().forward(x)
        mask, scale = random_mask(x, self.p)
        return (x * mask).mul_(scale)


# The classes of a plain part, ours and PyTorch's: those who read its weights may take either.
LINEARS: tuple[type[nn.Module], ...] = (Linear, nn.Linear)
DROPOUTS: tuple[type[nn.Module], ...] = (Dropout, nn.Dropout)


def random_mask(x: Tensor, p: float) -> tuple[Tensor, float]:
    """Draw a uint8 mask of x's shape, 0 with probability `p` and else 1; also return the scale of kept numbers."""
    threshold, scale = in_16_bits(p)
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    numbers = words.view(torch.int16)[: x.numel()].view(x.shape)
    return (numbers >= threshold - 32768).view(torch.uint8), scale


def in_16_bits(p: float) -> tuple[int, float]:
    """Round a probability of dropout to a multiple of 2**-16: that multiple, and the scale of kept numbers."""
    threshold = min(round(p * 65536), 65535)
    return threshold, 65536 / (65536 - threshold)


def embed(token_ids: Tensor, weight: Tensor, *, pad_id: int) -> Tensor:
    """Look up rows of (V, D); on a CPU the gradient of a row is summed in float32 or better."""
    if not torch.is_grad_enabled() or is_elsewhere(token_ids):
        return F.embedding(token_ids, weight, pad_id)
    # PyTorch sums in the type of the weights. Conversion to float32 and back changes no vector.
    accurate = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return F.embedding(token_ids, accurate, pad_id).to(weight.dtype)


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    attention_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """Compute softmax(Q K^T / sqrt(E)) V for each head.

    Args:
        query: (B, H, T, E).
        keys: (B, H, S, E).
        values: (B, H, S, E).
        attention_mask: bool, True where attention is allowed, broadcastable to (B, H, T, S).
        is_causal: Position t attends to the positions up to t only (T equals S).
        dropout: Probability with which an attention weight is dropped.

    Returns:
        (B, T, D): the heads side by side.
    """
    if _is_for_fused(query):
        bias = _bias(query, keys, attention_mask, is_causal=is_causal)
        return attention(query, keys, values, bias, dropout=dropout)
    missing = LEAST_WIDTH - keys.size(2)
    if (
        missing > 0
        and attention_mask is not None
        and keys.device.type == "cpu"
        and not torch.is_grad_enabled()  # a compiled training step is one program for all lengths
    ):
        keys, values = (F.pad(x, (0, 0, 0, missing)) for x in (keys, values))
        attention_mask = F.pad(attention_mask, (0, missing), value=False)
    heads = F.scaled_dot_product_attention(
        query, keys, values, attn_mask=attention_mask, is_causal=is_causal, dropout_p=dropout
    )
    return heads.transpose(1, 2).flatten(2)  # (B, H, T, E) -> (B, T, D)


def split_heads(x: Tensor, num_parts: int, num_heads: int) -> tuple[Tensor, ...]:
    """(B, T, num_parts * D) -> num_parts times (B, H, T, E)."""
    parts = x.unflatten(-1, (num_parts, num_heads, -1)).permute(2, 0, 3, 1, 4)
    if _is_for_fused(x):  # the batched products of `attention` read the rows of each head side by side
        parts = parts.contiguous()
    return parts.unbind()


def _is_for_fused(x: Tensor) -> bool:
    """Return whether this is training on a CPU; `attention` is made for it."""
    return torch.is_grad_enabled() and not is_elsewhere(x)


def _bias(query: Tensor, keys: Tensor, attention_mask: Tensor | None, *, is_causal: bool) -> Tensor:
    """Return the mask as numbers to add to the scores: 0 or -inf, broadcastable to (B, H, T, S)."""
    if is_causal:
        future = query.new_full((query.size(2), keys.size(2)), -torch.inf)
        return future.triu(diagonal=1)[None, None]
    if attention_mask is None:
        return query.new_zeros(1, 1, 1, 1)
    return query.new_zeros(attention_mask.shape).masked_fill(~attention_mask, -torch.inf)


def attention(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, *, dropout: float) -> Tensor:
    """Compute softmax(Q K^T / sqrt(E) + bias) V for each head by plain batched products.

    On a CPU this is faster for sentences than PyTorch's operator, whose backward pass is made for long sequences.

    Args:
        query: (B, H, T, E).
        keys, values: (B, H, S, E).
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
        grad = grad.unflatten(-1, (ctx.heads, -1)).transpose(1, 2).flatten(0, 1)  # (B, T, D) -> (B*H, T, E)
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


def linear_cross_entropy(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    label_smoothing: float,
    ignored: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Project features to the vocabulary and take the label-smoothed cross-entropy, summed over tokens.

    The loss is fairseq's (criterions/label_smoothed_cross_entropy.py): the target class has probability
    1 - eps, and each of the V - 1 others has eps / (V - 1). The (N, V) logits are never in memory as a whole:
    the forward pass computes both gradients chunk by chunk. The softmax and the sums are computed in float32
    or better, whatever the type of the products.

    Args:
        features: (N, D) float.
        weight: (V, D), the output embeddings.
        target: (N,) int64.
        label_smoothing: eps, 0 <= eps < 1.
        ignored: Tokens with this target do not count; None if all tokens count.

    Returns:
        The loss and the negative log-likelihood, summed over the tokens, in nats: scalars in float32 (float64 for
        float64 features). Only the loss carries a gradient.
    """
    if not torch.is_grad_enabled():  # or `apply` would still form the gradients
        features, weight = features.detach(), weight.detach()
    apply = cast(Callable[..., tuple[Tensor, Tensor]], _LinearCrossEntropy.apply)
    return apply(features, weight, target, label_smoothing, ignored)


@cache
def _loss_kernel(device: torch.device) -> ModuleType | None:
    """Return `nmt.models.loss_kernel`, or None if Triton, or the C compiler that it calls, does not work.

    The first call tries the kernel out. If it fails, a warning says why.
    """

    def load() -> ModuleType:
        from nmt.models import loss_kernel  # here, because only PyTorch's builds for GPUs come with Triton

        return loss_kernel

    return load() if works("Triton's kernel of the loss", lambda: load().try_out(device)) else None


def _softmax_gradient(
    h: Tensor, weight: Tensor, y: Tensor, extra: float, accurate: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logsumexp(z) and z_y of each token, and softmax(z) minus `extra` at y, in the type of h."""
    z = product(h, weight.t()).to(accurate)
    z_target, z_max = z.gather(1, y).squeeze(1), z.amax(dim=1)
    p = torch.softmax(z, dim=1, out=z)
    # By log p_max and not log p_y, because the largest probability cannot underflow.
    log_normalizer = z_max - p.amax(dim=1).log()
    return log_normalizer, z_target, p.scatter_(1, y, p.gather(1, y) - extra).to(h.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    """Write z = Wh, q for the smoothed target distribution, s = eps / (V - 1) and c = 1 - eps - s.

    loss = logsumexp(z) - sum_v q_v z_v = logsumexp(z) - s * (h . sum_v W_v) - c * z_y
    d loss / dz = softmax(z) - q. The c at y is subtracted before the products, so that the difference is rounded
    to their type, and not its two terms. The constant s is subtracted after them, where it is a rank-one term.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        target: Tensor,
        label_smoothing: float,
        ignored: int | None,
    ) -> tuple[Tensor, Tensor]:
        needs_features, needs_weight = ctx.needs_input_grad[:2]
        num_tokens, vocabulary_size = features.size(0), weight.size(0)
        accurate = torch.promote_types(features.dtype, torch.float32)
        other = label_smoothing / (vocabulary_size - 1)
        extra = 1.0 - label_smoothing - other
        grad_features = torch.empty_like(features) if needs_features else None
        grad_weight = torch.zeros_like(weight, dtype=accurate) if needs_weight else None
        loss = torch.zeros((), dtype=accurate, device=features.device)
        nll = torch.zeros_like(loss)
        is_half = features.dtype in (torch.bfloat16, torch.float16)
        kernel = _loss_kernel(features.device) if features.is_cuda and is_half else None
        at_once = _LOGITS_AT_ONCE.get(features.device.type, _LOGITS_AT_ONCE_ELSEWHERE)
        if kernel is not None:
            at_once = _LOGITS_OF_KERNEL_AT_ONCE
        chunk = max(1, at_once // vocabulary_size)
        chunk = max(1, -(-num_tokens // max(1, -(-num_tokens // chunk))))  # as many parts, equally large
        is_counted = None if ignored is None else (target != ignored)[:, None]  # (N, 1)
        for start in range(0, num_tokens, chunk):
            part = slice(start, start + chunk)
            h, y = features[part], target[part, None]
            if kernel is not None:
                grad = product(h, weight.t())
                log_normalizer, z_target = kernel.softmax_gradient_(
                    grad, target[part], extra=extra, ignored=ignored
                )
            else:
                log_normalizer, z_target, grad = _softmax_gradient(h, weight, y, extra, accurate)
            if is_counted is not None:
                # Ignored tokens are set to zero in the narrow factors of the products, not in (N, V).
                h = h * is_counted[part]
                log_normalizer, z_target = (x * is_counted[part, 0] for x in (log_normalizer, z_target))
            nll += (log_normalizer - z_target).sum()
            loss += log_normalizer.sum() - extra * z_target.sum()
            if grad_features is not None:
                grad_features[part] = product(grad, weight)
            if grad_weight is not None:
                grad_weight += product_over_rows(grad, h)
        weight_sum = weight.sum(dim=0, dtype=accurate)
        counted = features if is_counted is None else features * is_counted
        feature_sum = counted.sum(dim=0, dtype=accurate)
        loss -= other * (feature_sum @ weight_sum)
        if grad_features is not None:
            grad_features -= (other * weight_sum).to(features.dtype)
            if is_counted is not None:
                grad_features *= is_counted
        if grad_weight is not None:
            grad_weight -= other * feature_sum
            grad_weight = grad_weight.to(weight.dtype)
        ctx.save_for_backward(grad_features, grad_weight)
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        of_features, of_weight = (
            None if grad is None else grad * grad_loss.to(grad.dtype) for grad in ctx.saved_tensors
        )
        return of_features, of_weight, None, None, None
