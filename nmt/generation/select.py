"""Choose the candidates of a step among all continuations: the best ones, or one at random.

Shapes: B sentences, K beam size, R = B*K rows, V vocabulary, C candidates.
"""

from functools import cache

import torch
from torch import Tensor

from nmt.generation.beam_search import Beam, Candidates
from nmt.generation.options import DecodingOptions

_NUM_COLUMNS = 128  # of the table in which `best_candidates` looks for the best tokens


def num_candidates(beam_size: int) -> int:
    """Return C. K candidates must go on, and each of the K hypotheses can end in one way; see `beam_search.py`."""
    return 1 if beam_size == 1 else 2 * beam_size


def best_candidates(scores: Tensor, beam: Beam) -> Candidates:
    """Choose for each sentence the C continuations with the highest sum of log-probabilities.

    Equal sums are ordered by place in the beam, then by token. If sums are equal at the edge of the best C, any of
    them may be chosen. A score that is not a number counts as probability 0.

    Each row of V scores is laid out as a table of 128 columns. A sentence has K * 128 columns. Its C best
    continuations must be in the C columns with the largest maxima, so only these columns are searched. On a CPU
    this is many times as fast as `torch.topk` over all scores.

    Args:
        scores: (R, V) log-probabilities; -inf for what must not follow.
        beam: The hypotheses so far.
    """
    num_sentences, beam_size = beam.scores.shape
    if beam_size == 1:
        return single_candidates(scores, _best_tokens(scores), beam)
    size = scores.size(1)
    num_chosen = min(num_candidates(beam_size), beam_size * size)
    by_sentence = scores.view(num_sentences, beam_size, size)
    depth = size // _NUM_COLUMNS
    if depth < 2:
        chosen = _sound(_totals(by_sentence, beam)).topk(num_chosen, dim=1, sorted=False).indices
    else:
        in_table = depth * _NUM_COLUMNS
        table = by_sentence[:, :, :in_table].unflatten(2, (depth, _NUM_COLUMNS))
        maxima = _sound(_totals(table.amax(dim=2), beam))  # (B, K*128)
        columns = maxima.topk(num_chosen, dim=1, sorted=False).indices  # (B, C)
        parents = columns // _NUM_COLUMNS
        # Places among a sentence's K*V scores: the first place of each chosen column, then all places in it.
        firsts = torch.add(columns, parents, alpha=size - _NUM_COLUMNS)
        rows, places_below = _places(beam_size, size, scores.device)
        in_columns_at = (firsts[:, :, None] + rows).flatten(1)  # (B, C*depth)
        in_columns = by_sentence.flatten(1).gather(1, in_columns_at).view(num_sentences, -1, depth)
        in_columns += beam.scores.gather(1, parents)[:, :, None]
        # (B, K*n): the last n scores of each row, which do not fill a row of the table
        below = _totals(by_sentence[:, :, in_table:], beam)
        totals = _sound(torch.cat([in_columns.flatten(1), below], dim=1))
        places = torch.cat([in_columns_at, places_below.expand(num_sentences, -1)], dim=1)
        chosen = places.gather(1, totals.topk(num_chosen, dim=1, sorted=False).indices)
    # First ordered by place; the stable sort below then keeps this order among equal sums.
    chosen = chosen.sort(dim=1).values
    parents = chosen // size
    log_probs = _sound(by_sentence.flatten(1).gather(1, chosen))
    ordered, ranks = (beam.scores.gather(1, parents) + log_probs).sort(dim=1, descending=True, stable=True)
    return Candidates(
        scores=ordered,
        token_scores=log_probs.gather(1, ranks),
        tokens=chosen.gather(1, ranks) % size,
        parents=parents.gather(1, ranks),
    )


@cache  # never dropped, because recordings on a GPU go on reading these tensors
def _places(beam_size: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return where the rows of the table begin, (depth,), and which of a sentence's K*V places it leaves out."""
    starts = torch.arange(0, size - size % _NUM_COLUMNS, _NUM_COLUMNS, device=device)
    left_out = torch.arange(size - size % _NUM_COLUMNS, size, device=device)
    hypotheses = torch.arange(0, beam_size * size, size, device=device)
    return starts, (hypotheses[:, None] + left_out).flatten()


def _best_tokens(scores: Tensor) -> Tensor:
    """Return the token (R, 1) with the highest score in each row of (R, V), by a table as in `best_candidates`."""
    depth = scores.size(1) // _NUM_COLUMNS
    if depth < 2 or scores.is_cuda:  # on a GPU the table saves no time
        return scores.argmax(dim=1, keepdim=True)
    table = scores[:, : depth * _NUM_COLUMNS].unflatten(1, (depth, _NUM_COLUMNS))
    columns = table.amax(dim=1).argmax(dim=1)  # (R,)
    column = table.gather(2, columns[:, None, None].expand(-1, depth, 1)).squeeze(2)  # (R, depth)
    places = torch.cat([column, scores[:, depth * _NUM_COLUMNS :]], dim=1).argmax(dim=1)
    in_table = places * _NUM_COLUMNS + columns
    below = places + (depth * _NUM_COLUMNS - depth)
    return torch.where(places < depth, in_table, below)[:, None]


def _totals(log_probs: Tensor, beam: Beam) -> Tensor:
    return (beam.scores[:, :, None] + log_probs).flatten(1)  # (B, K, n) -> (B, K*n)


def _sound(log_probs: Tensor) -> Tensor:
    return log_probs.nan_to_num_(nan=-torch.inf, neginf=-torch.inf)


def single_candidates(scores: Tensor, tokens: Tensor, beam: Beam) -> Candidates:
    """Return the chosen token as the only candidate of each sentence; K is 1.

    Args:
        scores: (B, V) log-probabilities.
        tokens: (B, 1) int64.
        beam: The hypotheses so far.
    """
    log_probs = _sound(scores.gather(1, tokens))
    return Candidates(beam.scores + log_probs, log_probs, tokens, torch.zeros_like(tokens))


def sample_tokens(scores: Tensor, numbers: Tensor, options: DecodingOptions) -> Tensor:
    """Draw a token for each row, with the probabilities exp(scores) up to a factor.

    Only tokens with a probability above zero may be drawn. Options restrict these to the `sampling_topk` most
    probable ones (Fan et al., 2018), or to the fewest that together have at least the share `sampling_topp`
    (Holtzman et al., 2020). The tokens divide the interval from 0 to 1 by their probabilities, in the order of
    their ids, or from the most probable down if they are restricted. The token whose part contains the number is
    drawn.

    Args:
        scores: (R, V); -inf for what must not follow.
        numbers: (R,) float64 from 0 to 1, 1 excluded.
        options: They may restrict the choice.

    Returns:
        (R, 1) int64. A row in which no token may follow gets an arbitrary token.
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
    drawn.clamp_(max=scores.size(1) - 1)  # a row of NaN may give V
    return drawn if order is None else order.gather(1, drawn)
