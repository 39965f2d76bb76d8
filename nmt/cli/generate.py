"""nmt-generate: translate text with a trained model."""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nmt.checkpoints.find_folder import FoundModel, find_model, find_models
from nmt.cli.command import run_command
from nmt.cli.options import GenerateOptions
from nmt.cli.references import References
from nmt.cli.text_files import check_parallel, open_output, read_text
from nmt.config.mapping import parse_command
from nmt.data.vocabulary import EOS_ID
from nmt.errors import UserError, counted

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from nmt.translation.alignment import Links
    from nmt.translation.batch_runner import Batching
    from nmt.translation.request import Request, Translation
    from nmt.translation.translator import Translator

PROG = "nmt-generate"
_DESCRIPTION = "Translate text, a sentence a line, with a trained model; with a reference, score the result."
_COMMON = (
    "model",
    "input",
    "output",
    "reference",
    "beam",
    "nbest",
    "lenpen",
    "format",
    "device",
    "precision",
)
_LINES_TO_NAME = 5
_BUFFER_SIZE = 10_000


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with the given arguments, or those of the process."""

    def body() -> None:
        arguments = sys.argv[1:] if argv is None else argv
        generate(
            parse_command(GenerateOptions, arguments, prog=PROG, description=_DESCRIPTION, common=_COMMON)
        )

    run_command(PROG, body)


def generate(options: GenerateOptions) -> None:
    """Translate a file, or standard input, and score the result if there is a reference.

    Memory holds only `buffer_size` lines; with a baseline, all translations.

    Raises:
        UserError: The texts or the model cannot be used; then no output is left. Or the reference or the baseline
            has another number of lines than a stream, which is known only at the end; then the output is kept.
    """
    translated = None if options.baseline_is_model else options.baseline
    num_lines = check_parallel(options.input, options.reference, translated)
    models = find_models(options.model)

    # Imported here, so that --help, a misspelt option and a missing file are answered at once.
    import torch
    from tqdm import tqdm

    from nmt.distributed import join_world
    from nmt.translation.alignment import check_layer
    from nmt.translation.attention_plot import check_plotting
    from nmt.translation.batch_runner import Batching
    from nmt.translation.translator import Translator

    if options.num_threads is not None:
        torch.set_num_threads(options.num_threads)
    with join_world(options.device) as world:
        translator = Translator.load(
            [model.folder for model in models],
            world.device,
            input_is_pieces=options.input_is_pieces,
            precision=options.precision,
        )
    if options.plot_attention is not None:
        check_plotting()
        _make_folder(options.plot_attention)
    if options.print_alignment or options.plot_attention is not None:
        check_layer(translator, options.alignment_layer)
    batching = Batching(_buffer_size(options), options.max_tokens, options.batch_size)
    lines = read_text(options.input)
    baseline = None if translated is None else read_text(translated)
    if options.baseline_is_model:
        lines, again = itertools.tee(lines)  # both are read in step, so that `tee` holds only one buffer
        baseline = _translate_by_baseline(again, options, world.device, batching)
    references = References(options, translator, baseline)
    report = _Report(models, translator, options)
    # The progress bar needs a terminal on which nothing else is printed.
    hide_bar = not sys.stderr.isatty() or (options.output is None and sys.stdout.isatty())
    with (
        open_output(options.output) as output,
        tqdm(total=num_lines, unit=" lines", disable=hide_bar) as bar,
    ):
        translations = _translate(translator, references.requests(lines), options, batching, bar.update)
        for chunk in _chunks(translations, batching.buffer_size):
            if options.score_reference:
                chunk = [references.as_given(translation) for translation in chunk]
            links = _align(translator, chunk, options)
            _plot(translator, chunk, options, first=report.num_lines)
            first_line = report.num_lines + 1
            for translation, alignments in zip(chunk, links, strict=True):
                ids = references.ids(report.num_lines + 1, translation)
                for line in _to_lines(report.num_lines, translation, ids, alignments, options, translator):
                    output.write(line.encode() + b"\n")
                report.add(translation)
            output.flush()  # if somebody waits for each line, a chunk is one line
            references.score(chunk, first_line=first_line)
    report.print()
    references.check_counts(report.num_lines)
    references.print_scores(file=sys.stderr if options.output is None else sys.stdout)


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(
            f"`plot-attention` must be a folder, or new, but {path}, or what it lies in, is a file. Name another."
        ) from None


def _buffer_size(options: GenerateOptions) -> int:
    is_typed = options.input is None and sys.stdin.isatty()
    return options.buffer_size or (1 if is_typed else _BUFFER_SIZE)


def _chunks(translations: Iterator[Translation], size: int) -> Iterator[list[Translation]]:
    while chunk := list(itertools.islice(translations, size)):
        yield chunk


def _to_lines(
    number: int,
    translation: Translation,
    reference: NDArray[Any] | None,
    alignments: Sequence[Links] | None,
    options: GenerateOptions,
    translator: Translator,
) -> Iterator[str]:
    """Return the lines of a translation in the wanted format."""
    from nmt.interop.fairseq_format import to_lines
    from nmt.translation.alignment import to_pharaoh
    from nmt.translation.json_lines import to_json_line

    vocabulary = translator.task.target_vocabulary

    if options.format == "fairseq":
        yield from to_lines(number, translation, reference=reference, task=translator.task)
        yield from (f"A-{number}\t{to_pharaoh(links)}" for links in alignments or ())
    elif options.format == "jsonl":
        yield to_json_line(number, translation, target_vocabulary=vocabulary, alignments=alignments)
    else:
        texts = translation.texts + [""] * (options.decoding.nbest - len(translation.texts))
        if alignments is not None:
            links_of_all = [*alignments, *([[]] * (len(texts) - len(alignments)))]
            texts = [f"{x} ||| {to_pharaoh(links)}" for x, links in zip(texts, links_of_all, strict=True)]
        yield from texts


def _align(
    translator: Translator, translations: Sequence[Translation], options: GenerateOptions
) -> Iterable[list[Links] | None]:
    """Return the links of each hypothesis of each line, or None for each line if they are not wanted."""
    from nmt.translation.alignment import align

    if not options.print_alignment:
        return [None] * len(translations)
    return align(translator, translations, layer=options.alignment_layer)


def _plot(
    translator: Translator, translations: Sequence[Translation], options: GenerateOptions, *, first: int
) -> None:
    """Draw the best hypothesis of each line to `plot-attention`/<number of the line, from 1>.png."""
    if options.plot_attention is None:
        return
    from nmt.translation.alignment import attention
    from nmt.translation.attention_plot import plot_attention

    source_tokens = translator.task.source_vocabulary.tokens
    target_tokens = translator.task.target_vocabulary.tokens
    for number, x in enumerate(translations, start=first + 1):
        if not x.hypotheses or not x.hypotheses[0].tokens:
            continue
        pair = (x.source_ids, x.hypotheses[0].tokens)
        (weights,) = attention(translator, [pair], layer=options.alignment_layer)
        source = [source_tokens[index] for index in (*x.source_ids, EOS_ID)]
        target = [target_tokens[index] for index in x.hypotheses[0].tokens]
        path = options.plot_attention / f"{number:06}.png"
        plot_attention(path, weights, source, target, title=f"line {number:,}")


def _translate(
    translator: Translator,
    requests: Iterable[Request],
    options: GenerateOptions,
    batching: Batching,
    on_progress: Callable[[int], object],
) -> Iterator[Translation]:
    """Translate the input, or score its reference."""
    if options.score_reference:
        return translator.score_lines(
            requests,
            batching=batching,
            too_long="error" if options.too_long == "error" else "truncate",
            on_progress=on_progress,
        )
    return translator.translate_lines(
        requests,
        options.decoding,
        batching=batching,
        too_long=options.too_long,
        on_progress=on_progress,
    )


def _translate_by_baseline(
    lines: Iterable[str], options: GenerateOptions, device: torch.device, batching: Batching
) -> Iterator[str]:
    """Translate with the baseline's model and the same options, except those for ensembles."""
    from nmt.translation.translator import Translator

    assert options.baseline is not None
    translator = Translator.load(find_model(options.baseline).folder, device, precision=options.precision)
    decoding = replace(options.decoding, nbest=1, ensemble_by="probabilities", ensemble_weights=())
    translations = translator.translate_lines(lines, decoding, batching=batching, too_long=options.too_long)
    return (translation.text for translation in translations)


class _Lines:
    """The number of lines with a fault, and the first of them."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[int] = []

    def add(self, number: int) -> None:
        """Take in the number of the next line with the fault."""
        self.count += 1
        if self.count <= _LINES_TO_NAME:
            self.first.append(number)

    def __str__(self) -> str:
        named = ", ".join(f"{number:,}" for number in self.first)
        return f"line {named}" + (", ..." if self.count > len(self.first) else "")


class _Report:
    """The report on the translations for stderr: what a user should know besides their text."""

    def __init__(
        self, models: Sequence[FoundModel], translator: Translator, options: GenerateOptions
    ) -> None:
        from nmt.translation.unknown_pieces import UnknownPieces

        self.models = models
        self.decoding = options.decoding
        self.started = time.perf_counter()
        is_pieces = options.input_is_pieces
        self.source = UnknownPieces(translator.source_segmenter, named="input", input_is_pieces=is_pieces)
        self.target = UnknownPieces(translator.target_segmenter, named="reference", input_is_pieces=is_pieces)
        self.has_references = options.score_reference
        self.num_lines = 0
        self.num_blank = 0
        self.split = _Lines()
        self.cut = _Lines()
        self.cut_prefix = _Lines()
        self.without_score = _Lines()

    def add(self, translation: Translation) -> None:
        """Take in the next line."""
        self.num_lines += 1
        prefix_length = sum(token != EOS_ID for token in translation.request.prefix)
        if translation.hypotheses and len(translation.hypotheses[0].tokens) < prefix_length:
            self.cut_prefix.add(self.num_lines)
        self.source.add(translation.source, translation.source_ids)
        if self.has_references and translation.hypotheses:
            self.target.add(translation.text, translation.hypotheses[0].tokens)
        if not translation.hypotheses:
            self.num_blank += 1
        elif translation.hypotheses[0].score == -math.inf:
            self.without_score.add(self.num_lines)
        if translation.num_parts > 1:
            self.split.add(self.num_lines)
        if translation.num_dropped_pieces:
            self.cut.add(self.num_lines)

    def print(self) -> None:
        """Print the warnings and a summary."""
        for lines, fault in (
            (self.split, "longer than the model takes, so they were split and their parts translated apart"),
            (self.cut, "longer than the model takes, so their last pieces were left out"),
            (
                self.cut_prefix,
                "the prefix is longer than the limit of `max-len-a` and `max-len-b`, so it was cut",
            ),
            (self.without_score, f"no translation, because {self._why_without_score()}"),
        ):
            if lines.count:
                counts = f"{lines.count:,} of {counted(self.num_lines, 'line')}"
                print(f"{PROG}: warning: {counts}: {fault} ({lines})", file=sys.stderr)
        for warning in (*self.source.warnings(), *self.target.warnings()):
            print(f"{PROG}: warning: {warning}", file=sys.stderr)
        self._print_summary()

    def _why_without_score(self) -> str:
        size = self.decoding.no_repeat_ngram_size
        if size > 0:
            return (
                f"`no-repeat-ngram-size` {size} leaves no token that may come next before `min-len` "
                f"{self.decoding.min_len}; lower one of them"
            )
        return "the model's output is not a number"

    def _print_summary(self) -> None:
        seconds = time.perf_counter() - self.started
        rate = self.num_lines / max(seconds, 1e-9)
        lines = counted(self.num_lines, "line")
        summary = f"{lines} | {self.num_blank:,} blank | {seconds:.1f} s | {rate:,.1f} lines/s"
        # In the same line, since a user who names a run may want to know which of its models has translated.
        notes = [f" | model: {model.note}" for model in self.models if model.note is not None]
        print(summary + "".join(notes), file=sys.stderr)


if __name__ == "__main__":
    main()
