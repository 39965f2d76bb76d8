"""Text in, text out: segmenter, batches by length, search, and the order of the input again."""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Unpack

import numpy as np
import torch
from torch import nn

from nmt.checkpoints.run_folder import load_model
from nmt.data.parallel_dataset import collate_pairs
from nmt.data.segmenter import PieceSegmenter
from nmt.data.vocabulary import EOS_ID, PAD_ID, UNK_ID
from nmt.errors import UserError, shown
from nmt.generation.beam_search import Hypothesis
from nmt.generation.generator import ROWS_AT_ONCE, Generator, TranslationModel
from nmt.generation.options import DecodingKeywords, DecodingOptions
from nmt.generation.static_search import StaticSearch
from nmt.models.inference import InferenceTransformer
from nmt.models.inference_int8 import check_int8
from nmt.models.search_form import search_form
from nmt.models.transformer import Transformer
from nmt.system.allocator import give_back_tensors
from nmt.system.cudnn_attention import leave_out_cudnn_attention
from nmt.system.prepared_shapes import keep_prepared_shapes
from nmt.translation.batch_runner import Batching, BatchRunner, free_memory
from nmt.translation.batch_search import BatchSearch, Scoring, Search
from nmt.translation.mbr import MinimumRisk, candidate_options, pair_scores
from nmt.translation.request import Request, Translation
from nmt.translation.sentences import END, Ids, Line, Lines, TooLong, to_translation
from nmt.translation.task import TranslationTask
from nmt.translation.unknown_pieces import UnknownPieces

Precision = Literal["fp32", "bf16", "int8"]

_TYPES = {"fp32": None, "bf16": torch.bfloat16, "int8": torch.int8}
_ROWS_OF_A_STEP = 1024  # tokens that are encoded at once, or hypotheses
_SHAPES_A_THREAD = 16  # of products in a step of the search: each thread takes batches of its own


class ScoredText(NamedTuple):
    """A translation and how sure the model is of it."""

    text: str
    score: float  # log-probability, natural, divided by length ** lenpen
    token_scores: list[float]  # log-probability of each piece, and at the end of the end of sentence


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
        models: Sequence[Transformer],
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
            input_is_pieces: Sources and references are split into pieces already, joined by blanks.
            precision: Of the weights that search; "fp32" leaves them as they are.
            in_place: Whether to search as is made for GPUs (`StaticSearch`), one batch at a time; on those alone
                if it is left out. Results are the same.

        Raises:
            UserError: There is no such precision, or not on this machine.
        """
        _check_precision(precision, device)
        self.models = models
        dtype = _TYPES[precision]
        forms = [search_form(model, dtype) for model in models]
        self.fast_models = [form.model for form in forms]
        self.remarks = [form.remark for form in forms if form.remark is not None]
        for remark in self.remarks:
            print(f"warning: {remark}", file=sys.stderr)
        if torch.device(device).type == "cuda":
            leave_out_cudnn_attention()
        if torch.device(device).type == "cpu":
            give_back_tensors(above=_largest_of_a_step(self.fast_models))
        self.task = task
        self.device = torch.device(device)
        self.input_is_pieces = input_is_pieces
        if in_place is None:
            in_place = self.device.type == "cuda"
        fast = [model for model in self.fast_models if isinstance(model, InferenceTransformer)]
        can_be_in_place = len(fast) == len(models)  # none is run as it is
        self.static_search = StaticSearch(fast) if in_place and can_be_in_place else None
        # Before a search has taken any of it: batches stay of one size.
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
        """Load a model folder, or several whose probabilities are averaged; see the constructor.

        Raises:
            UserError: A folder is no model folder, is damaged, or holds a model that does not translate; or the
                vocabularies of several differ; or there is no such precision or device.
        """
        keep_prepared_shapes(_SHAPES_A_THREAD * torch.get_num_threads())
        _check_device(device)
        _check_precision(precision, device)  # before weights are read
        paths = [path] if isinstance(path, (str, Path)) else list(path)
        if not paths:
            raise UserError("`path` must name a model folder, but the list is empty. Name one.")
        models, tasks = zip(*(_load(Path(path), device) for path in paths), strict=True)
        for other, other_path in zip(tasks[1:], paths[1:], strict=True):
            if (other.source_vocabulary, other.target_vocabulary) != (
                tasks[0].source_vocabulary,
                tasks[0].target_vocabulary,
            ):
                raise UserError(
                    f"`{other_path}` must have the vocabularies of `{paths[0]}` to translate with it, "
                    "but has others. Take models that were trained on one data directory."
                )
        return cls(
            models,
            tasks[0],
            device=device,
            input_is_pieces=input_is_pieces,
            precision=precision,
            in_place=in_place,
        )

    def translate(self, lines: Sequence[str | Request], **decoding: Unpack[DecodingKeywords]) -> list[str]:
        """Return the best translation of each line; that of a blank line is empty.

        A line that is too long for the model is cut at punctuation, and its parts are translated apart.

        Args:
            lines: Raw text, without newlines; or requests, which say more of a line.
            **decoding: Fields of `DecodingOptions`, such as `beam=5`.

        Raises:
            UserError: An option has a value that makes no sense, or `lines` is one string.

        Warns:
            UserWarning: Many pieces of the lines are unknown to the model, or they look as if they were in pieces
                already; once a call.
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
            too_long: What becomes of a line that is too long for the models.
            on_progress: Called with the number of lines that have just been translated.

        Yields:
            One translation for each line, in the order of the lines.

        Raises:
            UserError: A line is too long, and that is to be an error; or the memory does not suffice for one.
        """
        search = self._search(options)
        runner = self._search_runner(batching or Batching(), options.beam)
        lenpen = 0.0 if options.unnormalized else options.lenpen
        work = _Work(search, runner, lenpen, on_progress or _ignore)
        reader = Lines(self.source_segmenter, longest=self.longest_source, too_long=too_long)
        for requests in _in_buffers(lines, runner.batching.buffer_size):
            yield from self._run(reader.read(requests), work)

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
            requests: One without a reference is scored as if that were empty.
            batching: How to gather lines.
            too_long: "truncate" or "error", as in `translate_lines`; the parts of a reference are not known.
            on_progress: Called with the number of lines that have just been scored.

        Yields:
            For each request its reference as the only hypothesis, in their order.

        Raises:
            UserError: A reference is longer than the models have positions for, or a line is and that is an error.
        """
        assert too_long != "split"
        runner = BatchRunner(batching or Batching(), num_at_once=self._num_at_once())
        work = _Work(Scoring(self.score_ids), runner, 1.0, on_progress or _ignore)
        reader = Lines(self.source_segmenter, longest=self.longest_source, too_long=too_long)
        num_read = 0
        for buffer in _in_buffers(requests, runner.batching.buffer_size):
            targets = [
                END if x.reference is None else self.encode_reference(x.reference, number=number)
                for number, x in enumerate(buffer, start=num_read + 1)
            ]
            yield from self._run(reader.read(buffer, targets), work)
            num_read += len(buffer)

    def score_ids(self, sources: Sequence[Ids], targets: Sequence[Ids]) -> list[list[Hypothesis]]:
        """Score translations of one batch as ids, eos at the end of each side; one hypothesis for each."""
        batch = collate_pairs(list(zip(sources, targets, strict=True))).to(self.device)
        return self._generator(DecodingOptions(), self.models).score(
            batch.source, batch.target_input, batch.target
        )

    def encode_reference(self, line: str, *, number: int) -> Ids:
        """Return the ids of target text, eos at the end; `number` serves to name the line of an error.

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

    def _search_runner(self, batching: Batching, beam_size: int) -> BatchRunner:
        if self.static_search is None:
            return BatchRunner(batching, num_at_once=self._num_at_once(), beam_size=beam_size)
        if self._free_memory is not None:
            batching = batching.fill_in(
                num_bytes=self._free_memory, bytes_of_piece=self.static_search.bytes_of_piece(beam_size)
            )
        return BatchRunner(batching, beam_size=beam_size)

    def _num_at_once(self) -> int:
        # On a CPU each core takes a batch of its own: the steps of a search are too small to be divided among
        # cores without most of them waiting. PyTorch lets go of Python's lock while it computes.
        return torch.get_num_threads() if self.device.type == "cpu" else 1

    def _search(self, options: DecodingOptions) -> Search:
        """Return what finds translations: a search, or a choice among the candidates of one or two."""
        options.check()
        if options.mbr is None:
            return Search([self._generator(options, self.fast_models)], self.device)
        risk = MinimumRisk(
            decode=self.task.target_segmenter.decode,
            pair_scores=pair_scores(options.mbr, target_lang=self.task.target_lang),
            nbest=options.nbest,
        )
        generators = [self._generator(own, self.fast_models) for own in candidate_options(options)]
        return Search(generators, self.device, risk=risk)

    def _generator(self, options: DecodingOptions, models: Sequence[TranslationModel]) -> Generator:
        return Generator(
            models,
            options,
            pad_id=PAD_ID,
            eos_id=EOS_ID,
            unk_id=UNK_ID,
            static_search=self.static_search if models is self.fast_models else None,
        )

    def _run(self, lines: Sequence[Line], work: _Work) -> list[Translation]:
        """Run the sentences of all lines in batches, and put the results into the order of the lines.

        A line without pieces has no result.
        """
        sentences = [sentence for line in lines for sentence in line.sentences]
        firsts = {id(line.sentences[0]) for line in lines if line.sentences}
        work.on_progress(len(lines) - len(firsts))
        found: dict[int, list[Hypothesis]] = {}  # by place among all sentences
        if sentences:
            lengths = np.array([sentence.lengths for sentence in sentences])
            for batch, hypotheses in work.runner.run(
                lengths,
                lambda batch, may_drop: work.search.run(
                    [sentences[i] for i in batch], may_drop_stragglers=may_drop
                ),
            ):
                found.update(zip(batch, hypotheses, strict=True))
                work.on_progress(sum(id(sentences[i]) in firsts for i in batch))
        results = (found[place] for place in range(len(sentences)))
        return [
            to_translation(
                line,
                [next(results) for _ in line.sentences],
                self.task.target_segmenter,
                language=self.task.target_lang,
                lenpen=work.lenpen,
            )
            for line in lines
        ]


@dataclass(frozen=True)
class _Work:
    """What is done to the sentences of a stream of lines."""

    search: BatchSearch
    runner: BatchRunner
    lenpen: float  # of the joined score of parts
    on_progress: Callable[[int], object]


def _in_buffers(lines: Iterable[str | Request], size: int) -> Iterator[list[Request]]:
    remaining = iter(lines)
    while buffer := list(itertools.islice(remaining, size)):
        yield [Request(line) if isinstance(line, str) else line for line in buffer]


def _check_device(device: torch.device | str) -> None:
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise UserError(
            f"`device` must be a device of torch, such as cpu or cuda, but is {shown(device)}."
        ) from error
    num_gpus = torch.cuda.device_count()
    if chosen.type == "cuda" and (chosen.index or 0) >= num_gpus:
        raise UserError(
            f"`device` {chosen} must be a GPU of this machine, but torch finds {num_gpus}. Use `cpu`."
        )
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("`device` mps must be an Apple GPU, but there is none. Use `cpu`.")


def _check_precision(precision: str, device: torch.device | str) -> None:
    if precision not in _TYPES:
        raise UserError(f"`precision` must be fp32, bf16 or int8, but is {precision}.")
    if precision == "int8":
        check_int8(torch.device(device))


def _load(path: Path, device: torch.device | str) -> tuple[Transformer, TranslationTask]:
    loaded: tuple[object, object] = load_model(path, device)
    model, task = loaded
    if not isinstance(model, Transformer) or not isinstance(task, TranslationTask):
        kind = type(model).__name__
        raise UserError(
            f"`{path}` must hold a translation model, but holds a {kind} of another task. Name another."
        )
    return model, task


def _largest_of_a_step(models: Sequence[InferenceTransformer | Transformer]) -> int:
    """Return how many bytes the largest tensor has that each step makes anew, with batches of usual size."""
    sizes = []
    for model in models:
        if isinstance(model, InferenceTransformer):
            plain, itemsize, product_itemsize = (
                model.plain,
                model.dtype.itemsize,
                model.product_dtype.itemsize,
            )
        else:
            plain = model
            itemsize = product_itemsize = model.output_weight.dtype.itemsize
        num_logits = ROWS_AT_ONCE["cpu"] * plain.output_weight.size(0)
        # Those of several models are stacked.
        sizes.append(num_logits * (itemsize if len(models) == 1 else 4 * len(models)))
        widest = max(x.out_features for x in plain.modules() if isinstance(x, nn.Linear))
        memory = 2 * len(plain.decoder.layers) * plain.output_weight.size(1)
        sizes.append(_ROWS_OF_A_STEP * max(widest, memory) * product_itemsize)
    # PyTorch asks for 2 MB more where tensors begin at huge pages, and glibc for a little more.
    return max(sizes) + 2**21 + 2**16


def _ignore(_: int) -> None:
    pass
