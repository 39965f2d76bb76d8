"""Beam search. It knows neither a model nor where its probabilities come from.

`search` is the loop. A step has five parts: the decoder's features of all hypotheses; the choice of candidates
among their continuations (`choice.py`, `rules.py`, `select.py`); `extend`, by which hypotheses end or grow; the
roster, by which sentences that are done leave (`roster.py`); and the decoder's state, put into the new order.

The rules are fairseq's. Of the 2K best candidates of a sentence, those that end it and rank among the first K
are finished; those that end it and rank lower are dropped; the best K others go on. K of them always exist,
because each of the K hypotheses has one way to end. A sentence is done when it has K finished hypotheses or
has reached its length limit. Nothing compares finished hypotheses with those that still grow.

With K = 1 one candidate is enough: if it ends the sentence, the sentence is done, and if not, it goes on.

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
    score: float  # natural log: sum(token_scores) / length**lenpen, where the length counts eos
    token_scores: list[float]  # one per token, and the last one for eos


@dataclass(frozen=True)
class Candidates:
    """The best continuations of each sentence, best first."""

    scores: Tensor  # (B, C) sum of log-probabilities of the hypothesis and the new token
    token_scores: Tensor  # (B, C) log-probability of the new token alone
    tokens: Tensor  # (B, C) int64: the new token
    parents: Tensor  # (B, C) int64: the hypothesis that it continues, 0 <= parent < K

    def take(self, ranks: Tensor) -> "Candidates":
        """Return those at `ranks` (B, C'), in that order."""
        columns = (self.scores, self.token_scores, self.tokens, self.parents)
        return Candidates(*(column.gather(1, ranks) for column in columns))


@dataclass(frozen=True)
class Beam:
    """The hypotheses that still grow. A score of -inf marks a place in the beam that no hypothesis holds."""

    tokens: Tensor  # (B, K, t) int64
    token_scores: Tensor  # (B, K, t)
    scores: Tensor  # (B, K) sum of token_scores
    sentences: Tensor  # (B,) int64: where the sentence stands among the N at the start
    limits: Tensor  # (B,) int64: most tokens that a hypothesis may have, eos not counted
    is_done: Tensor  # (B,) bool: the sentence has its results; whatever still happens to it is ignored
    # () int64: how many tokens each hypothesis has, where there is room for more (`static_step.py`)
    num_filled: Tensor | None = None

    @property
    def step(self) -> int:
        """Number of tokens that each hypothesis has, or has room for."""
        return self.tokens.size(2)

    @property
    def length(self) -> int | Tensor:
        """Number of tokens that each hypothesis has; a tensor where there is room for more."""
        return self.step if self.num_filled is None else self.num_filled


@dataclass(frozen=True)
class Finished:
    """The results: K slots for each sentence of the start, filled as hypotheses end, and one for waste."""

    tokens: Tensor  # (N, K+1, L) int64
    token_scores: Tensor  # (N, K+1, L+1)
    scores: Tensor  # (N, K+1) normalised; -inf in an empty slot
    lengths: Tensor  # (N, K+1) int64, eos counted
    counts: Tensor  # (N,) int64: slots filled


class Decoder(Protocol):
    """What a search asks of its models: one of them, or several that vote."""

    def features(self, last_tokens: Tensor) -> Sequence[Tensor]:
        """Take a new token for each hypothesis, (B, K) int64; return what predicts the next, (R, D) of each."""

    def keep(self, live: Tensor) -> None:
        """Let the sentences go that are not at the places `live` (B',)."""

    def reorder_(self, rows: Tensor) -> None:
        """Let each hypothesis go on from an old row, (R,) int64, counted before any sentence was let go."""


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
    """Search until all sentences are done, or those that are left are given up.

    Args:
        decoder: Computes what continuations are chosen by.
        choose: Returns the best 2K continuations of each sentence. At the length limit of a sentence these are its
            ends: `extend` takes it for done.
        beam: From `start`.
        finished: From `start`; receives the results.
        roster: Which sentences stay in the batch, and when the search is over.
        eos_id: The token that ends a hypothesis, and stands before the first one, as in fairseq.
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
        dtype: Of the scores.
    """
    num_sentences, longest = limits.numel(), int(limits.max())
    scores = limits.new_full((num_sentences, beam_size), -torch.inf, dtype=dtype)
    scores[:, 0] = 0.0  # K equal hypotheses would stay equal for ever, so there is one
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
    """Finish the hypotheses that end, and let the best K others grow by a token.

    Args:
        beam: The hypotheses before this step.
        candidates: Their best 2K continuations.
        finished: Receives, in place, the hypotheses that end.
        eos_id: The token that ends a hypothesis.
        lenpen: Exponent of the length in the final score; 0 leaves the sum as it is.

    Returns:
        The beam after this step, and (R,) int64: which row of the old beam each row of the new one continues.
    """
    num_sentences, beam_size = beam.scores.shape
    ends = candidates.tokens == eos_id  # (B, C)
    first_ends = ends[:, :beam_size]
    if (
        first_ends.device.type != "cpu" or first_ends.any()
    ):  # elsewhere, to ask takes longer than to write nothing
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
    """Return which slot each candidate of the first K ranks fills: K, for waste, if it does not end.

    Args:
        ends: (B, K) bool.
        scores: (B, K); what has no probability does not end.
        counts: (B,) int64: how many slots are filled, better candidates first.
        is_done: (B,) bool: the sentence takes no more.
    """
    beam_size = ends.size(1)
    ends = ends & (scores > -torch.inf) & ~is_done[:, None]
    slots = counts[:, None] + ends.cumsum(dim=1) - 1
    # What ends when all slots are filled is waste too.
    return slots.masked_fill_(~ends, beam_size).clamp_(max=beam_size)


def copy_first(candidates: Candidates, *, where: Tensor) -> Candidates:
    """Let the best candidate of the sentences `where` (B,) take all places.

    For a forced prefix that ends the sentence, where fairseq returns K times the same translation. Such a
    sentence is done with this step, so the decoder's state need not follow.
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
    """Let the other sentences go: return the beam and the rows of those at the places `live` (B',)."""
    return take(beam, live), rows.view(-1, beam.scores.size(1))[live].flatten()


def best(finished: Finished, *, nbest: int) -> list[list[Hypothesis]]:
    """Return each sentence's `nbest` best finished hypotheses, best first.

    Of equals, the one that ended first comes first. There are fewer than `nbest` only where fewer have a
    probability above zero. A sentence that has none (the model's output is not a number) gets one empty
    hypothesis with a score of -inf.
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
    """Write the candidates of the first K ranks that end into free slots, better ones first."""
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
    """Return for each place the row of its parent: (B, K, t) and (B, C) -> (B, C, t)."""
    if values.size(1) == 1 and parents.size(1) == 1:  # with a beam of one there is nothing to choose
        return values
    return values.gather(1, parents[:, :, None].expand(-1, -1, values.size(2)))


def _append(values: Tensor, column: Tensor) -> Tensor:
    return torch.cat([values, column[:, :, None]], dim=2)  # (B, K, t) -> (B, K, t+1)
