"""nmt-score: what translations in files are worth, by a reference or by a model."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from nmt.cli.command import announce_models, run_command
from nmt.cli.options import ScoreOptions
from nmt.cli.text_files import check_parallel, open_output, read_text
from nmt.config import parse_command
from nmt.model_folders import find_models

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nmt.translation.translator import Translator

PROG = "nmt-score"
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
    from nmt.cli.references import print_comparison
    from nmt.translation.scoring import RunningScores, compare

    assert options.reference is not None
    language = options.target_lang or ""
    hypotheses, references = list(read_text(options.hypothesis)), list(read_text(options.reference))
    running = RunningScores(target_lang=language)
    running.add(hypotheses, references)
    for score in running.scores():
        print(score)
    if options.baseline is not None:
        baseline = list(read_text(options.baseline))
        comparisons = compare(hypotheses, baseline, references, target_lang=language)
        print_comparison(comparisons, options.baseline, file=sys.stdout)


def score_by_model(options: ScoreOptions) -> None:
    """Print for each line its log-probability and number of tokens, and the perplexity of all."""
    assert options.input is not None
    import torch

    from nmt.distributed import join_world
    from nmt.translation.batches import Batching
    from nmt.translation.translator import Translator

    if options.num_threads is not None:
        torch.set_num_threads(options.num_threads)
    with join_world(options.device) as world:
        models = announce_models(PROG, find_models(options.model or ""))
        translator = Translator.load(models, world.device, input_is_pieces=options.input_is_pieces)
    total, num_tokens, num_lines, num_blank = 0.0, 0, 0, 0
    with open_output(options.output) as output:
        for scored in translator.score_lines(
            read_text(options.input),
            _ids(translator, options),
            batching=Batching(max_tokens=options.max_tokens),
            too_long="error",
        ):
            num_lines += 1
            if scored.hypotheses:
                token_scores = scored.hypotheses[0].token_scores
                total += sum(token_scores)
                num_tokens += len(token_scores)
                line = f"{sum(token_scores):.4f}\t{len(token_scores)}\n"
            else:
                num_blank += 1
                line = "nan\t0\n"
            output.write(line.encode())
    perplexity = math.exp(-total / num_tokens) if num_tokens else math.nan
    print(
        f"{num_lines:,} lines | {num_blank:,} with a blank source, not scored | {num_tokens:,} tokens | "
        f"log-probability {total:.2f} | perplexity {perplexity:.3f}",
        file=sys.stderr if options.output is None else sys.stdout,
    )


def _ids(translator: Translator, options: ScoreOptions) -> Iterator[NDArray[Any]]:
    for number, line in enumerate(read_text(options.hypothesis), start=1):
        yield translator.encode_reference(line, number=number)


if __name__ == "__main__":
    main()
