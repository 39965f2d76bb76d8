"""The record of a search in place, and how hypotheses are read from it afterwards.

No step copies the tokens of a hypothesis. Instead `parents` says which hypothesis a candidate continues, and
`ranks` says which candidate of the step before became that hypothesis. Following the two backwards gives whole
hypotheses. This is done once, on the host:

    step 2, candidate 1 --parents--> hypothesis 0 --ranks--> step 1, candidate 3 --parents--> hypothesis 1 ...

Shapes: B sentences, K beam size, T steps, C candidates (2K, or 1 where K is 1).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nmt.generation.beam_search import Hypothesis


@dataclass(frozen=True)
class Record:
    """The candidates of all steps, best first, and which of them ended a hypothesis."""

    scores: Tensor  # (T, B, C) sums of log-probabilities
    token_scores: Tensor  # (T, B, C) log-probabilities
    tokens: Tensor  # (T, B, C) int64
    parents: Tensor  # (T, B, C) int64: the hypothesis that the candidate continues
    ranks: Tensor  # (T, B, K) int64: the candidate that became the hypothesis
    ends: Tensor  # (B, K+1) int64: step * C + rank of candidates that ended the sentence; the last slot is waste
    counts: Tensor  # (B,) int64: how many slots of `ends` are filled

    @property
    def by_step(self) -> list[Tensor]:
        """The tensors (T, B, ...)."""
        return [self.scores, self.token_scores, self.tokens, self.parents, self.ranks]

    @property
    def by_sentence(self) -> list[Tensor]:
        """The tensors (B, ...)."""
        return [self.ends, self.counts]

    def take(self, num_steps: int, places: Tensor | None) -> Record:
        """Return the first steps of the sentences at the places (B',), or of all."""
        by_step, by_sentence = [x[:num_steps] for x in self.by_step], self.by_sentence
        if places is not None:
            by_step = [x.index_select(1, places) for x in by_step]
            by_sentence = [x.index_select(0, places) for x in by_sentence]
        return Record(*by_step, *by_sentence)

    def to_host(self) -> Record:
        """Return the same in the memory of the host."""
        return Record(*(getattr(self, own.name).cpu() for own in fields(self)))


def best_of(record: Record, *, nbest: int, lenpen: float) -> list[list[Hypothesis]]:
    """Return each sentence's `nbest` best finished hypotheses, best first; see `beam_search.best`.

    Args:
        record: On the host.
        nbest: At most K.
        lenpen: Exponent of the length in the score.
    """
    num_steps, num_sentences, num_candidates = record.tokens.shape
    beam_size = record.ranks.size(2)
    codes = record.ends[:, :beam_size]  # (B, K)
    # An empty slot may hold any code, so it is set to 0. Its score of -inf ranks it last.
    is_empty = torch.arange(beam_size) >= record.counts[:, None]
    codes = codes.masked_fill(is_empty, 0)
    steps, ranks = codes // num_candidates, codes % num_candidates
    sentences = torch.arange(num_sentences)[:, None]
    totals = record.scores[steps, sentences, ranks]
    powers = torch.tensor([length**lenpen for length in range(1, num_steps + 1)], dtype=totals.dtype)
    scores = (totals / powers[steps]).masked_fill_(is_empty, -torch.inf)
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :nbest]
    scores, steps, ranks = (x.gather(1, order) for x in (scores, steps, ranks))
    paths = _paths(record, steps.numpy(), ranks.numpy())
    results = []
    for own_scores, count in zip(scores.tolist(), record.counts.clamp(max=nbest).tolist(), strict=True):
        ranked = [next(paths) for _ in own_scores]
        found = [
            Hypothesis(tokens=tokens, score=score, token_scores=token_scores)
            for (tokens, token_scores), score in zip(ranked[:count], own_scores, strict=False)
        ]
        results.append(found or [Hypothesis(tokens=[], score=-torch.inf, token_scores=[-torch.inf])])
    return results


def _paths(
    record: Record, steps: NDArray[np.int64], ranks: NDArray[np.int64]
) -> Iterator[tuple[list[int], list[float]]]:
    """Follow candidates (B, n), each given by a step and a rank, back to the start.

    Yields:
        For one candidate after another the tokens without eos, and the scores of all tokens.
    """
    num_sentences, num_each = steps.shape
    sentences = np.repeat(np.arange(num_sentences), num_each)
    last_steps = steps.flatten()
    if record.tokens.size(2) == 1:
        tokens = record.tokens[:, :, 0].t().numpy()[sentences]
        token_scores = record.token_scores[:, :, 0].t().numpy()[sentences]
    else:
        tokens, token_scores = _trace(record, sentences, last_steps, ranks.flatten())
    for step, own_tokens, own_scores in zip(
        last_steps.tolist(), tokens.tolist(), token_scores.tolist(), strict=True
    ):
        yield own_tokens[:step], own_scores[: step + 1]


def _trace(
    record: Record,
    sentences: NDArray[np.int64],
    last_steps: NDArray[np.int64],
    last_ranks: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.floating]]:
    """Return tokens and their scores, (M, T) each, from the start to each of M candidates."""
    all_tokens, all_scores = record.tokens.numpy(), record.token_scores.numpy()
    all_parents, all_ranks = record.parents.numpy(), record.ranks.numpy()
    num_steps = int(last_steps.max(initial=0)) + 1
    tokens = np.zeros((len(sentences), num_steps), dtype=np.int64)
    token_scores = np.zeros((len(sentences), num_steps), dtype=all_scores.dtype)
    ranks = last_ranks
    for step in range(num_steps - 1, -1, -1):
        ranks = np.where(step >= last_steps, last_ranks, ranks)
        tokens[:, step] = all_tokens[step, sentences, ranks]
        token_scores[:, step] = all_scores[step, sentences, ranks]
        if step > 0:
            parents = all_parents[step, sentences, ranks]
            ranks = all_ranks[step - 1, sentences, parents]
    return tokens, token_scores
