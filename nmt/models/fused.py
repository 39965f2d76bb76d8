"""Faster forms of two operations that take much of an update's time; the plain forms are in the tests.

Shapes: N tokens (padding left out), D model, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Logits that are held at once. On a CPU few enough for its caches (16 MB in float32: 500 tokens of 8,000
# classes), elsewhere enough to keep the device busy.
_LOGITS_AT_ONCE = {"cpu": 4_000_000}
_LOGITS_AT_ONCE_ELSEWHERE = 64_000_000


class Dropout(nn.Module):
    """Dropout whose mask is drawn from random bytes on the CPU.

    PyTorch draws one 32-bit random number an element there; cutting 64-bit numbers into four gives the
    same masks' distribution, with the probability rounded to a multiple of 2**-16 (and the scale to match,
    so that the expectation is exact), several times as fast. Other devices use PyTorch's own.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        return x * random_mask(x, self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def random_mask(x: Tensor, p: float) -> Tensor:
    """Draw a mask of x's shape and dtype that is 0 with probability `p` and else 1 / (1 - p)."""
    threshold = min(round(p * 65536), 65535)
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    numbers = words.view(torch.int16)[: x.numel()].view(x.shape)
    return (numbers >= threshold - 32768).to(x.dtype).mul_(65536 / (65536 - threshold))


def linear_cross_entropy(
    features: Tensor, weight: Tensor, target: Tensor, *, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Project features to the vocabulary and take the label-smoothed cross-entropy, summed over tokens.

    The loss is fairseq's (criterions/label_smoothed_cross_entropy.py): the target class has probability
    1 - eps and each of the V - 1 others eps / (V - 1). The (N, V) logits are never held as a whole:
    both gradients are formed chunk by chunk in the forward pass.

    Args:
        features: (N, D) float.
        weight: (V, D), the output embeddings.
        target: (N,) int64.
        label_smoothing: eps, 0 <= eps < 1.

    Returns:
        The loss and the negative log-likelihood, both scalars in float32 (float64 for float64 features) and
        sums over the N tokens, in nats. Only the loss carries a gradient.
    """
    apply = cast(Callable[..., tuple[Tensor, Tensor]], _LinearCrossEntropy.apply)
    # Asked here, since within `apply` gradients are always off.
    needs_gradient = torch.is_grad_enabled() and (features.requires_grad or weight.requires_grad)
    loss, nll = apply(features, weight, target, label_smoothing, needs_gradient)
    return loss, nll


class _LinearCrossEntropy(torch.autograd.Function):
    """Write z = Wh, q for the smoothed target distribution, s = eps / (V - 1) and c = 1 - eps - s.

    loss = logsumexp(z) - sum_v q_v z_v = logsumexp(z) - s * (h . sum_v W_v) - c * z_y
    d loss / dz = softmax(z) - q, of which the constant s and the c at y are subtracted in the small
    products (with W and with h) instead of in the (N, V) tensor.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        target: Tensor,
        label_smoothing: float,
        needs_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        num_tokens, vocabulary_size = features.size(0), weight.size(0)
        accurate = torch.promote_types(features.dtype, torch.float32)
        other = label_smoothing / (vocabulary_size - 1)
        extra = 1.0 - label_smoothing - other
        grad_features = torch.empty_like(features)
        grad_weight = torch.zeros_like(weight, dtype=accurate)
        loss = torch.zeros((), dtype=accurate, device=features.device)
        nll = torch.zeros_like(loss)
        at_once = _LOGITS_AT_ONCE.get(features.device.type, _LOGITS_AT_ONCE_ELSEWHERE)
        chunk = max(1, at_once // vocabulary_size)
        logits_buffer = features.new_empty(min(chunk, num_tokens), vocabulary_size)
        for start in range(0, num_tokens, chunk):
            h, y = features[start : start + chunk], target[start : start + chunk]
            z = torch.mm(h, weight.t(), out=logits_buffer[: h.size(0)])
            z_target = z.gather(1, y[:, None]).squeeze(1).to(accurate)
            z_max = z.amax(dim=1)
            p = torch.softmax(z, dim=1, out=z) if z.dtype == accurate else z.softmax(dim=1)
            # log p_max instead of log p_y: the largest probability cannot underflow.
            log_normalizer = z_max.to(accurate) - p.amax(dim=1).to(accurate).log()
            nll += (log_normalizer - z_target).sum()
            loss += log_normalizer.sum() - extra * z_target.sum()
            if needs_gradient:
                grad = torch.mm(p, weight, out=grad_features[start : start + chunk])
                grad.sub_(weight[y], alpha=extra)
                grad_weight.addmm_(p.t().to(accurate), h.to(accurate))
        weight_sum = weight.sum(dim=0, dtype=accurate)
        feature_sum = features.sum(dim=0, dtype=accurate)
        loss -= other * (feature_sum @ weight_sum)
        if needs_gradient:
            grad_features -= (other * weight_sum).to(features.dtype)
            grad_weight -= other * feature_sum
            grad_weight.index_add_(0, target, features.to(accurate), alpha=-extra)
        ctx.save_for_backward(grad_features, grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_features, grad_weight = ctx.saved_tensors
        scale = grad_loss.to(grad_features.dtype)
        return grad_features * scale, grad_weight * scale, None, None, None
