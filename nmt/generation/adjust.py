"""What stands between a model's logits and the choice of candidates, in the order in which it happens.

Scores are log-probabilities. What the rules of `adjust_` take away from a token is not given to others.

Shapes: B sentences, K beam size, R = B*K rows, V vocabulary, t tokens so far.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nmt.generation.beam_search import Beam
from nmt.generation.options import DecodingOptions


def combine(logits: Sequence[Tensor], options: DecodingOptions) -> Tensor:
    """Turn the logits of one model, or of several that vote, into log-probabilities.

    Several are joined by the weighted mean of their probabilities, or of their log-probabilities, which is
    normalised again (Sockeye calls these linear and log-linear).

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


def _log_softmax_(logits: Tensor) -> Tensor:
    """Return log-probabilities (R, V), in the place of the logits if those are not of fewer bits than float32."""
    if logits.dtype.itemsize < 4:
        return torch.log_softmax(logits, dim=1, dtype=torch.float32)
    # In place: a chunk of rows fills the caches, and to ask for as much memory again takes as long as to compute.
    return torch.log_softmax(logits, dim=1, out=logits)


def penalize_repetition_(
    logits: Tensor,
    tokens: Tensor,
    *,
    penalty: float,
    offset: float = 0.0,
    num_filled: Tensor | None = None,
) -> None:
    """Make the tokens that a hypothesis has already less likely, in place (CTRL; Keskar et al., 2019).

    A positive logit is divided by the penalty. A negative one is multiplied by it, as in the authors' code and
    all that followed: dividing it, as the paper's formula says, would make it more likely.

    Args:
        logits: (R, V).
        tokens: (R, t) int64.
        penalty: Above 1 to discourage, below 1 to encourage.
        offset: What the model has subtracted from its logits, whose sign counts.
        num_filled: () int64: how many of the tokens there are, the others are room; all if it is left out.
    """
    if num_filled is not None:  # what is room stands for the first token once more
        is_room = torch.arange(tokens.size(1), device=tokens.device) >= num_filled  # (t,)
        tokens = torch.where(is_room, tokens[:, :1], tokens)
    chosen = logits.gather(1, tokens) + offset
    penalized = torch.where(chosen > 0, chosen / penalty, chosen * penalty)
    if num_filled is not None:
        penalized = torch.where(num_filled > 0, penalized, chosen)
    logits.scatter_(1, tokens, penalized - offset)


def adjust_(
    scores: Tensor,
    beam: Beam,
    *,
    options: DecodingOptions,
    pad_id: int,
    eos_id: int,
    unk_id: int,
    some_at_limit: bool = True,
    forced: Tensor | None = None,
) -> None:
    """Apply limits and penalties, in place.

    Args:
        scores: (B, K, V).
        beam: The hypotheses so far.
        options: The penalties and the shortest length.
        pad_id: Never chosen.
        eos_id: Forbidden before the shortest length, the only choice at the sentence's limit.
        unk_id: Penalised.
        some_at_limit: Whether any sentence may be at its limit; if not, none is looked for.
        forced: (B,) int64, the only choice for the sentence below its limit, with the model's score; `pad_id`
            where the choice is free.
    """
    scores[:, :, pad_id].fill_(-torch.inf)
    if options.unkpen != 0.0:
        scores[:, :, unk_id] -= options.unkpen
    step = beam.step if beam.num_filled is None else beam.num_filled
    if some_at_limit:
        eos_scores = scores[:, :, eos_id].clone()
    if some_at_limit or forced is not None:
        at_limit = (beam.limits <= step)[:, None]  # (B, 1)
    if forced is not None:
        is_forced = ((forced != pad_id)[:, None] & ~at_limit)[:, :, None]  # (B, 1, 1)
        forced = forced[:, None, None].expand(-1, scores.size(1), 1)  # (B, K, 1)
        forced_scores = scores.gather(2, forced)
    if isinstance(step, Tensor):
        if options.min_len > 0:
            scores[:, :, eos_id].masked_fill_(step < options.min_len, -torch.inf)
    elif step < options.min_len:
        scores[:, :, eos_id] = -torch.inf
    if options.no_repeat_ngram_size > 0:
        forbid_repeats_(scores, beam.tokens, size=options.no_repeat_ngram_size, num_filled=beam.num_filled)
    if some_at_limit:
        scores.masked_fill_(at_limit[:, :, None], -torch.inf)
        scores[:, :, eos_id] = torch.where(at_limit, eos_scores, scores[:, :, eos_id])
    if forced is not None:
        scores.masked_fill_(is_forced, -torch.inf)
        scores.scatter_(2, forced, torch.where(is_forced, forced_scores, scores.gather(2, forced)))


def forbid_repeats_(scores: Tensor, tokens: Tensor, *, size: int, num_filled: Tensor | None = None) -> None:
    """Forbid, in place, the tokens that would complete an n-gram which the hypothesis has already.

    Args:
        scores: (B, K, V).
        tokens: (B, K, t), without the token that starts the decoder.
        size: n, at least 1.
        num_filled: () int64: how many of the t there are, the others are room; all if it is left out.
    """
    if tokens.size(2) < size:
        return
    ngrams = tokens.unfold(2, size, 1)  # (B, K, t) -> (B, K, t-n+1, n)
    if num_filled is None:
        last = tokens[:, :, tokens.size(2) - size + 1 :]  # (B, K, n-1)
    else:
        places = torch.arange(1 - size, 0, device=tokens.device) + num_filled  # (n-1,)
        last = tokens.index_select(2, places.clamp_(min=0))
    is_repeat = (ngrams[..., :-1] == last[:, :, None]).all(dim=3)  # (B, K, t-n+1)
    if num_filled is not None:
        ends = torch.arange(size, tokens.size(2) + 1, device=tokens.device)  # (t-n+1,)
        is_repeat &= ends <= num_filled
    penalty = torch.zeros_like(is_repeat, dtype=scores.dtype).masked_fill_(is_repeat, -torch.inf)
    scores.scatter_add_(2, ngrams[..., -1], penalty)
