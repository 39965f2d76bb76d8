"""The choice in a step, from the models' logits to the candidates. All kinds of search share it.

Shapes: N sentences at the start of the search, B in the batch now, K beam size, R = B*K rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from nmt.generation.adjust import combine, penalize_repetition_
from nmt.generation.beam_search import Beam, Candidates, concatenate, copy_first, take
from nmt.generation.options import DecodingOptions
from nmt.generation.random_streams import uniform
from nmt.generation.rules import Rule, TokenIds, prefix_tokens, search_rules
from nmt.generation.select import best_candidates, sample_tokens, single_candidates


@dataclass(frozen=True)
class Settings:
    """The settings of a search that do not depend on its sentences."""

    options: DecodingOptions
    ids: TokenIds
    logit_offsets: tuple[float, ...]  # for each model: what it has subtracted from its logits

    @property
    def beam_size(self) -> int:
        """K. With sampling it is 1, because each drawn translation is a sentence of its own."""
        return 1 if self.options.sampling else self.options.beam

    @property
    def read_tokens(self) -> bool:
        """Whether the choice depends on the tokens of the hypotheses, and not only on their number."""
        return self.options.no_repeat_ngram_size > 0 or self.options.repetition_penalty != 1.0

    def choice(
        self,
        *,
        first_limit: int | None = 0,
        prefixes: Tensor | None = None,
        streams: Tensor | None = None,
        more: Sequence[Rule] = (),
    ) -> Choice:
        """Return how candidates are chosen in a search; `search_rules` explains all arguments except `streams`.

        Args:
            first_limit: The lowest length limit of the sentences; None if no limit is checked.
            prefixes: (N, P) int64.
            streams: (N,) int64: streams of random numbers to draw with.
            more: Rules of the caller.
        """
        rules = search_rules(self.options, self.ids, first_limit=first_limit, prefixes=prefixes, more=more)
        return Choice(self, tuple(rules), prefixes, streams)


@dataclass(frozen=True)
class Choice:
    """How candidates are chosen in one search."""

    settings: Settings
    rules: tuple[Rule, ...]
    prefixes: Tensor | None  # (N, P) int64: forced beginnings; there is a rule for them, too
    streams: Tensor | None  # (N,) int64: streams of random numbers to draw with

    def candidates(self, logits: Sequence[Tensor], beam: Beam) -> Candidates:
        """Return each sentence's best candidates, or the single one that is drawn for it.

        Args:
            logits: (R, V) of each model; overwritten.
            beam: The hypotheses so far.
        """
        options = self.settings.options
        if options.repetition_penalty != 1.0:
            logits = self._penalized(logits, beam)
        scores = combine(logits, options)
        by_sentence = scores.unflatten(0, beam.scores.shape)  # (R, V) -> (B, K, V)
        for rule in self.rules:
            rule(by_sentence, beam)
        if self.streams is None:
            candidates = best_candidates(scores, beam)
        else:
            numbers = uniform(self.streams.index_select(0, beam.sentences), beam.length)
            candidates = single_candidates(scores, sample_tokens(scores, numbers, options), beam)
        prescribed = None if self.prefixes is None else prefix_tokens(self.prefixes, beam)
        if prescribed is not None:
            candidates = copy_first(candidates, where=prescribed == self.settings.ids.eos)
        return candidates

    def _penalized(self, logits: Sequence[Tensor], beam: Beam) -> list[Tensor]:
        found = [x if x.dtype.itemsize >= 4 else x.float() for x in logits]
        for x, offset in zip(found, self.settings.logit_offsets, strict=True):
            penalize_repetition_(
                x,
                beam.tokens.flatten(0, 1),
                penalty=self.settings.options.repetition_penalty,
                offset=offset,
                num_filled=beam.num_filled,
            )
        return found


def choose_in_parts(
    choice: Choice,
    project: Callable[[slice], Sequence[Tensor]],
    beam: Beam,
    *,
    at_once: int,
) -> Candidates:
    """Choose for a few sentences at a time, because the logits of all would take too much memory.

    Args:
        choice: How candidates are chosen.
        project: Gives the logits (R', V) of each model for some rows.
        beam: The hypotheses so far.
        at_once: How many sentences.
    """
    num_sentences, beam_size = beam.scores.shape
    if at_once >= num_sentences:
        return choice.candidates(project(slice(0, num_sentences * beam_size)), beam)
    parts = []
    for first in range(0, num_sentences, at_once):
        logits = project(slice(first * beam_size, (first + at_once) * beam_size))
        parts.append(choice.candidates(logits, take(beam, slice(first, first + at_once))))
    return concatenate(parts)
