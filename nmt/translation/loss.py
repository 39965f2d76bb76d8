"""The loss of a model on a batch of translations, and functions to build your own loss.

Shapes: B sentences, S source length, T target length, N target tokens without padding, D model, V vocabulary.
"""

from collections.abc import Callable

from torch import Tensor

from nmt.data.packing import PackedTranslationBatch
from nmt.data.parallel_dataset import TranslationBatch
from nmt.data.vocabulary import PAD_ID
from nmt.models.packed import PackedTokens
from nmt.models.protocols import PackedModel, TrainedModel
from nmt.models.training_ops import linear_cross_entropy
from nmt.task import LossOutput

TranslationLoss = Callable[[TrainedModel, TranslationBatch], LossOutput]
"""Returns sums over the target tokens of a batch; "nll" is the negative log-likelihood in nats."""


def translation_loss(model: TrainedModel, batch: TranslationBatch, *, label_smoothing: float) -> LossOutput:
    """Return the label-smoothed cross-entropy, summed over the target tokens of a batch, in nats.

    Args:
        model: The model, called on the source (B, S) and the shifted target (B, T).
        batch: Padded sentence pairs.
        label_smoothing: Probability spread over the V - 1 other classes.

    Returns:
        The loss, and under "nll" the negative log-likelihood, both sums.
    """
    features, target = target_features(model, batch)
    loss, nll = linear_cross_entropy(features, model.output_weight, target, label_smoothing=label_smoothing)
    return LossOutput(loss, {"nll": nll.detach()})


def packed_translation_loss(
    model: PackedModel, batch: PackedTranslationBatch, *, label_smoothing: float
) -> LossOutput:
    """Return the same as `translation_loss`, for the same pairs in a packed batch.

    All tensors have the same shapes in every batch. Filling goes through the model, too, but is not counted.
    """
    features = packed_features(model, batch)
    loss, nll = linear_cross_entropy(
        features, model.output_weight, batch.target.long(), label_smoothing=label_smoothing, ignored=PAD_ID
    )
    return LossOutput(loss, {"nll": nll.detach()})


def packed_features(model: PackedModel, batch: PackedTranslationBatch) -> Tensor:
    """Run the model on a packed batch, and return the decoder's last hidden states (L, D)."""
    longest = batch.shape.longest
    source = PackedTokens(
        ids=batch.source,
        positions=batch.source_positions,
        parts=batch.source_parts,
        starts=batch.source_starts,
        longest=longest,
        items=batch.source_items,
        is_target=False,
    )
    target_input = PackedTokens(
        ids=batch.target_input,
        positions=batch.target_positions,
        parts=batch.target_parts,
        starts=batch.target_starts,
        longest=longest,
        items=batch.target_items,
        is_target=True,
    )
    return model.packed_features(source, target_input)


def target_features(model: TrainedModel, batch: TranslationBatch) -> tuple[Tensor, Tensor]:
    """Run the model, and return the hidden states that predict each target token.

    Returns:
        The decoder's last hidden states (N, D), whose product with `model.output_weight` (V, D) gives the logits;
        and the target tokens (N,) int64. Padding is left out before this product, the largest of the model.
    """
    features = model(batch.source, batch.target_input)  # (B, T, D)
    is_token = (batch.target != PAD_ID).flatten()
    if is_token.is_cuda:  # the host knows the number, and need not wait for the device to count
        tokens = is_token.nonzero_static(size=batch.num_targets).squeeze(1)
    else:
        tokens = is_token.nonzero().squeeze(1)
    # In an update of low precision a model returns float32 (`nmt/update/precision.py`). The largest product is
    # computed in the type of the weights. Converting its input back to that type changes no bit.
    of_tokens = features.flatten(0, 1).index_select(0, tokens).to(model.output_weight.dtype)
    return of_tokens, batch.target.flatten().index_select(0, tokens)
