"""Text in, text out: segmenter, batches by length, search, and results in the order of the input."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Unpack

import numpy as np
import torch

from nmt.data.parallel_dataset import collate_pairs
from nmt.data.segmenter import PieceSegmenter
from nmt.data.vocabulary import EOS_ID, PAD_ID, UNK_ID
from nmt.errors import UserError, shown
from nmt.generation.beam_search import Hypothesis
from nmt.generation.generator import Generator
from nmt.generation.given import score_given
from nmt.generation.options import DecodingKeywords, DecodingOptions
from nmt.generation.static_search import static_search
from nmt.models.protocols import TranslationModel
from nmt.models.search_form import search_form
from nmt.system.allocator import give_back_tensors
from nmt.system.core_threads import num_cores
from nmt.system.cudnn_attention import leave_out_cudnn_attention
from nmt.system.prepared_shapes import keep_prepared_shapes
from nmt.translation.batch_queue import BatchQueue, Job, failed_job
from nmt.translation.batch_runner import Batching, free_memory
from nmt.translation.batch_search import BatchSearch, Scoring, make_search
from nmt.translation.engine import Engine
from nmt.translation.loading import (
    TYPES,
    Precision,
    check_device,
    check_precision,
    largest_of_a_step,
    load_models,
)
from nmt.translation.request import Request, ScoredText, Translation
from nmt.translation.sentences import END, Ids, Line, Lines, TooLong, in_buffers, to_translation
from nmt.translation.task import TranslationTask
from nmt.translation.unknown_pieces import UnknownPieces

_SHAPES_A_THREAD = 16  # shapes of products in a step of the search, for each thread with its own batches


class Translator:
    """A translation model, or several that vote, ready for text.

    >>> from nmt import Translator
    >>> translator = Translator.load("RUN/checkpoints/best")
    >>> translator.translate(["A dog runs.", "", "Two dogs run."], beam=5)
    ['Ein Hund läuft.', '', 'Zwei Hunde laufen.']
    >>> [best, second] = translator.translate_with_scores(["A dog runs."], beam=5, nbest=2)[0]
    >>> best.text, best.score > second.score
    ('Ein Hund läuft.', True)
    """

    def __init__(
        self,
        models: Sequence[TranslationModel],
        task: TranslationTask,
        *,
        device: torch.device | str,
        input_is_pieces: bool = False,
        precision: Precision = "fp32",
        in_place: bool | None = None,
    ) -> None:
        """Take models that are on `device` and in evaluation mode, and the task that they were made for.

        Args:
            models: At least one.
            task: Their vocabularies, and how text becomes pieces.
            device: Where they are.
            input_is_pieces: Sources and references are already split into pieces, joined by blanks.
            precision: The precision of the weights in the search; "fp32" leaves them as they are.
            in_place: Whether to use the search for GPUs (`StaticSearch`), one batch at a time. If left out, only
                on a GPU. Results are the same.

        Raises:
            UserError: This precision does not exist, or this machine cannot compute in it.
        """
        check_precision(precision, device)
        self.models = models
        dtype = TYPES[precision]
        forms = [search_form(model, dtype) for model in models]
        self.fast_models = [form.model for form in forms]
        self.remarks = [form.remark for form in forms if form.remark is not None]
        for remark in self.remarks:
            print(f"warning: {remark}", file=sys.stderr)
        if torch.device(device).type == "cuda":
            leave_out_cudnn_attention()
        if torch.device(device).type == "cpu":
            give_back_tensors(above=largest_of_a_step(self.fast_models, models))
        self.task = task
        self.device = torch.device(device)
        self.input_is_pieces = input_is_pieces
        if in_place is None:
            in_place = self.device.type == "cuda"
        self.static_search = static_search(self.fast_models) if in_place else None
        # On a CPU each core takes a batch of its own: the steps of a search are too small to be divided among
        # cores without most of them waiting. PyTorch lets go of Python's lock while it computes.
        is_for_cores = self.device.type == "cpu" and self.static_search is None
        self.engine = Engine(num_cores if is_for_cores else lambda: 1)
        # Asked before any search takes memory, so that batches keep one size.
        self._free_memory = free_memory(self.device)
        self.source_segmenter = (
            PieceSegmenter(task.source_vocabulary) if input_is_pieces else task.source_segmenter
        )
        self.target_segmenter = (
            PieceSegmenter(task.target_vocabulary) if input_is_pieces else task.target_segmenter
        )

    @classmethod
    def load(
        cls,
        path: Path | str | Sequence[Path | str],
        device: torch.device | str = "cpu",
        *,
        input_is_pieces: bool = False,
        precision: Precision = "fp32",
        in_place: bool | None = None,
    ) -> Translator:
        """Load a model folder, or several; the probabilities of several models are averaged. See the constructor.

        Raises:
            UserError: A folder is no model folder, is damaged, or holds a model that does not translate; or the
                vocabularies of several differ; or there is no such precision or device.
        """
        keep_prepared_shapes(_SHAPES_A_THREAD * torch.get_num_threads())
        check_device(device)
        check_precision(precision, device)  # before weights are read
        models, task = load_models([path] if isinstance(path, (str, Path)) else list(path), device)
        return cls(
            models,
            task,
            device=device,
            input_is_pieces=input_is_pieces,
            precision=precision,
            in_place=in_place,
        )

    def translate(self, lines: Sequence[str | Request], **decoding: Unpack[DecodingKeywords]) -> list[str]:
        """Return the best translation of each line; that of a blank line is empty.

        A line that is too long for the model is cut at punctuation, and its parts are translated separately.

        Args:
            lines: Raw text, without newlines; or requests, which say more about a line.
            **decoding: Fields of `DecodingOptions`, such as `beam=5`.

        Raises:
            UserError: An option has a value that makes no sense, or `lines` is one string.

        Warns:
            UserWarning: Many pieces of the lines are unknown to the model, or the lines look as if they were
                already in pieces; at most once a call.
        """
        return [translation.text for translation in self._translate_all(lines, DecodingOptions(**decoding))]

    def translate_with_scores(
        self, lines: Sequence[str | Request], **decoding: Unpack[DecodingKeywords]
    ) -> list[list[ScoredText]]:
        """Return the `nbest` best translations of each line, best first; none for a blank line.

        Arguments, errors and warnings are those of `translate`.
        """
        return [
            [
                ScoredText(text, hypothesis.score, hypothesis.token_scores)
                for text, hypothesis in zip(translation.texts, translation.hypotheses, strict=True)
            ]
            for translation in self._translate_all(lines, DecodingOptions(**decoding))
        ]

    def _translate_all(self, lines: Sequence[str | Request], options: DecodingOptions) -> list[Translation]:
        if isinstance(lines, str):
            raise UserError(
                f"`lines` must be a list of lines, but is one string. Put it in a list: [{shown(lines)}]."
            )
        if (stranger := next((line for line in lines if not isinstance(line, (str, Request))), "")) != "":
            raise UserError(
                f"`lines` must be lines of text, but one is {shown(stranger)}. Give each as a str."
            )
        translations = list(self.translate_lines(lines, options))
        unknown = UnknownPieces(self.source_segmenter, named="input", input_is_pieces=self.input_is_pieces)
        for translation in translations:
            unknown.add(translation.source, translation.source_ids)
        for text in unknown.warnings():
            warnings.warn(text, stacklevel=3)
        return translations

    def translate_lines(
        self,
        lines: Iterable[str | Request],
        options: DecodingOptions,
        *,
        batching: Batching | None = None,
        too_long: TooLong = "split",
        on_progress: Callable[[int], object] | None = None,
    ) -> Iterator[Translation]:
        """Translate a stream of lines, in memory for `buffer_size` of them.

        Args:
            lines: Text without newlines, or requests, which say more of a line.
            options: How to search.
            batching: How to gather lines.
            too_long: What to do with a line that is too long for the models.
            on_progress: Called with the number of lines that have just been translated.

        Yields:
            One translation for each line, in the order of the lines.

        Raises:
            UserError: A line is too long and `too_long` is "error"; or there is not enough memory for a line.
        """
        batching = self._batching(batching, options.beam)
        queue = self._search_queue(options, batching)
        reader = self._reader(too_long)
        for requests in in_buffers(lines, batching.buffer_size):
            jobs = self._jobs(reader.read(requests), options)
            yield from self._run(jobs, queue, on_progress)

    def submit(
        self,
        requests: Iterable[str | Request],
        options: DecodingOptions,
        *,
        batching: Batching | None = None,
        too_long: TooLong = "split",
    ) -> list[Future[Translation]]:
        """Begin to translate, and return at once.

        Calls at the same time with equal options share batches, here and in `translate`; no result depends on
        this. The sentences of a call are numbered from 1, and random numbers depend on these numbers.

        Args:
            requests: Text without newlines, or requests, which say more about a line.
            options: How to search.
            batching: How to gather lines; `buffer_size` does not matter.
            too_long: What to do with a line that is too long for the models.

        Returns:
            A future for each line, with its translation or its error: a `UserError` if the line is too long and
            `too_long` is "error", or if there is not enough memory for it. It may be cancelled before it begins.

        Raises:
            UserError: An option has a value that makes no sense.
        """
        queue = self._search_queue(options, self._batching(batching, options.beam))
        reader = self._reader(too_long)
        jobs = []
        for request in requests:
            own = Request(request) if isinstance(request, str) else request
            try:
                jobs += self._jobs(reader.read([own]), options)
            except UserError as error:
                jobs.append(failed_job(error))
        self.engine.submit(jobs, queue, attrgetter("lengths"))
        self.engine.run_behind()
        return [job.future for job in jobs]

    def score_lines(
        self,
        requests: Iterable[Request],
        *,
        batching: Batching | None = None,
        too_long: TooLong = "truncate",
        on_progress: Callable[[int], object] | None = None,
    ) -> Iterator[Translation]:
        """Let the model score the references of requests, instead of searching for its own translations.

        Args:
            requests: A request without a reference is scored as if its reference were empty.
            batching: How to gather lines.
            too_long: "truncate" or "error", as in `translate_lines`; a reference cannot be split into parts.
            on_progress: Called with the number of lines that have just been scored.

        Yields:
            For each request its reference as the only hypothesis, in their order.

        Raises:
            UserError: A reference is too long for the models; or a line is, and `too_long` is "error".
        """
        assert too_long != "split"
        batching = batching or Batching()
        queue = self._queue("scores", batching, Scoring(self.score_ids))
        reader = self._reader(too_long)
        num_read = 0
        for buffer in in_buffers(requests, batching.buffer_size):
            targets = [
                END if x.reference is None else self.encode_reference(x.reference, number=number)
                for number, x in enumerate(buffer, start=num_read + 1)
            ]
            jobs = self._jobs(reader.read(buffer, targets), DecodingOptions())
            yield from self._run(jobs, queue, on_progress)
            num_read += len(buffer)

    def score_ids(self, sources: Sequence[Ids], targets: Sequence[Ids]) -> list[list[Hypothesis]]:
        """Score translations of one batch as ids, eos at the end of each side; one hypothesis for each."""
        batch = collate_pairs(list(zip(sources, targets, strict=True))).to(self.device)
        return score_given(self.models, batch.source, batch.target_input, batch.target, pad_id=PAD_ID)

    def encode_reference(self, line: str, *, number: int) -> Ids:
        """Return the ids of target text, eos at the end; `number` names the line in an error.

        Raises:
            UserError: It is longer than the models have positions for.
        """
        longest = min(model.max_target_positions for model in self.models)
        ids = np.append(self.target_segmenter.encode([line])[0], EOS_ID)
        if len(ids) > longest:
            raise UserError(
                f"A reference must have at most {longest} pieces with the end of sentence, as many as the "
                f"model takes, but line {number} has {len(ids)}. Shorten it."
            )
        return ids

    @property
    def longest_source(self) -> int:
        """The most pieces that a source may have."""
        return min(model.max_source_positions for model in self.models) - 1  # eos takes a position too

    def _reader(self, too_long: TooLong) -> Lines:
        return Lines(self.source_segmenter, longest=self.longest_source, too_long=too_long)

    def _batching(self, batching: Batching | None, beam_size: int) -> Batching:
        batching = batching or Batching()
        if self.static_search is None or self._free_memory is None:
            return batching
        bytes_of_piece = self.static_search.bytes_of_piece(beam_size)
        return batching.fill_in(num_bytes=self._free_memory, bytes_of_piece=bytes_of_piece)

    def _search_queue(self, options: DecodingOptions, batching: Batching) -> BatchQueue:
        search = make_search(
            options,
            self._generator,
            self.device,
            decode=self.task.target_segmenter.decode,
            target_lang=self.task.target_lang,
        )
        return self._queue(options, batching, search, beam_size=options.beam)

    def _queue(
        self, what: object, batching: Batching, search: BatchSearch, *, beam_size: int = 2
    ) -> BatchQueue:
        """Return the queue of sentences that wait for the same work, in batches of the same limits."""
        limits = batching.limits(beam_size)
        return self.engine.queue(repr((what, limits)), lambda: BatchQueue(search.run, limits))

    def _jobs(self, lines: Sequence[Line], options: DecodingOptions) -> list[Job]:
        """Return a job for each line, which runs its sentences and then makes its translation."""
        finish = partial(
            to_translation,
            segmenter=self.task.target_segmenter,
            language=self.task.target_lang,
            lenpen=options.length_exponent,
        )
        return [Job(line.sentences, partial(finish, line)) for line in lines]

    def _run(
        self, jobs: Sequence[Job], queue: BatchQueue, on_progress: Callable[[int], object] | None
    ) -> list[Translation]:
        """Run the sentences of a buffer, and return its translations in order."""
        self.engine.submit(jobs, queue, attrgetter("lengths"))
        for ready in self.engine.as_ready(jobs):
            if on_progress is not None:
                on_progress(len(ready))
        return [job.future.result() for job in jobs]

    def _generator(self, options: DecodingOptions) -> Generator:
        return Generator(
            self.fast_models,
            options,
            pad_id=PAD_ID,
            eos_id=EOS_ID,
            unk_id=UNK_ID,
            static_search=self.static_search,
        )
