"""From the logits of models to log-probabilities, which the rules of a search then change (`rules.py`).

Shapes: B sentences, K beam size, R = B*K rows, V vocabulary, t tokens so far.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from nmt.generation.options import DecodingOptions


def combine(logits: Sequence[Tensor], options: DecodingOptions) -> Tensor:
    """Turn the logits of one model, or of several that vote, into log-probabilities.

    Several models are joined by the weighted mean of their probabilities, or of their log-probabilities. The
    second mean is normalised again. (Sockeye calls these linear and log-linear.)

    Args:
        logits: (R, V) of each model, any float type; overwritten.
        options: The temperature, and how models are joined.

    Returns:
        (R, V), float64 if the logits are, else float32.
    """
    if options.temperature != 1.0:
        logits = [x if x.dtype == torch.float64 else x.float() for x in logits]
        for x in logits:
            x /= options.temperature
    log_probs = [_log_softmax_(x) for x in logits]
    if len(log_probs) == 1:
        return log_probs[0]
    weights = options.ensemble_weights or (1.0,) * len(log_probs)
    shares = [weight / sum(weights) for weight in weights]
    if options.ensemble_by == "log-probabilities":
        mean = torch.stack([x.mul_(share) for share, x in zip(shares, log_probs, strict=True)]).sum(dim=0)
        return mean.log_softmax(dim=1)
    weighted = [x.add_(math.log(share)) for share, x in zip(shares, log_probs, strict=True)]
    return torch.stack(weighted).logsumexp(dim=0)


def score_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Return the type of log-probabilities, given the types of the models' hidden states: float64 if one is."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _log_softmax_(logits: Tensor) -> Tensor:
    """Return log-probabilities (R, V), in place of the logits unless these have fewer bits than float32."""
    if logits.dtype.itemsize < 4:
        return torch.log_softmax(logits, dim=1, dtype=torch.float32)
    # In place: a chunk of rows fills the caches, and getting as much memory again takes as long as computing.
    return torch.log_softmax(logits, dim=1, out=logits)


def penalize_repetition_(
    logits: Tensor,
    tokens: Tensor,
    *,
    penalty: float,
    offset: float = 0.0,
    num_filled: Tensor | None = None,
) -> None:
    """Make the tokens that a hypothesis already has less likely, in place (CTRL; Keskar et al., 2019).

    A positive logit is divided by the penalty. A negative one is multiplied by it, as in the authors' code and
    later toolkits. Dividing it, as in the paper's formula, would make the token more likely.

    Args:
        logits: (R, V).
        tokens: (R, t) int64.
        penalty: Above 1 to discourage, below 1 to encourage.
        offset: What the model has subtracted from its logits; added first, because the sign of a logit counts.
        num_filled: () int64: how many columns of `tokens` are filled; all if None.
    """
    if num_filled is not None:  # columns not filled count as the first token once more
        is_spare = torch.arange(tokens.size(1), device=tokens.device) >= num_filled  # (t,)
        tokens = torch.where(is_spare, tokens[:, :1], tokens)
    chosen = logits.gather(1, tokens) + offset
    penalized = torch.where(chosen > 0, chosen / penalty, chosen * penalty)
    if num_filled is not None:
        penalized = torch.where(num_filled > 0, penalized, chosen)
    logits.scatter_(1, tokens, penalized - offset)
