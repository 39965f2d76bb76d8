"""Beam search. It knows neither a model nor where its probabilities come from.

`search` is the loop. A step has five parts:

1. The decoder computes features of all hypotheses.
2. `choose` takes the best candidates among their continuations (`choice.py`, `rules.py`, `select.py`).
3. `extend` ends hypotheses or lets them grow.
4. The roster lets sentences that are done leave the batch (`roster.py`).
5. The decoder's state is put into the new order.

The rules are fairseq's. Each sentence has 2K candidates, best first. A candidate that ends the sentence is
finished if it is among the first K, and dropped if it ranks lower. The best K of the other candidates go on. There
are always K of them, because each of the K hypotheses can end in only one way. A sentence is done when it has K
finished hypotheses or has reached its length limit. Finished hypotheses are never compared with those that still
grow.

One step of a sentence with K = 2:

    hypotheses   0: "a dog"  -1.0    1: "the dog"  -1.1

    rank  parent  token  score
    0     0       runs   -1.3    goes on as hypothesis 0
    1     1       eos    -1.5    ends among the first 2: "the dog" is finished
    2     0       eos    -1.9    ends at a lower rank: dropped
    3     0       walks  -2.4    goes on as hypothesis 1

    Both new hypotheses continue hypothesis 0, so the decoder's state is reordered by the rows [0, 0].

With K = 1 one candidate is enough. If it ends the sentence, the sentence is done; if not, it goes on.

Shapes: B sentences in the batch now, N sentences in it at the start, K beam size, R = B*K rows, C candidates
(2K, or 1 where K is 1), t tokens so far, L longest limit. The hypotheses of a sentence are adjacent rows:
row = b*K + k.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nmt.generation.roster import Roster


@dataclass(frozen=True)
class Hypothesis:
    """One finished translation."""

    tokens: list[int]  # without eos
    score: float  # natural log: sum(token_scores) / length**lenpen; the length includes eos
    token_scores: list[float]  # one for each token, and a last one for eos


@dataclass(frozen=True)
class Candidates:
    """The best continuations of each sentence, best first."""

    scores: Tensor  # (B, C) sum of log-probabilities of the hypothesis and the new token
    token_scores: Tensor  # (B, C) log-probability of only the new token
    tokens: Tensor  # (B, C) int64: the new token
    parents: Tensor  # (B, C) int64: the hypothesis that it continues, 0 <= parent < K

    def take(self, ranks: Tensor) -> "Candidates":
        """Return the candidates at `ranks` (B, C'), in that order."""
        columns = (self.scores, self.token_scores, self.tokens, self.parents)
        return Candidates(*(column.gather(1, ranks) for column in columns))


@dataclass(frozen=True)
class Beam:
    """The hypotheses that still grow. A score of -inf marks an empty place in the beam."""

    tokens: Tensor  # (B, K, t) int64
    token_scores: Tensor  # (B, K, t)
    scores: Tensor  # (B, K) sum of token_scores
    sentences: Tensor  # (B,) int64: the number of the sentence among the N at the start
    limits: Tensor  # (B,) int64: most tokens that a hypothesis may have, eos not counted
    is_done: Tensor  # (B,) bool: the sentence has its results, and its rows do not matter any more
    # () int64: how many tokens each hypothesis has, if `tokens` has columns to spare (`static_step.py`)
    num_filled: Tensor | None = None

    @property
    def step(self) -> int:
        """Number of columns of `tokens`: the tokens of each hypothesis, and columns to spare."""
        return self.tokens.size(2)

    @property
    def length(self) -> int | Tensor:
        """Number of tokens that each hypothesis has; a tensor if there are columns to spare."""
        return self.step if self.num_filled is None else self.num_filled


@dataclass(frozen=True)
class Finished:
    """The results: for each of the N sentences K slots, filled as hypotheses end, and one slot for waste."""

    tokens: Tensor  # (N, K+1, L) int64
    token_scores: Tensor  # (N, K+1, L+1)
    scores: Tensor  # (N, K+1) normalised; -inf in an empty slot
    lengths: Tensor  # (N, K+1) int64, eos counted
    counts: Tensor  # (N,) int64: slots filled


class Decoder(Protocol):
    """What a search asks of its models: one of them, or several that vote."""

    def features(self, last_tokens: Tensor) -> Sequence[Tensor]:
        """Take a new token for each hypothesis, (B, K) int64; return each model's features (R, D) of the next."""

    def keep(self, live: Tensor) -> None:
        """Keep only the sentences at the places `live` (B',)."""

    def reorder_(self, rows: Tensor) -> None:
        """Let each hypothesis continue an old row, (R,) int64. Rows are numbered as before the last `keep`."""


def search(
    decoder: Decoder,
    choose: Callable[[Sequence[Tensor], Beam], Candidates],
    beam: Beam,
    finished: Finished,
    *,
    roster: Roster,
    eos_id: int,
    lenpen: float,
) -> list[int]:
    """Search until all sentences are done, or the remaining ones are given up.

    Args:
        decoder: Computes the features that `choose` needs.
        choose: Returns the best 2K continuations of each sentence. A sentence at its length limit may only be
            continued by eos; `extend` then marks it done.
        beam: From `start`.
        finished: From `start`; receives the results.
        roster: Decides which sentences stay in the batch, and when the search is over.
        eos_id: The token that ends a hypothesis. It also stands before the first token, as in fairseq.
        lenpen: Exponent of the length in the final score; 0 leaves the sum as it is.

    Returns:
        The sentences that were given up.
    """
    last_tokens = torch.full_like(beam.scores, eos_id, dtype=torch.int64)
    while True:
        features = decoder.features(last_tokens)
        candidates = choose(features, beam)
        beam, rows = extend(beam, candidates, finished, eos_id=eos_id, lenpen=lenpen)
        if roster.is_over(beam.is_done, step=beam.step):
            given_up: list[int] = beam.sentences[~beam.is_done].tolist()
            return given_up
        live = roster.places_to_keep(beam.is_done)
        if live is not None:
            beam, rows = keep(beam, rows, live=live)
            decoder.keep(live)
        decoder.reorder_(rows)
        last_tokens = beam.tokens[:, :, -1]


def start(limits: Tensor, *, beam_size: int, dtype: torch.dtype) -> tuple[Beam, Finished]:
    """Begin a search with one empty hypothesis for each sentence.

    Args:
        limits: (N,) int64, each sentence's length limit, eos not counted.
        beam_size: K.
        dtype: The type of the scores.
    """
    num_sentences, longest = limits.numel(), int(limits.max())
    scores = limits.new_full((num_sentences, beam_size), -torch.inf, dtype=dtype)
    scores[:, 0] = 0.0  # only one hypothesis, because K equal ones would stay equal forever
    beam = Beam(
        tokens=limits.new_empty((num_sentences, beam_size, 0)),
        token_scores=scores.new_empty((num_sentences, beam_size, 0)),
        scores=scores,
        sentences=torch.arange(num_sentences, device=limits.device),
        limits=limits,
        is_done=torch.zeros_like(limits, dtype=torch.bool),
    )
    slots = (num_sentences, beam_size + 1)
    finished = Finished(
        tokens=limits.new_zeros((*slots, longest)),
        token_scores=scores.new_zeros((*slots, longest + 1)),
        scores=scores.new_full(slots, -torch.inf),
        lengths=limits.new_zeros(slots),
        counts=torch.zeros_like(limits),
    )
    return beam, finished


def extend(
    beam: Beam, candidates: Candidates, finished: Finished, *, eos_id: int, lenpen: float
) -> tuple[Beam, Tensor]:
    """Finish the hypotheses that end, and let the best K others grow by one token.

    Args:
        beam: The hypotheses before this step.
        candidates: Their best 2K continuations.
        finished: Receives, in place, the hypotheses that end.
        eos_id: The token that ends a hypothesis.
        lenpen: Exponent of the length in the final score; 0 leaves the sum as it is.

    Returns:
        The beam after this step; and (R,) int64: the row of the old beam that each new row continues.
    """
    num_sentences, beam_size = beam.scores.shape
    ends = candidates.tokens == eos_id  # (B, C)
    first_ends = ends[:, :beam_size]
    # On other devices, reading `any` takes longer than writing nothing.
    if first_ends.device.type != "cpu" or first_ends.any():
        _finish_(finished, beam, candidates, ends=first_ends, lenpen=lenpen)

    chosen = candidates
    if ends.size(1) > beam_size:
        chosen = candidates.take(ranks_going_on(ends, beam_size))  # (B, C) -> (B, K)
    is_full = finished.counts[beam.sentences] == beam_size
    extended = Beam(
        tokens=_append(_gather_hypotheses(beam.tokens, chosen.parents), chosen.tokens),
        token_scores=_append(_gather_hypotheses(beam.token_scores, chosen.parents), chosen.token_scores),
        scores=chosen.scores,
        sentences=beam.sentences,
        limits=beam.limits,
        is_done=beam.is_done | is_full | (beam.limits <= beam.step),
    )
    first_rows = torch.arange(num_sentences, device=ends.device)[:, None] * beam_size
    return extended, (first_rows + chosen.parents).flatten()


def ranks_going_on(ends: Tensor, beam_size: int) -> Tensor:
    """Return the ranks (B, K) of the best candidates that do not end, given which of (B, 2K) do."""
    # A stable sort of the flag (bool cannot be sorted) puts those that go on first, best first.
    return ends.byte().argsort(dim=1, stable=True)[:, :beam_size]


def free_slots(ends: Tensor, scores: Tensor, *, counts: Tensor, is_done: Tensor) -> Tensor:
    """Return the slot that each of the first K candidates fills: slot K, for waste, if it does not end.

    Args:
        ends: (B, K) bool: the candidate is eos.
        scores: (B, K); a candidate with probability 0 does not count as an end.
        counts: (B,) int64: how many slots are filled already.
        is_done: (B,) bool: the sentence takes no more results.
    """
    beam_size = ends.size(1)
    ends = ends & (scores > -torch.inf) & ~is_done[:, None]
    slots = counts[:, None] + ends.cumsum(dim=1) - 1
    # Slots are filled in order of rank. Ends for which no slot is left go to waste, too.
    return slots.masked_fill_(~ends, beam_size).clamp_(max=beam_size)


def copy_first(candidates: Candidates, *, where: Tensor) -> Candidates:
    """Copy the best candidate to all places, for the sentences `where` (B,) bool.

    This is for a forced prefix that ends the sentence: fairseq then returns the same translation K times. Such a
    sentence is done after this step, so the decoder's state does not matter.
    """
    ranks = torch.arange(candidates.tokens.size(1), device=where.device).expand_as(candidates.tokens)
    return candidates.take(ranks.masked_fill(where[:, None], 0))


def concatenate(parts: Sequence[Candidates]) -> Candidates:
    """Join the candidates of the parts of a batch."""
    if len(parts) == 1:
        return parts[0]
    return Candidates(
        scores=torch.cat([part.scores for part in parts]),
        token_scores=torch.cat([part.token_scores for part in parts]),
        tokens=torch.cat([part.tokens for part in parts]),
        parents=torch.cat([part.parents for part in parts]),
    )


def take(beam: Beam, sentences: Tensor | slice) -> Beam:
    """Return the beam of some of its sentences."""
    return Beam(
        tokens=beam.tokens[sentences],
        token_scores=beam.token_scores[sentences],
        scores=beam.scores[sentences],
        sentences=beam.sentences[sentences],
        limits=beam.limits[sentences],
        is_done=beam.is_done[sentences],
        num_filled=beam.num_filled,
    )


def keep(beam: Beam, rows: Tensor, *, live: Tensor) -> tuple[Beam, Tensor]:
    """Return the beam and the rows of the sentences at the places `live` (B',), without the others."""
    return take(beam, live), rows.view(-1, beam.scores.size(1))[live].flatten()


def best(finished: Finished, *, nbest: int) -> list[list[Hypothesis]]:
    """Return each sentence's `nbest` best finished hypotheses, best first.

    Of equal ones, the one that ended first comes first. There are fewer than `nbest` only if fewer have a
    probability above zero. A sentence without any (the model's output is not a number) gets one empty hypothesis
    with a score of -inf.
    """
    order = finished.scores[:, :-1].argsort(dim=1, descending=True, stable=True)[:, :nbest]  # (N, nbest)
    counts = finished.counts.clamp(max=nbest).tolist()
    scores = finished.scores.gather(1, order).tolist()
    lengths = finished.lengths.gather(1, order).tolist()
    tokens = _gather_hypotheses(finished.tokens, order).tolist()
    token_scores = _gather_hypotheses(finished.token_scores, order).tolist()
    results = []
    for sentence, count in enumerate(counts):
        hypotheses = [
            Hypothesis(
                tokens=tokens[sentence][rank][: lengths[sentence][rank] - 1],
                score=scores[sentence][rank],
                token_scores=token_scores[sentence][rank][: lengths[sentence][rank]],
            )
            for rank in range(count)
        ]
        results.append(hypotheses or [Hypothesis(tokens=[], score=-torch.inf, token_scores=[-torch.inf])])
    return results


def _finish_(finished: Finished, beam: Beam, candidates: Candidates, *, ends: Tensor, lenpen: float) -> None:
    """Write those of the first K candidates that end into free slots, better ones first."""
    beam_size = ends.size(1)
    scores, parents = candidates.scores[:, :beam_size], candidates.parents[:, :beam_size]
    slots = free_slots(ends, scores, counts=finished.counts[beam.sentences], is_done=beam.is_done)
    place = (beam.sentences[:, None], slots)  # (B, K)
    length = beam.step + 1
    token_scores = _append(
        _gather_hypotheses(beam.token_scores, parents), candidates.token_scores[:, :beam_size]
    )
    finished.tokens[*place, : length - 1] = _gather_hypotheses(beam.tokens, parents)
    finished.token_scores[*place, :length] = token_scores
    finished.scores[place] = scores / length**lenpen
    finished.lengths[place] = length
    finished.counts[beam.sentences] += (slots < beam_size).sum(dim=1)


def _gather_hypotheses(values: Tensor, parents: Tensor) -> Tensor:
    """Return for each candidate the row of its parent: (B, K, t) and (B, C) -> (B, C, t)."""
    if values.size(1) == 1 and parents.size(1) == 1:  # with K = 1 there is only one parent
        return values
    return values.gather(1, parents[:, :, None].expand(-1, -1, values.size(2)))


def _append(values: Tensor, column: Tensor) -> Tensor:
    return torch.cat([values, column[:, :, None]], dim=2)  # (B, K, t) -> (B, K, t+1)
