"""The reference and the baseline of nmt-generate, read beside its input."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from nmt.cli.options import GenerateOptions
from nmt.cli.text_files import STANDARD_INPUT, read_text
from nmt.data.pair_blocks import unequal_counts
from nmt.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nmt.translation.request import Request, Translation
    from nmt.translation.scoring import Comparison, RunningScores
    from nmt.translation.translator import Translator


class References:
    """Gives each line of the input its reference, and scores the translations against the references.

    With a baseline all texts are kept, because a test of the difference needs them together.
    """

    def __init__(
        self, options: GenerateOptions, translator: Translator, baseline: Iterator[str] | None
    ) -> None:
        """Open the reference, and take the translations of the baseline; nothing is read yet."""
        from nmt.translation.scoring import RunningScores

        self._options = options
        self._translator = translator
        self._texts = iter(() if options.reference is None else read_text(options.reference))
        self._baseline = iter(()) if baseline is None else baseline
        self._num_texts = 0
        self._num_baseline = 0
        self._scores: RunningScores | None = None
        if options.reference is not None and not options.score_reference:
            self._scores = RunningScores(target_lang=translator.task.target_lang)
        self._compared: list[tuple[str, str, str]] = []  # translation, baseline, reference

    def requests(self, lines: Iterable[str]) -> Iterator[Request]:
        """Yield each line with its reference, if there is one, and what its translation must begin with."""
        from nmt.translation.request import Request

        size = self._options.prefix_size
        for line in lines:
            text = self._read()
            prefix = self._encode(text, self._num_texts)[:size] if text is not None and size > 0 else ()
            yield Request(line, prefix, text)

    def as_given(self, translation: Translation) -> Translation:
        """Return a scored translation with its text exactly as in the reference."""
        text = translation.request.reference
        if self._options.input_is_pieces or text is None or not translation.hypotheses:
            return translation
        return replace(translation, texts=[text], is_given=True)

    def ids(self, number: int, translation: Translation) -> NDArray[Any] | None:
        """Return the ids of the reference of line `number`, if the output shows them."""
        text, shows_ids = translation.request.reference, self._options.format == "fairseq"
        if text is None or not (shows_ids or self._options.input_is_pieces):
            return None
        ids = self._encode(text, number)  # for pieces, too: a too long one is told before its line
        return ids if shows_ids else None

    def score(self, translations: Sequence[Translation], *, first_line: int) -> None:
        """Score the next translations against their references; references of a stream may end early."""
        if self._scores is None:
            return
        references, best = [], []
        for number, translation in enumerate(translations, start=first_line):
            text = translation.request.reference
            if text is None:
                break
            if self._options.input_is_pieces:
                text = self._translator.task.target_segmenter.decode([self._encode(text, number)])[0]
            references.append(text)
            best.append(translation.text)
        self._scores.add(best, references)
        if self._options.baseline is not None:
            baseline = [text for _, text in zip(references, self._baseline, strict=False)]
            self._num_baseline += len(baseline)
            self._compared += zip(best, baseline, references, strict=False)

    def check_counts(self, num_lines: int) -> None:
        """Raise a `UserError` unless there was one line per line of the input; the rest is read to be counted."""
        source = self._options.input or STANDARD_INPUT
        if self._options.reference is not None:
            while self._read() is not None:
                pass
            self._check_count(source, num_lines, self._options.reference, self._num_texts)
        if self._options.baseline is not None:
            num_baseline = self._num_baseline + sum(1 for _ in self._baseline)
            self._check_count(source, num_lines, self._options.baseline, num_baseline)

    def print_scores(self, file: TextIO) -> None:
        """Print the scores of the translations, and whether they differ from the baseline's."""
        if self._scores is None:
            return
        print_scores(self._scores, file=file)
        if self._options.baseline is not None:
            from nmt.translation.scoring import compare

            translations, baseline, references = zip(*self._compared, strict=True)
            lang = self._translator.task.target_lang
            print_comparison(
                compare(translations, baseline, references, target_lang=lang),
                self._options.baseline,
                file=file,
            )

    def _read(self) -> str | None:
        text = next(self._texts, None)
        self._num_texts += text is not None
        return text

    def _encode(self, text: str, number: int) -> NDArray[Any]:
        return self._translator.encode_reference(text, number=number)

    @staticmethod
    def _check_count(source: Path, num_lines: int, other: Path, num_others: int) -> None:
        if num_lines != num_others:
            raise unequal_counts(source, num_lines, other, num_others)
        if num_lines == 0:
            raise UserError("The reference must have lines to score against, but is empty. Name another.")


def print_scores(running: RunningScores, *, file: TextIO) -> None:
    """Print scores, and say on stderr if BLEU is too low to be useful, or if there was nothing to score."""
    from nmt.translation.scoring import low_bleu_note

    scores = running.scores()
    for score in scores:
        print(score, file=file)
    by_name = {score.name: score.score for score in scores}
    if (nothing := running.nothing_compared()) is not None:
        print(f"warning: {nothing}", file=sys.stderr)
    elif (note := low_bleu_note(by_name["BLEU"], by_name["chrF2"])) is not None:
        print(note, file=sys.stderr)


def print_comparison(comparisons: Sequence[Comparison], baseline: Path, *, file: TextIO) -> None:
    """Print a table of two systems' scores, and what it means."""
    from nmt.translation.scoring import verdict

    print(f"against {baseline}, by paired bootstrap:", file=file)
    for comparison in comparisons:
        print(f"  {comparison}", file=file)
    print(verdict(comparisons), file=file)
