"""nmt-score: score translations in files by a reference or by a model."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nmt.checkpoints.find_folder import find_models
from nmt.cli.command import announce_models, run_command
from nmt.cli.options import ScoreOptions
from nmt.cli.text_files import check_parallel, open_output, read_text
from nmt.config.mapping import parse_command
from nmt.data.pair_blocks import unequal_counts
from nmt.errors import UserError, counted

if TYPE_CHECKING:
    from nmt.translation.request import Request

PROG = "nmt-score"
_LINES_TO_GUESS_BY = 1000
_DESCRIPTION = (
    "Score translations: against a reference by BLEU, chrF and TER, and against another system's; "
    "or by the log-probability that a model gives them."
)
_COMMON = ("hypothesis", "reference", "baseline")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with the given arguments, or those of the process."""

    def body() -> None:
        arguments = sys.argv[1:] if argv is None else argv
        options = parse_command(ScoreOptions, arguments, prog=PROG, description=_DESCRIPTION, common=_COMMON)
        check_parallel(options.hypothesis, options.reference, options.baseline, options.input)
        if options.model is None:
            score_by_reference(options)
        else:
            score_by_model(options)

    run_command(PROG, body)


def score_by_reference(options: ScoreOptions) -> None:
    """Print BLEU, chrF and TER, and compare with the baseline if there is one."""
    from nmt.cli.references import print_comparison, print_scores
    from nmt.translation.scoring import RunningScores, compare

    assert options.reference is not None
    from nmt.data.languages import guess_language, is_named_otherwise

    language = options.target_lang or ""
    hypotheses, references = list(read_text(options.hypothesis)), list(read_text(options.reference))
    _check_count(options.hypothesis, len(hypotheses), options.reference, len(references))
    guess = guess_language("".join(references[:_LINES_TO_GUESS_BY]))
    if guess is not None and is_named_otherwise(language, guess):
        print(
            f"{PROG}: warning: the reference looks like `{guess}`, whose words BLEU must know. "
            f"Say so with --target-lang {guess}.",
            file=sys.stderr,
        )
    running = RunningScores(target_lang=language)
    running.add(hypotheses, references)
    print_scores(running, file=sys.stdout)
    if options.baseline is not None:
        baseline = list(read_text(options.baseline))
        _check_count(options.hypothesis, len(hypotheses), options.baseline, len(baseline))
        comparisons = compare(hypotheses, baseline, references, target_lang=language)
        print_comparison(comparisons, options.baseline, file=sys.stdout)


def score_by_model(options: ScoreOptions) -> None:
    """Print for each line its log-probability and number of tokens, and the perplexity of all."""
    assert options.input is not None
    import torch

    from nmt.distributed import join_world
    from nmt.translation.batch_runner import Batching
    from nmt.translation.translator import Translator
    from nmt.translation.unknown_pieces import UnknownPieces

    if options.num_threads is not None:
        torch.set_num_threads(options.num_threads)
    with join_world(options.device) as world:
        models = announce_models(PROG, find_models(options.model or ""))
        translator = Translator.load(models, world.device, input_is_pieces=options.input_is_pieces)
    total, num_tokens, num_lines, num_blank = 0.0, 0, 0, 0
    hypotheses = _Counted(read_text(options.hypothesis))
    is_pieces = options.input_is_pieces
    source = UnknownPieces(translator.source_segmenter, named="input", input_is_pieces=is_pieces)
    target = UnknownPieces(translator.target_segmenter, named="hypothesis", input_is_pieces=is_pieces)
    with open_output(options.output) as output:
        for scored in translator.score_lines(
            _requests(read_text(options.input), hypotheses),
            batching=Batching(max_tokens=options.max_tokens),
            too_long="error",
        ):
            num_lines += 1
            source.add(scored.source, scored.source_ids)
            if scored.hypotheses:
                target.add(scored.text, scored.hypotheses[0].tokens)
                token_scores = scored.hypotheses[0].token_scores
                total += sum(token_scores)
                num_tokens += len(token_scores)
                line = f"{sum(token_scores):.4f}\t{len(token_scores)}\n"
            else:
                num_blank += 1
                line = "nan\t0\n"
            output.write(line.encode())
        # A pipe can be read only once, so its length is known only at the end.
        _check_count(options.input, num_lines, options.hypothesis, hypotheses.count_all())
    for warning in (*source.warnings(), *target.warnings()):
        print(f"{PROG}: warning: {warning}", file=sys.stderr)
    perplexity = math.exp(-total / num_tokens) if num_tokens else math.nan
    print(
        f"{counted(num_lines, 'line')} | {num_blank:,} with a blank source, not scored | "
        f"{counted(num_tokens, 'token')} | "
        f"log-probability {total:.2f} | perplexity {perplexity:.3f}",
        file=sys.stderr if options.output is None else sys.stdout,
    )


class _Counted:
    """Counts the lines that are read from a stream."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = enumerate(lines, start=1)
        self._count = 0

    def __iter__(self) -> Iterator[str]:
        for number, line in self._lines:
            self._count = number
            yield line

    def count_all(self) -> int:
        """Read the rest of the lines, and return the number of all."""
        return max(self._count, *(number for number, _ in self._lines), 0)


def _requests(lines: Iterator[str], hypotheses: _Counted) -> Iterator[Request]:
    """Yield each line with the translation that is to be scored; there may be more lines."""
    from nmt.translation.request import Request

    texts = iter(hypotheses)
    for line in lines:
        yield Request(line, reference=next(texts, None))


def _check_count(first: Path, num_first: int, second: Path, num_second: int) -> None:
    """Raise `UserError` unless two texts have the same number of lines, at least one."""
    if num_first != num_second:
        raise unequal_counts(first, num_first, second, num_second)
    if num_first == 0:
        raise UserError(f"{first} must hold one sentence per line, but is empty. Name another.")


if __name__ == "__main__":
    main()
