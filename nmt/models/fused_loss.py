"""Output projection and loss in one, chunk by chunk; the plain form is in tests/test_fused.py.

Shapes: N tokens (padding left out), D model, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nmt.models.fused import product, product_over_rows

# Logits that are held at once. On a CPU few enough for its caches (16 MB in float32: 500 tokens of 8,000
# classes), elsewhere enough to keep the device busy.
_LOGITS_AT_ONCE = {"cpu": 4_000_000}
_LOGITS_AT_ONCE_ELSEWHERE = 64_000_000


def linear_cross_entropy(
    features: Tensor, weight: Tensor, target: Tensor, *, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Project features to the vocabulary and take the label-smoothed cross-entropy, summed over tokens.

    The loss is fairseq's (criterions/label_smoothed_cross_entropy.py): the target class has probability
    1 - eps and each of the V - 1 others eps / (V - 1). The (N, V) logits are never held as a whole:
    both gradients are formed chunk by chunk in the forward pass. The softmax and the sums are formed in
    float32 at least, whatever the type of the products.

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
    d loss / dz = softmax(z) - q. The c at y is subtracted before the products, so that the difference is what is
    rounded to their type; the constant s is subtracted after them, where it is a rank-one term.
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
        for start in range(0, num_tokens, chunk):
            h, y = features[start : start + chunk], target[start : start + chunk, None]
            z = product(h, weight.t()).to(accurate)
            z_target, z_max = z.gather(1, y).squeeze(1), z.amax(dim=1)
            p = torch.softmax(z, dim=1, out=z)
            # log p_max instead of log p_y: the largest probability cannot underflow.
            log_normalizer = z_max - p.amax(dim=1).log()
            nll += (log_normalizer - z_target).sum()
            loss += log_normalizer.sum() - extra * z_target.sum()
            if needs_gradient:
                grad = p.scatter_(1, y, p.gather(1, y) - extra).to(features.dtype)
                grad_features[start : start + chunk] = product(grad, weight)
                grad_weight += product_over_rows(grad, h)
        weight_sum = weight.sum(dim=0, dtype=accurate)
        feature_sum = features.sum(dim=0, dtype=accurate)
        loss -= other * (feature_sum @ weight_sum)
        if needs_gradient:
            grad_features -= (other * weight_sum).to(features.dtype)
            grad_weight -= other * feature_sum
        ctx.save_for_backward(grad_features, grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_features, grad_weight = ctx.saved_tensors
        scale = grad_loss.to(grad_features.dtype)
        return grad_features * scale, grad_weight * scale, None, None, None
