"""A step of the search in place: the rules of `beam_search.py`, on tables that keep their shapes and addresses.

Nothing is appended and no sentence leaves. The number of tokens is a tensor. The chosen candidates go into a
`Record`. A sentence that is done is computed further, but its results do not count. So a GPU can replay the step.

Shapes: B sentences, K beam size, R = B*K rows, T steps that the tables can hold, C candidates (2K, or 1 where K
is 1), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nmt.generation.beam_search import Beam, Candidates, free_slots, ranks_going_on
from nmt.generation.choice import Choice, Settings, choose_in_parts
from nmt.generation.record import Record
from nmt.generation.select import num_candidates
from nmt.models.reserve import Reserve
from nmt.models.static_decoder import DecoderTables, Sizes, StaticDecoder, move_, without_cudnn

_LOGITS_AT_ONCE = 2**26  # 256 MB of float32, and as much again for the results of the next operators


@dataclass(frozen=True)
class SearchTables:
    """The tensors that a search reads and writes in place, for one choice of sizes."""

    sizes: Sizes
    decoders: list[DecoderTables]
    places: Tensor  # (B,) int64: 0, 1, 2 ...
    source: Tensor  # (B, S) int64
    step: Tensor  # () int64: how many tokens each hypothesis has
    last_tokens: Tensor  # (B, K) int64
    scores: Tensor  # (B, K) sums of log-probabilities; -inf where there is no hypothesis
    limits: Tensor  # (B,) int64: most tokens, eos not counted
    is_done: Tensor  # (B,) bool
    record: Record  # of T steps
    tokens: Tensor  # (B, K, T) int64 if rules read them; else (B, K, 0)
    prefixes: Tensor  # (B, T) int64: forced beginnings, padded; (B, 0) if there are none
    streams: Tensor  # (B,) int64: streams of random numbers

    @property
    def by_sentence(self) -> list[Tensor]:
        """The tensors (B, ...) that are needed after the first step, without the tables of the decoders."""
        own = [self.last_tokens, self.scores, self.limits, self.is_done]
        return [*own, *self.record.by_sentence, self.tokens, self.prefixes, self.streams]


def make_tables(
    decoders: Sequence[StaticDecoder],
    reserve: Reserve,
    sizes: Sizes,
    *,
    score_dtype: torch.dtype,
    keeps_tokens: bool,
    has_prefixes: bool,
) -> SearchTables:
    """Cut tables of these sizes out of a reserve."""
    num_sentences, beam_size, num_steps = sizes.num_sentences, sizes.beam_size, sizes.num_steps
    chosen = (num_steps, num_sentences, num_candidates(beam_size))
    slots = (num_sentences, beam_size + 1)

    def integers(name: str, *shape: int) -> Tensor:
        return reserve.take(name, shape, torch.int64)

    places = integers("places", num_sentences)
    torch.arange(num_sentences, out=places)
    return SearchTables(
        sizes,
        [decoder.tables(reserve, f"decoder {i}", sizes) for i, decoder in enumerate(decoders)],
        places,
        source=integers("source", num_sentences, sizes.source_length),
        step=integers("step"),
        last_tokens=integers("last tokens", num_sentences, beam_size),
        scores=reserve.take("scores", (num_sentences, beam_size), score_dtype),
        limits=integers("limits", num_sentences),
        is_done=reserve.take("is done", (num_sentences,), torch.bool),
        record=Record(
            scores=reserve.take("all scores", chosen, score_dtype),
            token_scores=reserve.take("all token scores", chosen, score_dtype),
            tokens=integers("all tokens", *chosen),
            parents=integers("all parents", *chosen),
            ranks=integers("all ranks", num_steps, num_sentences, beam_size),
            ends=integers("ends", *slots),
            counts=integers("counts", num_sentences),
        ),
        tokens=integers("tokens", num_sentences, beam_size, num_steps if keeps_tokens else 0),
        prefixes=integers("prefixes", num_sentences, num_steps if has_prefixes else 0),
        streams=integers("streams", num_sentences),
    )


def start_(
    tables: SearchTables,
    decoders: Sequence[StaticDecoder],
    *,
    limits: Tensor,
    prefixes: Tensor | None,
    streams: Tensor | None,
    pad_id: int,
    eos_id: int,
) -> None:
    """Begin a search of the first N <= B sentences; the other places are done.

    Args:
        tables: Written to. They contain the sources already.
        decoders: Those of the models.
        limits: (N,) int64.
        prefixes: (N, P) int64, see `Generator.generate`.
        streams: (N,) int64: streams of random numbers to draw with.
        pad_id: Marks the end of a prefix.
        eos_id: Stands before the first token, as in fairseq.
    """
    num_sentences = limits.numel()
    tables.step.zero_()
    tables.last_tokens.fill_(eos_id)
    tables.scores.fill_(-torch.inf)[:, 0] = 0.0  # only one hypothesis, because K equal ones would stay equal
    tables.limits.zero_()[:num_sentences] = limits
    tables.is_done.fill_(True)[:num_sentences] = False
    tables.record.counts.zero_()
    tables.record.ranks.zero_()
    tables.record.parents.zero_()
    tables.tokens.fill_(pad_id)
    tables.prefixes.fill_(pad_id)
    if prefixes is not None:
        width = min(prefixes.size(1), tables.prefixes.size(1))  # no sentence takes more steps
        tables.prefixes[:num_sentences, :width] = prefixes[:, :width]
    if streams is not None:
        tables.streams[:num_sentences] = streams
    for decoder, own in zip(decoders, tables.decoders, strict=True):
        decoder.start_(own)


def move_on_(
    decoders: Sequence[StaticDecoder], old: SearchTables, new: SearchTables, places: Tensor | None
) -> None:
    """Copy to tables of other sizes: the sentences at the places (B',), or all of them to larger tables."""
    for before, after in zip(old.by_sentence, new.by_sentence, strict=True):
        move_(before, after, dim=0, places=places)
    for before, after in zip(old.record.by_step, new.record.by_step, strict=True):
        move_(before, after, dim=1, places=places)
    for decoder, own_old, own_new in zip(decoders, old.decoders, new.decoders, strict=True):
        decoder.move_(own_old, own_new, places)


def run_step(
    decoders: Sequence[StaticDecoder],
    tables: SearchTables,
    settings: Settings,
    *,
    width: int,
    some_at_limit: bool,
    is_forced: bool,
) -> None:
    """Let all hypotheses grow by one token, or end.

    Args:
        decoders: Those of the models.
        tables: Read and written.
        settings: Those of the search.
        width: How many steps the decoders attend to; more than the steps taken before.
        some_at_limit: Whether a sentence may be at its length limit.
        is_forced: Whether some sentence may have a forced token in this step.
    """
    step = tables.step
    index = step.view(1)
    with without_cudnn():
        features = [
            decoder.features(own, tables.last_tokens.flatten(), step, width=width)
            for decoder, own in zip(decoders, tables.decoders, strict=True)
        ]
    choice = settings.choice(
        first_limit=0 if some_at_limit else None,
        prefixes=tables.prefixes if is_forced else None,
        streams=tables.streams if settings.options.sampling else None,
    )
    candidates = _choose(decoders, tables, features, choice)
    ends = candidates.tokens == settings.ids.eos  # (B, C)
    _finish_(tables, candidates, ends, index)
    beam_size = tables.sizes.beam_size
    chosen = candidates
    if beam_size > 1:
        ranks = ranks_going_on(ends, beam_size)
        chosen = candidates.take(ranks)
        tables.record.ranks.index_copy_(0, index, ranks[None])
        for decoder, own in zip(decoders, tables.decoders, strict=True):
            decoder.reorder_(own, chosen.parents, width=width)
    if tables.tokens.size(2) > 0:
        if beam_size > 1:
            rows = chosen.parents[:, :, None].expand_as(tables.tokens)
            tables.tokens.copy_(tables.tokens.gather(1, rows))
        tables.tokens.index_copy_(2, index, chosen.tokens[:, :, None])
    tables.last_tokens.copy_(chosen.tokens)
    tables.scores.copy_(chosen.scores)
    step.add_(1)


def _choose(
    decoders: Sequence[StaticDecoder], tables: SearchTables, features: Sequence[Tensor], choice: Choice
) -> Candidates:
    beam_size = tables.sizes.beam_size
    hypotheses = Beam(
        tokens=tables.tokens,
        token_scores=tables.scores[:, :, None],
        scores=tables.scores,
        sentences=tables.places,
        limits=tables.limits,
        is_done=tables.is_done,
        num_filled=tables.step,
    )

    def project(rows: slice) -> list[Tensor]:
        return [decoder.project(x[rows]) for decoder, x in zip(decoders, features, strict=True)]

    per_sentence = beam_size * len(decoders) * decoders[0].vocabulary_size
    return choose_in_parts(choice, project, hypotheses, at_once=max(1, _LOGITS_AT_ONCE // per_sentence))


def _finish_(tables: SearchTables, candidates: Candidates, ends: Tensor, index: Tensor) -> None:
    """Record the candidates, and which of them end a hypothesis; note which sentences are done."""
    record, beam_size = tables.record, tables.sizes.beam_size
    record.scores.index_copy_(0, index, candidates.scores[None])
    record.token_scores.index_copy_(0, index, candidates.token_scores[None])
    record.tokens.index_copy_(0, index, candidates.tokens[None])
    if beam_size == 1:  # the same as below with fewer operators, because only slot 0 can be filled
        ended = ends.logical_and(candidates.scores > -torch.inf).logical_and_(~tables.is_done[:, None])
        record.ends[:, :1].copy_(torch.where(ended, tables.step, record.ends[:, :1]))
        record.counts.add_(ended[:, 0])
        tables.is_done.logical_or_(ended[:, 0]).logical_or_(tables.limits <= tables.step)
        return
    record.parents.index_copy_(0, index, candidates.parents[None])
    slots = free_slots(
        ends[:, :beam_size],
        candidates.scores[:, :beam_size],
        counts=record.counts,
        is_done=tables.is_done,
    )
    places = torch.arange(beam_size, device=index.device)
    codes = torch.add(places, tables.step, alpha=ends.size(1))  # (K,)
    record.ends.scatter_(1, slots, codes.expand_as(slots))
    record.counts.add_((slots < beam_size).sum(dim=1))
    tables.is_done.logical_or_((record.counts == beam_size).logical_or_(tables.limits <= tables.step))
