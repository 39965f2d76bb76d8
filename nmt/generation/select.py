"""How the candidates of a step are chosen among all continuations: the best ones, or one at random.

Shapes: B sentences, K beam size, R = B*K rows, V vocabulary, W continuations of a hypothesis, C candidates.
"""

import torch
from torch import Tensor

from nmt.generation.beam_search import Beam, Candidates, Continuations
from nmt.generation.options import DecodingOptions

_NUM_COLUMNS = 128  # of the table in which the best tokens are looked for


def num_candidates(beam_size: int) -> int:
    """Return C: K of them shall go on, and each hypothesis may end in one way; see `beam_search.py`."""
    return 1 if beam_size == 1 else 2 * beam_size


def best_tokens(scores: Tensor, width: int) -> Tensor:
    """Return the places (R, width) of the `width` largest of each row (R, V), in the order of places.

    The row is laid out as a table of 128 columns. The `width` largest stand in the `width` columns with the
    largest maxima, so only those are searched: on a CPU many times as fast as `torch.topk`. If several are equal
    at the edge, any of them is returned.
    """
    size = scores.size(1)
    depth = size // _NUM_COLUMNS
    if depth < 2 or width * 4 > _NUM_COLUMNS:
        return scores.topk(min(width, size), dim=1, sorted=False).indices.sort(dim=1).values
    table = scores[:, : depth * _NUM_COLUMNS].unflatten(1, (depth, _NUM_COLUMNS))
    columns = table.amax(dim=1).topk(width, dim=1, sorted=False).indices  # (R, width)
    chosen = table.gather(2, columns[:, None].expand(-1, depth, -1)).flatten(1)  # (R, depth*width)
    rest = scores[:, depth * _NUM_COLUMNS :]  # what is left of a row below the table
    places = torch.cat([chosen, rest], dim=1).topk(width, dim=1, sorted=False).indices
    in_table = columns.gather(1, places % width) + places // width * _NUM_COLUMNS
    below = places + (depth * _NUM_COLUMNS - chosen.size(1))
    return torch.where(places < chosen.size(1), in_table, below).sort(dim=1).values


def sample_tokens(scores: Tensor, numbers: Tensor, options: DecodingOptions) -> Tensor:
    """Draw a token for each row, with the probabilities exp(scores) up to a factor.

    The tokens that may be drawn are those with a probability above zero, or of these the `sampling_topk` most
    probable (Fan et al., 2018), or the fewest that together have at least the share `sampling_topp` (Holtzman et
    al., 2020). In the order of tokens, or of falling probability where they are restricted, they divide the unit
    interval, and the number falls on one.

    Args:
        scores: (R, V); -inf for what must not follow.
        numbers: (R,) float64 from 0 to 1, 1 excluded.
        options: What restricts the choice.

    Returns:
        (R, 1) int64. A row without any token that may follow gets some token.
    """
    order = None
    if options.sampling_topk is not None:
        scores, order = scores.topk(min(options.sampling_topk, scores.size(1)), dim=1)
    elif options.sampling_topp is not None:
        scores, order = scores.sort(dim=1, descending=True, stable=True)
    probs = (scores - scores.amax(dim=1, keepdim=True)).double().exp()
    ends = probs.cumsum(dim=1)  # (R, V): where the share of each token ends
    total = ends[:, -1:]
    if options.sampling_topp is not None:
        starts = ends - probs
        total = torch.where(starts < options.sampling_topp * total, ends, 0.0).amax(dim=1, keepdim=True)
    drawn = torch.searchsorted(ends, numbers[:, None] * total, right=True)
    drawn.clamp_(max=scores.size(1) - 1)  # of a row of NaN
    return drawn if order is None else order.gather(1, drawn)


def score_tokens(scores: Tensor, normalizer: Tensor, tokens: Tensor, *, beam_size: int) -> Continuations:
    """Return tokens (R, W) with their log-probabilities, given scores (R, V) and normalisers (R, 1).

    What is not a number, because the model's output is none, has no probability.
    """
    log_probs = scores.gather(1, tokens).sub_(normalizer).nan_to_num_(nan=-torch.inf, neginf=-torch.inf)
    return Continuations(log_probs.unflatten(0, (-1, beam_size)), tokens.unflatten(0, (-1, beam_size)))


def rank(beam: Beam, continuations: Continuations) -> Candidates:
    """Choose for each sentence the C continuations with the highest sum of log-probabilities.

    Equal sums are ordered by place in the beam, then by token. (If several tokens of one hypothesis are equal
    at the very edge of its own best W, any of them take part.)

    Args:
        beam: The hypotheses so far.
        continuations: Of each hypothesis, its best C or all there are, in the order of tokens: no hypothesis has
            more than its own best C among the best C of all.
    """
    beam_size, width = continuations.tokens.shape[1:]
    totals = (beam.scores[:, :, None] + continuations.token_scores).flatten(1)  # (B, K, W) -> (B, K*W)
    scores, places = totals.sort(dim=1, descending=True, stable=True)
    size = num_candidates(beam_size)
    places = places[:, :size]
    return Candidates(
        scores=scores[:, :size],
        token_scores=continuations.token_scores.flatten(1).gather(1, places),
        tokens=continuations.tokens.flatten(1).gather(1, places),
        parents=places // width,
    )
