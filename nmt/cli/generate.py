"""nmt-generate: translate text with a trained model."""

from __future__ import annotations

import codecs
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO

from nmt.cli.command import run_command
from nmt.cli.options import GenerateOptions
from nmt.config import parse_command
from nmt.data.blocks import check_file, decode_lines, read_lines, unequal_counts
from nmt.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nmt.translation.translator import Translation, Translator

PROG = "nmt-generate"
_DESCRIPTION = "Translate text, a sentence a line, with a trained model; with a reference, score the result."
_STANDARD_INPUT = Path("<stdin>")  # its name in error texts
_LINES_TO_NAME = 5


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with the given arguments, or those of the process."""

    def body() -> None:
        arguments = sys.argv[1:] if argv is None else argv
        generate(parse_command(GenerateOptions, arguments, prog=PROG, description=_DESCRIPTION))

    run_command(PROG, body)


def generate(options: GenerateOptions) -> None:
    """Translate a file, or standard input, and score the result if there is a reference.

    Raises:
        UserError: The texts or the model cannot be used; no output is left then. Or the reference has another
            number of lines than standard input had, which shows at the end: the output is kept.
    """
    references = None if options.reference is None else list(_read(options.reference))
    num_lines = _check_input(options, num_references=None if references is None else len(references))

    # Here, so that --help, a misspelt option and a missing file are answered at once.
    import torch
    from tqdm import tqdm

    from nmt.distributed import join_world
    from nmt.interop.fairseq_format import to_lines
    from nmt.translation.translator import Translator

    if options.num_threads is not None:
        torch.set_num_threads(options.num_threads)
    with join_world(options.device) as world:
        translator = Translator.load(
            options.models,
            world.device,
            input_is_pieces=options.input_is_pieces,
            precision=options.precision,
        )
    target_ids = None
    if references is not None and _needs_ids_of_references(options):
        target_ids = translator.encode_references(references)
    report = _Report()
    best: list[str] = []
    # The bar is for a terminal that shows nothing else.
    hide_bar = not sys.stderr.isatty() or (options.output is None and sys.stdout.isatty())
    with (
        _open_output(options.output) as output,
        tqdm(total=num_lines, unit=" lines", disable=hide_bar) as bar,
    ):
        for number, translation in enumerate(_translate(translator, options, target_ids, bar.update)):
            report.add(translation)
            if references is not None:
                best.append(translation.text)
            if options.format == "fairseq":
                reference = None
                if target_ids is not None and number < len(target_ids):  # standard input may have more lines
                    reference = target_ids[number]
                written = to_lines(number, translation, reference=reference, task=translator.task)
            else:
                missing = [""] * (options.decoding.nbest - len(translation.texts))
                written = iter((*translation.texts, *missing))
            output.writelines(line.encode() + b"\n" for line in written)
    report.print()
    if references is not None and options.reference is not None and report.num_lines != len(references):
        source = options.input or _STANDARD_INPUT
        raise unequal_counts(source, report.num_lines, options.reference, len(references))
    if references is not None and not options.score_reference:
        if options.input_is_pieces and target_ids is not None:
            references = translator.task.target_segmenter.decode(target_ids)
        scores_to = sys.stderr if options.output is None else sys.stdout
        _print_scores(best, references, target_lang=translator.task.target_lang, file=scores_to)


def _needs_ids_of_references(options: GenerateOptions) -> bool:
    """Return whether references are more than text to score against: then they must fit the model."""
    is_used = options.prefix_size > 0 or options.score_reference or options.input_is_pieces
    return is_used or options.format == "fairseq"


def _translate(
    translator: Translator,
    options: GenerateOptions,
    target_ids: Sequence[NDArray[Any]] | None,
    on_progress: Callable[[int], object],
) -> Iterator[Translation]:
    """Translate the input, or score its reference."""
    from nmt.translation.translator import Batching

    lines = _read(options.input)
    batching = Batching(options.buffer_size, options.max_tokens, options.batch_size)
    if options.score_reference and target_ids is not None:
        return translator.score_lines(lines, target_ids, batching=batching, on_progress=on_progress)
    prefixes = None
    if options.prefix_size > 0 and target_ids is not None:
        prefixes = [ids[: options.prefix_size] for ids in target_ids]
    return translator.translate_lines(
        lines, options.decoding, batching=batching, prefixes=prefixes, on_progress=on_progress
    )


class _Report:
    """What a user should know of the translations besides their text, for stderr."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.num_lines = 0
        self.num_blank = 0
        self.cut: list[int] = []
        self.without_score: list[int] = []

    def add(self, translation: Translation) -> None:
        """Take in the next line."""
        self.num_lines += 1
        if not translation.hypotheses:
            self.num_blank += 1
        elif translation.hypotheses[0].score == -math.inf:
            self.without_score.append(self.num_lines)
        if translation.num_dropped_pieces:
            self.cut.append(self.num_lines)

    def print(self) -> None:
        """Print the warnings and a summary."""
        for numbers, fault in (
            (self.cut, "longer than the model takes, so their last pieces were left out"),
            (self.without_score, "no translation, because the model's output is not a number"),
        ):
            if numbers:
                named = ", ".join(f"{number:,}" for number in numbers[:_LINES_TO_NAME])
                more = ", ..." if len(numbers) > _LINES_TO_NAME else ""
                counts = f"{len(numbers):,} of {self.num_lines:,} lines"
                print(f"{PROG}: warning: {counts}: {fault} (line {named}{more})", file=sys.stderr)
        seconds = time.perf_counter() - self.started
        rate = self.num_lines / max(seconds, 1e-9)
        print(
            f"{self.num_lines:,} lines | {self.num_blank:,} blank | {seconds:.1f} s | {rate:,.1f} lines/s",
            file=sys.stderr,
        )


def _check_input(options: GenerateOptions, *, num_references: int | None) -> int | None:
    """Read the input through before the work starts; return its number of lines, None for a stream.

    Raises:
        UserError: It is missing, empty, no UTF-8, or has another number of lines than the reference.
    """
    if options.input is None or (options.input.exists() and not options.input.is_file()):
        return None
    if not options.input.exists():
        raise UserError(f"{options.input} must exist, but there is no such file.")
    num_lines = check_file(options.input).num_lines
    if options.reference is not None and num_references is not None and num_lines != num_references:
        raise unequal_counts(options.input, num_lines, options.reference, num_references)
    return num_lines


def _read(path: Path | None) -> Iterator[str]:
    """Yield the lines of a file, or of standard input, decoded; only a newline ends a line."""
    lines = _standard_input() if path is None else read_lines(path)
    for number, line in enumerate(lines, start=1):
        yield decode_lines(line + b"\n", path or _STANDARD_INPUT, first_line=number)[0]


def _standard_input() -> Iterator[bytes]:
    for number, line in enumerate(sys.stdin.buffer):
        yield (line.removeprefix(codecs.BOM_UTF8) if number == 0 else line).removesuffix(b"\n")


@contextmanager
def _open_output(path: Path | None) -> Iterator[BinaryIO]:
    """Open standard output, or a file that appears under its name when it is complete, or not at all."""
    if path is None:
        yield sys.stdout.buffer
        return
    path = path.resolve()  # so that a symbolic link stays one
    if path.exists() and not path.is_file():  # a pipe or a device
        with path.open("wb") as file:
            yield file
        return
    if not path.parent.is_dir():
        raise UserError(f"`output` must be in a folder that exists, but there is no {path.parent}.")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _print_scores(
    translations: Sequence[str], references: Sequence[str], *, target_lang: str, file: TextIO
) -> None:
    from nmt.translation.scoring import bleu, chrf

    print(bleu(translations, references, target_lang=target_lang), file=file)
    print(chrf(translations, references), file=file)


if __name__ == "__main__":
    main()
