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

# Logits of each pass that are in memory at once, in float32 and with several copies: 2 million are 8 MB.
_LOGITS_AT_ONCE = {"cpu": 2_000_000}
_LOGITS_AT_ONCE_ELSEWHERE = 32_000_000


def r_drop_loss(
    model: TrainedModel, batch: TranslationBatch, *, label_smoothing: float, alpha: float
) -> LossOutput:
    """Return the cross-entropies of two passes with different dropout, plus the divergence between them.

    If p and q are the predictions of the two passes for a token, the loss is the sum over the target tokens of

        CE(p) + CE(q) + alpha * (KL(p || q) + KL(q || p)) / 2

    It costs two passes forward and backward, and their output projections once more in the backward pass. The
    (N, V) probabilities of both are computed chunk by chunk; for the gradient they are computed again instead of
    being kept. In evaluation, without dropout, the loss is the label-smoothed cross-entropy of one pass.

    Args:
        model: The model; its dropout differs from pass to pass.
        batch: Padded sentence pairs.
        label_smoothing: For both cross-entropies, as in `translation_loss`.
        alpha: The weight of the divergence.

    Returns:
        The loss; "nll" is the mean of the two negative log-likelihoods, and "kl" the divergence without its
        weight. All are sums, in nats.
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
