"""The search for GPUs: steps work in place on tables of few different sizes, are recorded once, and then replayed.

Tables have the next larger sizes from short lists, for the sentences, the source columns and the steps. Places
without a sentence are done from the start. When the tables are full, the search goes on in larger ones; when few
sentences are left, in smaller ones. Recordings and their memory live as long as the `StaticSearch`. So the next
batch of similar sizes is replayed from its first step on. On a CPU the same steps run without recordings; this is
how they are tested.

An example with K = 5: 40 sentences of at most 30 tokens, and translations of at most 70.

    step 0    tables for 48 sentences, 32 source columns, 32 steps; places 40 to 47 are empty and done
    step 32   the tables are full: `_grow` makes room for 64 steps
    step 42   16 sentences are left: `_shrink` reads the results of the others, and goes on in tables for 16
    step 60   all are done: `_may_end` ends the search

Every second step copies `is_done`, and the copy is read two steps later, so that the GPU never waits for the host.

Shapes: B sentences, N of them real, S source length, K beam size.
"""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nmt.generation.adjust import score_dtype
from nmt.generation.beam_search import Hypothesis
from nmt.generation.choice import Settings
from nmt.generation.record import best_of
from nmt.generation.roster import Stragglers
from nmt.generation.rules import Rule, of_rows
from nmt.generation.static_step import SearchTables, make_tables, move_on_, run_step, start_
from nmt.models.inference import InferenceTransformer
from nmt.models.protocols import SearchModel
from nmt.models.reserve import Reserve
from nmt.models.static_decoder import Sizes, StaticDecoder
from nmt.system.cuda_graphs import Recording
from nmt.system.deferred import Late

# Above its last number, each list continues with multiples of it. Attention wants columns in multiples of 16.
_SENTENCES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_SOURCE_LENGTHS = (16, 32, 48, 64, 96, 128, 192, 256, 512)
_STEPS = (32, 64, 128, 256, 512, 1024)
_WIDTHS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)  # steps that attention reads
_STEPS_A_LOOK = 2  # steps from one look at which sentences are done to the next; each is read one look later
_KEPT_SHARE = 2  # a search goes on in smaller tables when they have at most 1/2 of the places
_FEWEST_ROWS = 64  # at this number of rows or fewer, smaller tables save no time
_MOST_RECORDINGS = 128
# Steps for each source piece in an estimate of memory: the translation may be twice as long as its source, and the
# tables may be half empty.
_COLUMNS_A_PIECE = 4


@dataclass(frozen=True)
class Job:
    """A batch to search."""

    source: Tensor  # (N, S) int64, padded on the right
    limits: Tensor  # (N,) int64: most tokens of each translation, eos not counted
    prefixes: Tensor | None = None  # (N, P) int64, see `Generator.generate`
    rules: Sequence[Rule] = ()  # see `Generator.generate`; a search in place does not use them
    streams: Tensor | None = None  # (N,) int64: streams of random numbers to draw with
    may_drop_stragglers: bool = False

    def take(self, rows: Tensor, streams: Tensor) -> Job:
        """Return a batch of the sentences (N',) int64, each with a stream to draw one translation with."""
        return Job(
            self.source[rows],
            self.limits[rows],
            None if self.prefixes is None else self.prefixes[rows],
            [of_rows(rule, rows) for rule in self.rules],
            streams,
        )


def static_search(models: Sequence[SearchModel]) -> StaticSearch | None:
    """Return a search in place with these models, or None if it cannot run one of them."""
    known = [x for x in models if isinstance(x, InferenceTransformer) and not x.has_variants]
    return StaticSearch(known) if len(known) == len(models) else None


class StaticSearch:
    """Searches with one or several models, one batch at a time."""

    def __init__(self, models: Sequence[InferenceTransformer]) -> None:
        """Take models that are all on one device."""
        self.decoders = [StaticDecoder(model) for model in models]
        self.device = models[0].plain.output_weight.device
        self._score_dtype = score_dtype(decoder.dtype for decoder in self.decoders)
        self._known = _Known(self.device)
        self._reserve = Reserve(self.device, self._known.forget)

    @torch.inference_mode()
    def search(self, job: Job, settings: Settings) -> list[list[Hypothesis]]:
        """Search for the translations of a batch, or draw one for each sentence; see `Generator.generate`.

        With `sampling` the beam size is 1, whatever the options say.
        """
        try:
            return _Search(self, job, settings).run()
        except RuntimeError:  # perhaps out of memory
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # work in another stream may still write to the tables
            self.clear()
            raise

    def clear(self) -> None:
        """Free the memory of tables and recordings."""
        self._reserve.clear()

    def bytes_of_piece(self, beam_size: int) -> int:
        """Return about how many bytes each piece of a source takes; its translation may be twice as long."""
        length = _SOURCE_LENGTHS[-1]
        num_columns = beam_size * _COLUMNS_A_PIECE * length
        return sum(x.bytes_of(source_length=length, num_columns=num_columns) for x in self.decoders) // length

    def tables(self, sizes: Sizes, settings: Settings, *, has_prefixes: bool) -> SearchTables:
        """Return tables of these sizes. Tables of all sizes share the same memory."""
        key = (sizes, settings.read_tokens, has_prefixes)
        tables = self._known.tables.get(key)
        if tables is None:
            # The reserve may have to move its storage for this. Then it calls `forget`, and all older tables go.
            tables = make_tables(
                self.decoders,
                self._reserve,
                sizes,
                score_dtype=self._score_dtype,
                keeps_tokens=settings.read_tokens,
                has_prefixes=has_prefixes,
            )
            self._known.tables[key] = tables
        return tables

    def record(self, key: Hashable, function: Callable[[], None]) -> Recording:
        """Return a recording that replays a function; an equal key gives the same recording."""
        return self._known.record(key, function)


class _Known:
    """Everything that depends on the addresses of tables: the tables themselves, and recordings."""

    def __init__(self, device: torch.device) -> None:
        self.tables: dict[Hashable, SearchTables] = {}
        self.recordings: OrderedDict[Hashable, Recording] = OrderedDict()
        self._device = device
        self._pool: Any = None

    def record(self, key: Hashable, function: Callable[[], None]) -> Recording:
        """Return the recording of a key. Make it if it is new; the least recently used one may be dropped."""
        recording = self.recordings.get(key)
        if recording is None:
            if self._pool is None and self._device.type == "cuda":
                # PyTorch cannot free the memory that it caches while it records, so it is freed before.
                torch.cuda.empty_cache()
                self._pool = torch.cuda.graph_pool_handle()
            recording = self.recordings[key] = Recording(function, self._device, pool=self._pool)
            if len(self.recordings) > _MOST_RECORDINGS:
                self.recordings.popitem(last=False)
        self.recordings.move_to_end(key)
        return recording

    def forget(self) -> None:
        """Drop all tables and recordings, and the memory that recordings share."""
        self.recordings.clear()
        self.tables.clear()
        self._pool = None


class _Search:
    """The search of one batch."""

    def __init__(self, owner: StaticSearch, job: Job, settings: Settings) -> None:
        self.owner, self.job, self.settings = owner, job, settings
        num_sentences, length = job.source.shape
        limits: list[int] = job.limits.tolist()
        self.first_limit, self.last_limit = min(limits), max(limits)
        self.prefix_length = 0 if job.prefixes is None else job.prefixes.size(1)
        self.beam_size = settings.beam_size
        sizes = Sizes(
            num_sentences=_round_up(num_sentences, _SENTENCES),
            beam_size=self.beam_size,
            source_length=_round_up(length, _SOURCE_LENGTHS),
            num_steps=_round_up(min(self.last_limit + 1, max(self.prefix_length, _STEPS[0])), _STEPS),
        )
        self.step_options = replace(  # the options that a step reads, as a part of the key of its recording
            settings.options, seed=None, nbest=1, lenpen=1.0, unnormalized=False, max_len_a=0.0, max_len_b=0
        )
        self.tables = self._make_tables(sizes)
        self.step = 0
        # The sentence at each place; -1 if there is none, or if its results have been read already.
        self.sentences = list(range(num_sentences)) + [-1] * (sizes.num_sentences - num_sentences)
        self.results: list[list[Hypothesis]] = [[] for _ in range(num_sentences)]
        self.stragglers = Stragglers(num_sentences, may_be_dropped=job.may_drop_stragglers)

    def run(self) -> list[list[Hypothesis]]:
        self._start()
        looks: list[Late] = []
        while self.step <= self.last_limit:
            if self.step == self.tables.sizes.num_steps:
                self._grow()
            self._run_step()
            if self.step % _STEPS_A_LOOK == 0:
                looks.append(Late(self.tables.is_done.clone()))
            if len(looks) > 1:
                is_done: list[bool] = looks.pop(0).read()
                if self._may_end(is_done):
                    break
                if self._shrink(is_done):
                    looks.clear()
        self._read([place for place, sentence in enumerate(self.sentences) if sentence >= 0])
        return self.results

    def _start(self) -> None:
        job, tables = self.job, self.tables
        num_sentences, length = job.source.shape
        # Places without a sentence get an empty one: only eos.
        tables.source.fill_(self.settings.ids.pad)[:, 0] = self.settings.ids.eos
        tables.source[:num_sentences, :length] = job.source
        key = ("encode", tables.sizes.num_sentences, tables.sizes.source_length)
        self.owner.record(key, partial(_encode, self.owner.decoders, tables))()
        start_(
            tables,
            self.owner.decoders,
            limits=job.limits,
            prefixes=job.prefixes,
            streams=job.streams,
            pad_id=self.settings.ids.pad,
            eos_id=self.settings.ids.eos,
        )

    def _run_step(self) -> None:
        some_at_limit = self.step >= self.first_limit
        is_forced = self.step < self.prefix_length
        sizes = self.tables.sizes
        width = min(_round_up(self.step + 1, _WIDTHS), sizes.num_steps)
        key = (sizes, width, self.step_options, self.prefix_length > 0, some_at_limit, is_forced)
        step = partial(
            run_step,
            self.owner.decoders,
            self.tables,
            self.settings,
            width=width,
            some_at_limit=some_at_limit,
            is_forced=is_forced,
        )
        self.owner.record(key, step)()
        self.step += 1

    def _may_end(self, is_done: Sequence[bool]) -> bool:
        """Return whether the search may end: all sentences are done, or only stragglers are left.

        Stragglers get no result.
        """
        left = [i for i, x in zip(self.sentences, is_done, strict=True) if i >= 0 and not x]
        if not self.stragglers.are_given_up(len(left), step=self.step):
            return False
        self.sentences = [-1 if i in left else i for i in self.sentences]
        return True

    def _shrink(self, is_done: Sequence[bool]) -> bool:
        """If few sentences are left, go on with them in smaller tables; return whether it was so."""
        sizes = self.tables.sizes
        left = [place for place, x in enumerate(is_done) if not x and self.sentences[place] >= 0]
        num_kept = _round_up(len(left), _SENTENCES)
        if (
            num_kept * _KEPT_SHARE > sizes.num_sentences
            or sizes.num_sentences * self.beam_size <= _FEWEST_ROWS
        ):
            return False
        self._read([place for place, x in enumerate(is_done) if x and self.sentences[place] >= 0])
        done = [place for place, x in enumerate(is_done) if x]
        places = left + done[: num_kept - len(left)]
        self._move(replace(sizes, num_sentences=num_kept), torch.tensor(places, device=self.owner.device))
        self.sentences = [self.sentences[place] for place in places]
        return True

    def _grow(self) -> None:
        sizes = self.tables.sizes
        self._move(replace(sizes, num_steps=_round_up(sizes.num_steps + 1, _STEPS)), None)

    def _move(self, sizes: Sizes, places: Tensor | None) -> None:
        old, self.tables = self.tables, self._make_tables(sizes)
        move_on_(self.owner.decoders, old, self.tables, places)

    def _make_tables(self, sizes: Sizes) -> SearchTables:
        return self.owner.tables(sizes, self.settings, has_prefixes=self.prefix_length > 0)

    def _read(self, places: list[int]) -> None:
        """Store the results of the sentences at the places, and mark the places as read."""
        if not places:
            return
        options = self.settings.options
        is_all = places == list(range(self.tables.sizes.num_sentences))
        index = None if is_all else torch.tensor(places, device=self.owner.device)
        record = self.tables.record.take(self.step, index).to_host()
        found = best_of(
            record,
            nbest=min(options.nbest, self.beam_size),
            lenpen=options.length_exponent,
        )
        for place, hypotheses in zip(places, found, strict=True):
            self.results[self.sentences[place]] = hypotheses
            self.sentences[place] = -1


def _encode(decoders: Sequence[StaticDecoder], tables: SearchTables) -> None:
    for decoder, own in zip(decoders, tables.decoders, strict=True):
        decoder.encode_(own, tables.source)


def _round_up(number: int, sizes: Sequence[int]) -> int:
    """Return the next larger size of a list; above its last size, the next multiple of that size."""
    if number > sizes[-1]:
        return -(-number // sizes[-1]) * sizes[-1]
    return sizes[bisect.bisect_left(sizes, number)]
