"""The reference and the baseline of nmt-generate, read beside its input."""

from __future__ import annotations

import itertools
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from nmt.cli.options import GenerateOptions
from nmt.cli.text_files import STANDARD_INPUT, read_text
from nmt.data.pair_blocks import unequal_counts
from nmt.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nmt.translation.scoring import Comparison, RunningScores
    from nmt.translation.translator import Translation, Translator


class References:
    """Reads both a line at a time, so that memory holds only what the search has read ahead of the output.

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
        self._waiting: deque[tuple[str, NDArray[Any]]] = deque()  # read by the search, not yet by the output
        self._current: list[str] = []
        self._num_texts = 0
        self._num_baseline = 0
        self._shows_ids = options.format == "fairseq"
        self._scores: RunningScores | None = None
        if options.reference is not None and not options.score_reference:
            self._scores = RunningScores(target_lang=translator.task.target_lang)
        self._compared: list[tuple[str, str, str]] = []  # translation, baseline, reference

    def ids(self) -> Iterator[NDArray[Any]]:
        """Yield the ids of each reference, eos at the end, for the search."""
        while (text := self._read()) is not None:
            ids = self._encode(text)
            self._waiting.append((text, ids))
            yield ids

    def as_given(self, translations: Sequence[Translation]) -> list[Translation]:
        """Return translations that were scored with their texts as they stand in the reference."""
        if self._options.input_is_pieces:
            return list(translations)
        texts = itertools.islice(self._waiting, len(translations))
        given = [
            replace(x, texts=[text], is_given=True) if x.hypotheses else x
            for x, (text, _) in zip(translations, texts, strict=False)
        ]
        return [*given, *translations[len(given) :]]  # there may be more lines

    def next_ids(self) -> NDArray[Any] | None:
        """Go on to the reference of the next line; return its ids where the output shows them."""
        if self._waiting:
            text, ids = self._waiting.popleft()
        else:
            read = self._read()
            if read is None:
                return None
            text = read
            if not (self._shows_ids or self._options.input_is_pieces):
                self._current.append(text)
                return None
            ids = self._encode(text)
        if self._options.input_is_pieces:
            text = self._translator.task.target_segmenter.decode([ids])[0]
        self._current.append(text)
        return ids if self._shows_ids else None

    def score(self, translations: Sequence[Translation]) -> None:
        """Score translations against the references that `next_ids` has gone through since the last call."""
        current, self._current = self._current, []
        if self._scores is None:
            return
        best = [translation.text for translation in translations[: len(current)]]  # there may be more lines
        self._scores.add(best, current)
        if self._options.baseline is not None:
            baseline = [text for _, text in zip(current, self._baseline, strict=False)]
            self._num_baseline += len(baseline)
            self._compared += zip(best, baseline, current, strict=False)

    def check_counts(self, num_lines: int) -> None:
        """Raise a `UserError` unless there was one line for each of the input; the rest is read to count it."""
        source = self._options.input or STANDARD_INPUT
        if self._options.reference is not None:
            while self._read() is not None:
                pass
            self._check_count(source, num_lines, self._options.reference, self._num_texts)
        if self._options.baseline is not None:
            num_baseline = self._num_baseline + sum(1 for _ in self._baseline)
            self._check_count(source, num_lines, self._options.baseline, num_baseline)

    def print_scores(self, file: TextIO) -> None:
        """Print what the translations are worth, and whether they differ from the baseline's."""
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

    def _encode(self, text: str) -> NDArray[Any]:
        return self._translator.encode_reference(text, number=self._num_texts)

    @staticmethod
    def _check_count(source: Path, num_lines: int, other: Path, num_others: int) -> None:
        if num_lines != num_others:
            raise unequal_counts(source, num_lines, other, num_others)
        if num_lines == 0:
            raise UserError("The reference must have lines to score against, but is empty. Name another.")


def print_scores(running: RunningScores, *, file: TextIO) -> None:
    """Print scores, and say on stderr if BLEU is too low to be looked at, or if there was nothing to score."""
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
