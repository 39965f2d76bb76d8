"""How the candidates of a step are chosen among all continuations.

Shapes: B sentences, K beam size, V vocabulary, C = 2K candidates.
"""

from torch import Tensor

from nmt.generation.beam_search import Beam, Candidates


def select_best(beam: Beam, log_probs: Tensor) -> Candidates:
    """Choose for each sentence the 2K continuations with the highest sum of log-probabilities.

    Equal sums are ordered by place in the beam, then by token. (If the last of the 2K places is among equals,
    `torch.topk` decides which of them get in, by the numbers of this sentence alone.)

    Args:
        beam: The hypotheses so far.
        log_probs: (B, K, V), adjusted (see `adjust.py`), without NaN.
    """
    beam_size, vocabulary_size = log_probs.shape[1:]
    totals = (beam.scores[:, :, None] + log_probs).flatten(1)  # (B, K, V) -> (B, K*V)
    _, places = totals.topk(2 * beam_size, dim=1, sorted=False)
    places, _ = places.sort(dim=1)
    scores, order = totals.gather(1, places).sort(dim=1, descending=True, stable=True)
    places = places.gather(1, order)  # (B, C)
    return Candidates(
        scores=scores,
        token_scores=log_probs.flatten(1).gather(1, places),
        tokens=places % vocabulary_size,
        parents=places // vocabulary_size,
    )
