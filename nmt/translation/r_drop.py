"""R-Drop (Liang et al., "R-Drop: Regularized Dropout for Neural Networks", 2021).

Shapes: N target tokens without padding, D model, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nmt.data.parallel_dataset import TranslationBatch
from nmt.models.protocols import TrainedModel
from nmt.task import LossOutput
from nmt.translation.loss import target_features, translation_loss

# Logits of each pass that are held at once, in float32 and some times over: 2 million are 8 MB.
_LOGITS_AT_ONCE = {"cpu": 2_000_000}
_LOGITS_AT_ONCE_ELSEWHERE = 32_000_000


def r_drop_loss(
    model: TrainedModel, batch: TranslationBatch, *, label_smoothing: float, alpha: float
) -> LossOutput:
    """Return the cross-entropies of two passes with different dropout, and what keeps the two alike.

    With p and q, what the two predict for a token, the loss is the sum over the target tokens of

        CE(p) + CE(q) + alpha * (KL(p || q) + KL(q || p)) / 2

    It costs two passes forward and backward, and their output projections once more in the backward pass: the
    (N, V) probabilities of both are formed chunk by chunk, and again for their gradient instead of being kept.
    In evaluation, without dropout, it is the label-smoothed cross-entropy of one pass.

    Args:
        model: The model; what it draws for its dropout differs from pass to pass.
        batch: Padded sentence pairs.
        label_smoothing: Of both cross-entropies, as in `translation_loss`.
        alpha: The weight of the divergence.

    Returns:
        The loss; under "nll" the mean of the two negative log-likelihoods, and under "kl" the divergence without
        its weight: sums, in nats.
    """
    if not model.training:
        return translation_loss(model, batch, label_smoothing=label_smoothing)
    first, target = target_features(model, batch)
    second, _ = target_features(model, batch)
    weight = model.output_weight
    at_once = _LOGITS_AT_ONCE.get(target.device.type, _LOGITS_AT_ONCE_ELSEWHERE)
    chunk = max(1, at_once // weight.size(0))
    sums = torch.zeros(3, dtype=torch.promote_types(first.dtype, torch.float32), device=target.device)
    for h, g, y in zip(first.split(chunk), second.split(chunk), target.split(chunk), strict=True):
        sums = sums + checkpoint(
            _sums, h, g, weight, y, label_smoothing, use_reentrant=False, preserve_rng_state=False
        )
    cross_entropy, nll, kl = sums.unbind()
    return LossOutput(cross_entropy + alpha * kl, {"nll": nll.detach(), "kl": kl.detach()})


def _sums(first: Tensor, second: Tensor, weight: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    """Return cross-entropies, mean negative log-likelihood and divergence of a chunk: (3,)."""
    accurate = torch.promote_types(first.dtype, torch.float32)
    log_p, log_q = (
        F.log_softmax(F.linear(x, weight), dim=1, dtype=accurate) for x in (first, second)
    )  # (N, V)
    nll = -(log_p + log_q).gather(1, target[:, None]).sum()
    other = label_smoothing / (weight.size(0) - 1)
    cross_entropy = (1.0 - label_smoothing - other) * nll - other * (log_p.sum() + log_q.sum())
    # KL(p || q) + KL(q || p) = sum (p - q) (log p - log q)
    kl = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum() / 2
    return torch.stack([cross_entropy, nll / 2, kl])
