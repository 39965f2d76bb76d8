"""How the candidates of a step are chosen among all continuations.

Shapes: B sentences, K beam size, V vocabulary, C = 2K candidates.
"""

from torch import Tensor

from nmt.generation.beam_search import Beam, Candidates


def select_best(beam: Beam, log_probs: Tensor) -> Candidates:
    """Choose for each sentence the 2K continuations with the highest sum of log-probabilities.

    Equal sums are ordered by place in the beam, then by token. (If several tokens of one hypothesis are equal
    at the very edge of its own best 2K, `torch.topk` decides which of them take part.)

    Args:
        beam: The hypotheses so far.
        log_probs: (B, K, V), adjusted (see `adjust.py`), without NaN; V is at least 2.
    """
    num_candidates = 2 * log_probs.size(1)
    # No hypothesis has more than its own best 2K among the best 2K of all: the vocabulary is walked once.
    width = min(num_candidates, log_probs.size(2))
    tokens = (
        log_probs.topk(width, dim=2, sorted=False).indices.sort(dim=2).values
    )  # (B, K, V) -> (B, K, width)
    token_scores = log_probs.gather(2, tokens)
    totals = (beam.scores[:, :, None] + token_scores).flatten(1)  # (B, K, width) -> (B, K*width)
    scores, places = totals.sort(dim=1, descending=True, stable=True)
    places = places[:, :num_candidates]
    return Candidates(
        scores=scores[:, :num_candidates],
        token_scores=token_scores.flatten(1).gather(1, places),
        tokens=tokens.flatten(1).gather(1, places),
        parents=places // width,
    )
