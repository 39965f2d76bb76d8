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
    log_probs: Tensor, beam: Beam, *, options: DecodingOptions, pad_id: int, eos_id: int, unk_id: int
) -> Tensor:
    """Apply limits and penalties; what they take away is not given to other tokens.

    Args:
        log_probs: (B, K, V); overwritten.
        beam: The hypotheses so far.
        options: The penalties and the shortest length.
        pad_id: Never chosen.
        eos_id: Forbidden before the shortest length, the only choice at the sentence's limit.
        unk_id: Penalised.

    Returns:
        (B, K, V) without NaN.
    """
    log_probs = log_probs.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    log_probs[:, :, pad_id] = -torch.inf
    log_probs[:, :, unk_id] -= options.unkpen
    at_limit = (beam.limits <= beam.step)[:, None]  # (B, 1)
    eos = log_probs[:, :, eos_id].clone()
    if beam.step < options.min_len:
        eos.masked_fill_(~at_limit, -torch.inf)
    log_probs.masked_fill_(at_limit[:, :, None], -torch.inf)
    log_probs[:, :, eos_id] = eos
    return log_probs
