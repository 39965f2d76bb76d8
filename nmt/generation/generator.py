"""One or several models and a search: padded sources in, hypotheses out.

Shapes: B sentences, K beam size, R = B*K rows, S source length, T target length, D model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nmt.generation.adjust import combine
from nmt.generation.beam_search import (
    Beam,
    Candidates,
    Hypothesis,
    best,
    concatenate,
    copy_first,
    extend,
    keep,
    start,
    take,
)
from nmt.generation.choice import Rules, choose
from nmt.generation.options import DecodingOptions
from nmt.generation.random_streams import start_streams, uniform
from nmt.generation.static_search import Job, StaticSearch

# Rows that are projected to the vocabulary and searched at once: on a CPU few enough for its caches.
ROWS_AT_ONCE = {"cpu": 256}
_ROWS_AT_ONCE_ELSEWHERE = 2048
_ROWS_DRAWN_AT_ONCE = {"cpu": 512}  # each with a memory of its own
_ROWS_DRAWN_AT_ONCE_ELSEWHERE = 8192
_DONE_SHARE = 16  # done sentences leave the batch when they are at least one in so many
# A few sentences go on where nearly all are done, often to the limit, and a step costs hardly less for few than
# for many. They are stragglers when at most one in so many is left, after so many times the steps of half of them.
_STRAGGLING_SHARE = 16
_STRAGGLING_TIMES = 2.0


class TranslationModel(Protocol):
    """What the generator asks of a model; `Transformer` and `InferenceTransformer` have it."""

    training: bool
    max_target_positions: int
    logit_offset: float
    """By how much all logits of `project` are less than the model's, which changes no probability."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over the weights; if any is float64, scores are."""

    def encode(self, source: Tensor) -> Any:
        """Encode (B, S) int64. The result has `select`, to take the sentences at the places (B',), and `keep`, the
        same for sentences that go on, after which it is not used again."""

    def start_state(self) -> Any:
        """Return a state of empty prefixes. It has `reorder_`: new row i goes on from old row `rows[i]`."""

    def features(self, target_input: Tensor, memory: Any, state: Any) -> Tensor:
        """Take new tokens (R, T) into the state and return hidden states (R, T, D)."""

    def project(self, features: Tensor) -> Tensor:
        """(..., D) -> (..., V) logits, which the caller may overwrite."""


class Generator:
    """Translate batches of token ids. A sentence's result does not depend on its neighbours in the batch.

    Several models vote; they share source and target vocabularies.
    """

    def __init__(
        self,
        models: Sequence[TranslationModel],
        options: DecodingOptions,
        *,
        pad_id: int,
        eos_id: int,
        unk_id: int,
        static_search: StaticSearch | None = None,
    ) -> None:
        """Take models in evaluation mode.

        Args:
            models: At least one.
            options: How to search.
            pad_id: Of their vocabularies.
            eos_id: Of their vocabularies.
            unk_id: Of their vocabularies.
            static_search: Of the same models: searches in place of this one, as is faster on a GPU.
        """
        options.check()
        assert options.mbr is None, "candidates are chosen by nmt.translation.mbr"
        options.check_models(len(models))
        self.models = models
        self.options = options
        self.pad_id = pad_id
        self.eos_id = eos_id
        self.unk_id = unk_id
        self.static_search = static_search
        self.rules = Rules(options, pad_id, eos_id, unk_id, tuple(model.logit_offset for model in models))

    @torch.inference_mode()
    def generate(
        self,
        source: Tensor,
        prefixes: Tensor | None = None,
        *,
        lines: Tensor | None = None,
        may_drop_stragglers: bool = False,
    ) -> list[list[Hypothesis]]:
        """Search for the translations of a batch, or draw them.

        Args:
            source: (B, S) int64 on the models' device, each sentence ending in eos and padded on the right.
            prefixes: (B, P) int64, the tokens that translations begin with, padded on the right. One that ends
                in eos is the whole translation, and fills all places of the beam.
            lines: (B,) int64, the number of each sentence, which with the seed determines what is drawn for it;
                its place in the batch if left out.
            may_drop_stragglers: Whether to give up a few sentences that take much longer than the others of a
                search, for the caller to search again together with those of other batches.

        Returns:
            For each sentence its `nbest` best hypotheses, best first; none for one that was given up.
        """
        assert not any(model.training for model in self.models), "call model.eval() before decoding"
        if source.size(0) == 0:
            return []
        options = self.options
        memories = [] if self.static_search else [model.encode(source) for model in self.models]
        limits = self._limits(source)
        if not options.sampling:
            if self.static_search:
                job = Job(source, limits, prefixes, may_drop_stragglers=may_drop_stragglers)
                return self.static_search.search(job, self.rules)
            return self._search(memories, limits, prefixes, may_drop_stragglers=may_drop_stragglers)
        # Translations are drawn independently: each is a sentence with a beam of one.
        places = torch.arange(source.size(0), device=source.device)
        streams = start_streams(
            1 if options.seed is None else options.seed, places if lines is None else lines, options.beam
        )
        each = places.repeat_interleave(options.beam)  # (B*K,)
        drawn: list[list[Hypothesis]] = []
        at_once = _ROWS_DRAWN_AT_ONCE.get(source.device.type, _ROWS_DRAWN_AT_ONCE_ELSEWHERE)
        for rows, own_streams in zip(each.split(at_once), streams.split(at_once), strict=True):
            own_prefixes = None if prefixes is None else prefixes[rows]
            if self.static_search:
                job = Job(source[rows], limits[rows], own_prefixes, own_streams)
                drawn += self.static_search.search(job, self.rules)
            else:
                own_memories = [memory.select(rows) for memory in memories]
                drawn += self._search(own_memories, limits[rows], own_prefixes, own_streams)
        together = [drawn[i : i + options.beam] for i in range(0, len(drawn), options.beam)]
        ranked = [sorted((x for (x,) in samples), key=lambda x: -x.score) for samples in together]
        return [samples[: options.nbest] for samples in ranked]

    @torch.inference_mode()
    def score(self, source: Tensor, target_input: Tensor, target: Tensor) -> list[list[Hypothesis]]:
        """Score given translations, which no option changes but those of ensembles.

        Args:
            source: (B, S) int64, as for `generate`.
            target_input: (B, T) int64, the target shifted right and begun with eos.
            target: (B, T) int64, each sentence ending in eos and padded on the right.

        Returns:
            For each sentence one hypothesis, whose score is the mean log-probability of its tokens.
        """
        assert not any(model.training for model in self.models), "call model.eval() before decoding"
        logits = [
            model.project(model.features(target_input, model.encode(source), None).flatten(0, 1))  # (B*T, V)
            for model in self.models
        ]
        log_probs = combine(logits, replace(self.options, temperature=1.0))
        scores = log_probs.gather(1, target.view(-1, 1)).view_as(target)  # (B*T, V) -> (B, T)
        lengths = (target != self.pad_id).sum(dim=1)  # (B,)
        means = scores.masked_fill(target == self.pad_id, 0.0).sum(dim=1) / lengths
        return [
            [Hypothesis(tokens=tokens[: length - 1], score=mean, token_scores=token_scores[:length])]
            for tokens, mean, token_scores, length in zip(
                target.tolist(), means.tolist(), scores.tolist(), lengths.tolist(), strict=True
            )
        ]

    def _search(
        self,
        memories: list[Any],
        limits: Tensor,
        prefixes: Tensor | None,
        streams: Tensor | None = None,
        *,
        may_drop_stragglers: bool = False,
    ) -> list[list[Hypothesis]]:
        """Search for the best translations; with streams of random numbers (B,), draw one for each sentence."""
        options = self.options
        beam_size = 1 if options.sampling else options.beam
        lenpen = 0.0 if options.unnormalized else options.lenpen
        first_limit = int(limits.min())
        most_stragglers = limits.numel() // _STRAGGLING_SHARE if may_drop_stragglers else 0
        straggling_from = torch.inf  # the step, once half of the sentences are done
        states = [model.start_state() for model in self.models]
        beam, finished = start(limits, beam_size=beam_size, dtype=_score_dtype(self.models))
        rooms = [_Room() for _ in self.models]
        last_tokens = torch.full_like(beam.scores, self.eos_id, dtype=torch.int64)  # fairseq starts from eos
        while True:
            features = [
                model.features(last_tokens.reshape(-1, 1), memory, state)[:, -1]  # (R, 1, D) -> (R, D)
                for model, memory, state in zip(self.models, memories, states, strict=True)
            ]
            forced = None
            if prefixes is not None and beam.step < prefixes.size(1):
                forced = prefixes[beam.sentences, beam.step]
            numbers = None if streams is None else uniform(streams[beam.sentences], beam.step)
            candidates = self._choose(beam, features, forced, numbers, rooms, first_limit=first_limit)
            if forced is not None:
                candidates = copy_first(candidates, where=forced == self.eos_id)
            beam, rows = extend(beam, candidates, finished, eos_id=self.eos_id, lenpen=lenpen)
            num_done = int(beam.is_done.sum())  # the one read from the device in a step
            num_sentences = beam.is_done.numel()
            num_left = num_sentences - num_done
            if 2 * num_left <= limits.numel():
                straggling_from = min(straggling_from, _STRAGGLING_TIMES * beam.step)
            if num_left == 0 or (num_left <= most_stragglers and beam.step >= straggling_from):
                stragglers = set(beam.sentences[~beam.is_done].tolist())
                results = best(finished, nbest=min(options.nbest, beam_size))
                return [[] if i in stragglers else result for i, result in enumerate(results)]
            num_kept = _round_up(num_left)
            if num_done * _DONE_SHARE >= num_sentences > num_kept:
                live = _places_to_keep(beam.is_done, num_kept=num_kept)
                beam, rows = keep(beam, rows, live=live)
                memories = [memory.keep(live) for memory in memories]
            for state in states:
                state.reorder_(rows)
            last_tokens = beam.tokens[:, :, -1]

    def _choose(
        self,
        beam: Beam,
        features: Sequence[Tensor],
        forced: Tensor | None,
        numbers: Tensor | None,
        rooms: Sequence[_Room],
        *,
        first_limit: int,
    ) -> Candidates:
        """Return each sentence's best candidates, or the one that is drawn for it.

        Args:
            beam: The hypotheses so far.
            features: (R, D) of each model.
            forced: (B,) int64, see `adjust_`.
            numbers: (R,) random numbers to draw with.
            rooms: For the logits of each model.
            first_limit: No sentence has a lower limit.
        """
        num_sentences, beam_size = beam.scores.shape
        rows_at_once = ROWS_AT_ONCE.get(features[0].device.type, _ROWS_AT_ONCE_ELSEWHERE)
        at_once = max(1, rows_at_once // beam_size)  # sentences
        if at_once > 8:
            at_once -= at_once % 8  # what is left of a batch is a multiple of 8 too, see `_round_up`
        parts = []
        for first in range(0, num_sentences, at_once):
            part = slice(first, first + at_once)
            rows = slice(first * beam_size, (first + at_once) * beam_size)
            hypotheses = beam if at_once >= num_sentences else take(beam, part)
            logits = [
                room.take_float(model.project(x[rows]))
                for model, x, room in zip(self.models, features, rooms, strict=True)
            ]
            parts.append(
                choose(
                    logits,
                    hypotheses,
                    self.rules,
                    some_at_limit=beam.step >= first_limit,
                    forced=None if forced is None else forced[part],
                    numbers=None if numbers is None else numbers[rows],
                )
            )
        return concatenate(parts)

    def _limits(self, source: Tensor) -> Tensor:
        """Return the length limit (B,) of each translation, eos not counted, from its own source's length."""
        longest = min(model.max_target_positions for model in self.models) - 1  # eos takes a position too
        a, b = self.options.max_len_a, self.options.max_len_b
        lengths = (source != self.pad_id).sum(dim=1).tolist()  # Python rounds alike on every device
        return source.new_tensor([min(int(a * length + b), longest) for length in lengths])


class _Room:
    """Memory in which logits become float32, kept for a search: to ask for it takes as long as to fill it."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def take_float(self, logits: Tensor) -> Tensor:
        """Return logits (R, V), those of fewer bits as float32, which lasts until the next call."""
        if logits.dtype in (torch.float32, torch.float64):
            return logits
        if self._memory.numel() < logits.numel():
            self._memory = torch.empty(logits.numel(), dtype=torch.float32, device=logits.device)
        return self._memory[: logits.numel()].view_as(logits).copy_(logits)


def _round_up(num_sentences: int) -> int:
    """Return how many sentences a batch keeps: above 8 a multiple of 8, so that few shapes come up.

    oneDNN prepares its products for each number of rows, and keeps what it has prepared.
    """
    return num_sentences if num_sentences <= 8 else -(-num_sentences // 8) * 8


def _places_to_keep(is_done: Tensor, *, num_kept: int) -> Tensor:
    """Return the places (num_kept,) of all sentences that go on, and of others if there are fewer.

    In the order in which the fewest have to move: those in the first places stay there, and the others take the
    places of sentences that are done.
    """
    places = torch.arange(num_kept, device=is_done.device)
    late = (~is_done[num_kept:]).nonzero().squeeze(1) + num_kept
    free = is_done[:num_kept].nonzero().squeeze(1)[: late.numel()]
    places[free] = late
    return places


def _score_dtype(models: Sequence[TranslationModel]) -> torch.dtype:
    parameters = (parameter for model in models for parameter in model.parameters())
    return torch.float64 if any(x.dtype == torch.float64 for x in parameters) else torch.float32
