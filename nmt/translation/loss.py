"""Label-smoothed cross-entropy of a Transformer on a batch of translations."""

from nmt.data.parallel_dataset import TranslationBatch
from nmt.data.vocabulary import PAD_ID
from nmt.models.fused_loss import linear_cross_entropy
from nmt.models.transformer import Transformer
from nmt.task import LossOutput


def translation_loss(model: Transformer, batch: TranslationBatch, *, label_smoothing: float) -> LossOutput:
    """Return the loss summed over the target tokens of a batch, in nats.

    Args:
        model: The model, called on the source (B, S) and the shifted target (B, T).
        batch: Padded sentence pairs.
        label_smoothing: Probability spread over the V - 1 other classes.

    Returns:
        The loss, and under "nll" the negative log-likelihood, both sums.
    """
    features = model.features(batch.target_input, model.encode(batch.source))  # (B, T, D)
    # Padding leaves before the largest product of the model: (B, T, D) -> (N, D).
    is_token = (batch.target != PAD_ID).flatten()
    if is_token.is_cuda:  # the host knows their number, and need not wait for the device to count them
        tokens = is_token.nonzero_static(size=batch.num_targets).squeeze(1)
    else:
        tokens = is_token.nonzero().squeeze(1)
    loss, nll = linear_cross_entropy(
        features.flatten(0, 1).index_select(0, tokens),
        model.output_weight,
        batch.target.flatten().index_select(0, tokens),
        label_smoothing=label_smoothing,
    )
    return LossOutput(loss, {"nll": nll.detach()})
