"""What stands between a model's logits and the choice of candidates, in the order in which it happens.

Shapes: B sentences, K beam size, R = B*K rows, V vocabulary.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nmt.generation.beam_search import Beam
from nmt.generation.options import DecodingOptions


def log_probabilities(logits: Sequence[Tensor], *, temperature: float) -> Tensor:
    """Return the log of the mean, over models, of softmax(logits / temperature).

    Args:
        logits: (R, V) of each model, any float type; overwritten.
        temperature: Above 0.

    Returns:
        (R, V), float64 if the logits are, else float32.
    """
    each = []
    for x in logits:
        x = x if x.dtype == torch.float64 else x.float()
        if temperature != 1.0:
            x /= temperature
        each.append(torch.log_softmax(x, dim=-1, out=x))
    if len(each) == 1:
        return each[0]
    return torch.stack(each).logsumexp(dim=0) - math.log(len(each))


def adjust(
    log_probs: Tensor,
    beam: Beam,
    *,
    options: DecodingOptions,
    pad_id: int,
    eos_id: int,
    unk_id: int,
    forced: Tensor | None = None,
) -> Tensor:
    """Apply limits and penalties; what they take away is not given to other tokens.

    Args:
        log_probs: (B, K, V); overwritten.
        beam: The hypotheses so far.
        options: The penalties and the shortest length.
        pad_id: Never chosen.
        eos_id: Forbidden before the shortest length, the only choice at the sentence's limit.
        unk_id: Penalised.
        forced: (B,) int64, the only choice for the sentence below its limit, with the model's score; `pad_id`
            where the choice is free.

    Returns:
        (B, K, V) without NaN.
    """
    log_probs = log_probs.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    log_probs[:, :, pad_id] = -torch.inf
    log_probs[:, :, unk_id] -= options.unkpen
    scores = log_probs if forced is None else log_probs.clone()
    at_limit = (beam.limits <= beam.step)[:, None]  # (B, 1)
    eos = log_probs[:, :, eos_id].clone()
    if beam.step < options.min_len:
        eos.masked_fill_(~at_limit, -torch.inf)
    log_probs.masked_fill_(at_limit[:, :, None], -torch.inf)
    log_probs[:, :, eos_id] = eos
    if options.no_repeat_ngram_size > 0:
        forbid_repeats_(log_probs, beam.tokens, size=options.no_repeat_ngram_size)
    if forced is not None:
        forced = torch.where(at_limit.squeeze(1), pad_id, forced)[:, None, None]  # (B, 1, 1)
        tokens = torch.arange(log_probs.size(2), device=forced.device)
        log_probs = torch.where(forced == pad_id, log_probs, scores.masked_fill(tokens != forced, -torch.inf))
    return log_probs


def forbid_repeats_(log_probs: Tensor, tokens: Tensor, *, size: int) -> None:
    """Forbid, in place, the tokens that would complete an n-gram which the hypothesis has already.

    Args:
        log_probs: (B, K, V).
        tokens: (B, K, t), without the token that starts the decoder.
        size: n, at least 1.
    """
    if tokens.size(2) < size:
        return
    ngrams = tokens.unfold(2, size, 1)  # (B, K, t) -> (B, K, t-n+1, n)
    last = tokens[:, :, tokens.size(2) - size + 1 :]  # (B, K, n-1)
    is_repeat = (ngrams[..., :-1] == last[:, :, None]).all(dim=3)  # (B, K, t-n+1)
    penalty = torch.zeros_like(is_repeat, dtype=log_probs.dtype).masked_fill_(is_repeat, -torch.inf)
    log_probs.scatter_add_(2, ngrams[..., -1], penalty)
