"""One or several models and a search: padded sources in, hypotheses out.

Shapes: B sentences, K beam size, R = B*K rows, S source length, T target length, D model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nmt.generation.adjust import score_dtype
from nmt.generation.beam_search import Beam, Candidates, Hypothesis, best, search, start
from nmt.generation.choice import Choice, Settings, choose_in_parts
from nmt.generation.options import DecodingOptions
from nmt.generation.random_streams import start_streams
from nmt.generation.roster import Roster
from nmt.generation.rules import Rule, TokenIds
from nmt.generation.static_search import Job, StaticSearch
from nmt.models.protocols import SearchModel

# Rows that are projected to the vocabulary at once: on a CPU few enough for its caches.
ROWS_AT_ONCE = {"cpu": 256}
_ROWS_AT_ONCE_ELSEWHERE = 2048
_ROWS_DRAWN_AT_ONCE = {"cpu": 512}  # with sampling, when each row has its own copy of the encoded source
_ROWS_DRAWN_AT_ONCE_ELSEWHERE = 8192


class Generator:
    """Translate batches of token ids. A sentence's result does not depend on its neighbours in the batch.

    Several models vote; they share source and target vocabularies.
    """

    def __init__(
        self,
        models: Sequence[SearchModel],
        options: DecodingOptions,
        *,
        pad_id: int,
        eos_id: int,
        unk_id: int,
        static_search: StaticSearch | None = None,
    ) -> None:
        """Take models.

        Args:
            models: At least one, as `search_form` gives them.
            options: How to search.
            pad_id: Of their vocabularies.
            eos_id: Of their vocabularies.
            unk_id: Of their vocabularies.
            static_search: A search in place with the same models, which is faster on a GPU; used if given.
        """
        options.check()
        assert options.mbr is None, "candidates are chosen by nmt.translation.mbr"
        options.check_models(len(models))
        self.models = models
        self.options = options
        self.static_search = static_search
        ids = TokenIds(pad_id, eos_id, unk_id)
        self.settings = Settings(options, ids, tuple(model.logit_offset for model in models))

    @torch.inference_mode()
    def generate(
        self,
        source: Tensor,
        prefixes: Tensor | None = None,
        *,
        lines: Tensor | None = None,
        rules: Sequence[Rule] = (),
        may_drop_stragglers: bool = False,
    ) -> list[list[Hypothesis]]:
        """Search for the translations of a batch, or draw them.

        Args:
            source: (B, S) int64 on the models' device, each sentence ending in eos and padded on the right.
            prefixes: (B, P) int64, the tokens that translations begin with, padded on the right. A prefix that
                ends in eos is the whole translation, and fills all places of the beam.
            lines: (B,) int64, the number of each sentence; with the seed it determines what is drawn for the
                sentence. If left out, the place in the batch.
            rules: More rules for this batch, besides those of the options; `beam.sentences` numbers its rows. With
                such rules `static_search` is not used, because it records steps to repeat them for other batches.
            may_drop_stragglers: Whether to give up a few sentences that take much longer than the others. The
                caller then searches these again, together with those of other batches.

        Returns:
            For each sentence its `nbest` best hypotheses, best first; none for a sentence that was given up.
        """
        if source.size(0) == 0:
            return []
        job = Job(source, self._limits(source), prefixes, rules, may_drop_stragglers=may_drop_stragglers)
        in_place = None if rules else self.static_search
        memories = [] if in_place else [model.encode(source) for model in self.models]
        if self.options.sampling:
            places = torch.arange(source.size(0), device=source.device)
            return self._draw(job, memories, places if lines is None else lines, in_place)
        return in_place.search(job, self.settings) if in_place else self._search(memories, job)

    def _draw(
        self, job: Job, memories: Sequence[Any], lines: Tensor, in_place: StaticSearch | None
    ) -> list[list[Hypothesis]]:
        """Draw `beam` independent translations of each sentence, each as a sentence with a beam of one."""
        options = self.options
        streams = start_streams(1 if options.seed is None else options.seed, lines, options.beam)  # (B*K,)
        each = torch.arange(lines.numel(), device=lines.device).repeat_interleave(options.beam)  # (B*K,)
        at_once = _ROWS_DRAWN_AT_ONCE.get(lines.device.type, _ROWS_DRAWN_AT_ONCE_ELSEWHERE)
        drawn: list[list[Hypothesis]] = []
        for rows, own_streams in zip(each.split(at_once), streams.split(at_once), strict=True):
            own = job.take(rows, own_streams)
            if in_place:
                drawn += in_place.search(own, self.settings)
            else:
                drawn += self._search([memory.select(rows) for memory in memories], own)
        together = [drawn[i : i + options.beam] for i in range(0, len(drawn), options.beam)]
        ranked = [sorted((x for (x,) in samples), key=lambda x: -x.score) for samples in together]
        return [samples[: options.nbest] for samples in ranked]

    def _search(self, memories: Sequence[Any], job: Job) -> list[list[Hypothesis]]:
        """Search for the best translations, or draw one for each sentence if the job has streams."""
        settings, options = self.settings, self.options
        beam, finished = start(
            job.limits, beam_size=settings.beam_size, dtype=score_dtype(model.dtype for model in self.models)
        )
        choice = settings.choice(
            first_limit=int(job.limits.min()), prefixes=job.prefixes, streams=job.streams, more=job.rules
        )
        decoders = _Decoders(self.models, memories, choice)
        given_up = search(
            decoders,
            decoders.choose,
            beam,
            finished,
            roster=Roster(job.limits.numel(), may_drop_stragglers=job.may_drop_stragglers),
            eos_id=settings.ids.eos,
            lenpen=options.length_exponent,
        )
        results = best(finished, nbest=min(options.nbest, settings.beam_size))
        for sentence in given_up:
            results[sentence] = []
        return results

    def _limits(self, source: Tensor) -> Tensor:
        """Return the length limit (B,) of each translation, eos not counted, from the length of its source."""
        longest = min(model.max_target_positions for model in self.models) - 1  # eos takes a position, too
        a, b = self.options.max_len_a, self.options.max_len_b
        lengths = (
            (source != self.settings.ids.pad).sum(dim=1).tolist()
        )  # for Python, to round alike on all devices
        return source.new_tensor([min(int(a * length + b), longest) for length in lengths])


class _Decoders:
    """The models of one search, each with its encoded sources and the state of its hypotheses."""

    def __init__(self, models: Sequence[SearchModel], memories: Sequence[Any], choice: Choice) -> None:
        self._models = models
        self._memories = list(memories)
        self._states = [model.start_state() for model in models]
        self._buffers = [_Float32Buffer() for _ in models]
        self._choice = choice

    def features(self, last_tokens: Tensor) -> list[Tensor]:
        """Return the features (R, D) of each model; see `beam_search.Decoder`."""
        return [
            model.step(last_tokens.flatten(), memory, state)  # (R,) -> (R, D)
            for model, memory, state in zip(self._models, self._memories, self._states, strict=True)
        ]

    def choose(self, features: Sequence[Tensor], beam: Beam) -> Candidates:
        """Project the features (R, D) of each model to its vocabulary, and choose among continuations."""

        def project(rows: slice) -> list[Tensor]:
            return [
                buffer.take_float(model.project(x[rows]))
                for model, x, buffer in zip(self._models, features, self._buffers, strict=True)
            ]

        rows_at_once = ROWS_AT_ONCE.get(features[0].device.type, _ROWS_AT_ONCE_ELSEWHERE)
        at_once = max(1, rows_at_once // beam.scores.size(1))  # sentences
        if at_once > 8:
            at_once -= at_once % 8  # as `roster.py` keeps multiples of 8, the last part is one, too
        return choose_in_parts(self._choice, project, beam, at_once=at_once)

    def keep(self, live: Tensor) -> None:
        """Keep only some sentences; see `beam_search.Decoder`."""
        self._memories = [memory.keep(live) for memory in self._memories]

    def reorder_(self, rows: Tensor) -> None:
        """Let hypotheses continue others; see `beam_search.Decoder`."""
        for state in self._states:
            state.reorder_(rows)


class _Float32Buffer:
    """Memory for logits in float32, kept for a whole search, because getting it takes as long as filling it."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def take_float(self, logits: Tensor) -> Tensor:
        """Return logits (R, V); those of fewer bits become float32, in memory that the next call overwrites."""
        if logits.dtype in (torch.float32, torch.float64):
            return logits
        if self._memory.numel() < logits.numel():
            self._memory = torch.empty(logits.numel(), dtype=torch.float32, device=logits.device)
        return self._memory[: logits.numel()].view_as(logits).copy_(logits)
