"""Scores of translations that are given, not searched for.

Shapes: B sentences, S source length, T target length, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nmt.generation.adjust import combine
from nmt.generation.beam_search import Hypothesis
from nmt.generation.options import DecodingOptions
from nmt.models.protocols import TrainedModel


@torch.inference_mode()
def score_given(
    models: Sequence[TrainedModel], source: Tensor, target_input: Tensor, target: Tensor, *, pad_id: int
) -> list[list[Hypothesis]]:
    """Score translations by the mean of the probabilities of all models.

    Args:
        models: In evaluation mode.
        source: (B, S) int64, each sentence ending in eos and padded on the right.
        target_input: (B, T) int64, the target shifted right, with eos at its start.
        target: (B, T) int64, each sentence ending in eos and padded on the right.
        pad_id: Of their vocabularies.

    Returns:
        One hypothesis for each sentence. Its score is the mean log-probability of its tokens.
    """
    assert not any(model.training for model in models), "call model.eval() before"
    logits = [model.project(model(source, target_input).flatten(0, 1)) for model in models]  # (B*T, V)
    log_probs = combine(logits, DecodingOptions())
    scores = log_probs.gather(1, target.view(-1, 1)).view_as(target)  # (B*T, V) -> (B, T)
    lengths = (target != pad_id).sum(dim=1)  # (B,)
    means = scores.masked_fill(target == pad_id, 0.0).sum(dim=1) / lengths
    return [
        [Hypothesis(tokens=tokens[: length - 1], score=mean, token_scores=token_scores[:length])]
        for tokens, mean, token_scores, length in zip(
            target.tolist(), means.tolist(), scores.tolist(), lengths.tolist(), strict=True
        )
    ]
