"""Scores of translations against references, by sacreBLEU, with the signatures that make them comparable."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sacrebleu.metrics.base import Metric
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.metrics.ter import TER
from sacrebleu.significance import PairedTest, Result

from nmt.data.languages import has_own_writing, is_written_without_blanks, language_of
from nmt.data.text import is_blank
from nmt.errors import UserError, counted

_SIGNIFICANT = 0.05
# In words of the longer side. The time of TER grows with the third power of it. At this length a line takes up to
# four seconds, if all words are in another order; at 900 words half a minute.
LONGEST_TER_LINE = 150
_LOW_BLEU = 1.0
_OWN_TOKENIZERS = ("zh", "ja", "ko")  # of sacreBLEU


@dataclass(frozen=True)
class Score:
    """A score of a corpus."""

    name: str
    score: float  # 0 to 100, and more for TER
    signature: str  # what the score depends on: tokenisation, smoothing, version
    num_left_out: int = 0  # lines that are too long for TER

    def __str__(self) -> str:
        return f"{self.name} {self.score:.2f} | {self.signature}{_describe_left_out(self.num_left_out)}"


@dataclass(frozen=True)
class Comparison:
    """A score of two systems on one test set, and whether their difference may be chance."""

    name: str
    baseline: float
    score: float
    p_value: float  # two-sided, from a paired bootstrap
    signature: str
    num_left_out: int = 0  # lines that are too long for TER

    @property
    def is_significant(self) -> bool:
        """Whether chance alone would give such a large difference in less than 5% of cases."""
        # For two equal systems sacreBLEU's p-value is the lowest possible, so equal scores are treated here.
        return self.score != self.baseline and self.p_value < _SIGNIFICANT

    @property
    def is_better(self) -> bool:
        """Whether the second system's score is better; a lower TER is better, because it counts errors."""
        return self.score < self.baseline if self.name == "TER" else self.score > self.baseline

    def __str__(self) -> str:
        if self.score == self.baseline:
            verdict = "no difference"
        elif not self.is_significant:
            verdict = f"p = {self.p_value:.3f}: may well be chance"
        else:
            verdict = f"p = {self.p_value:.3f}: {'better' if self.is_better else 'worse'}"
        change = f"{self.baseline:.2f} -> {self.score:.2f} ({self.score - self.baseline:+.2f})"
        return f"{self.name} {change}, {verdict} | {self.signature}{_describe_left_out(self.num_left_out)}"


class RunningScores:
    """BLEU, chrF and TER of a corpus that comes in parts; only sums of statistics are kept.

    Lines of more than `LONGEST_TER_LINE` words are left out of TER, and counted.
    """

    def __init__(self, *, target_lang: str) -> None:
        """Choose the tokenisation, as `bleu` does."""
        self.num_lines = 0
        self._has_text = {"translations": False, "references": False}
        self._num_left_out = 0
        self._metrics = list(_metrics(target_lang).values())
        self._sums: list[Any] = [None for _ in self._metrics]

    def add(self, translations: Sequence[str], references: Sequence[str]) -> None:
        """Add some lines and their references."""
        assert len(translations) == len(references)
        if not translations:
            return
        self.num_lines += len(translations)
        for side, lines in (("translations", translations), ("references", references)):
            self._has_text[side] |= not all(map(is_blank, lines))
        for index, metric in enumerate(self._metrics):
            texts = [list(translations), list(references)]
            if isinstance(metric, TER):
                texts = _short_lines(metric, *texts)
                self._num_left_out += len(translations) - len(texts[0])
                if not texts[0]:
                    continue
            # sacreBLEU's bootstrap uses the same two methods; a test compares them with `corpus_score`.
            statistics = np.array(metric._extract_corpus_statistics(texts[0], [texts[1]])).sum(axis=0)
            sums = self._sums[index]
            self._sums[index] = statistics if sums is None else sums + statistics

    def nothing_compared(self) -> str | None:
        """Return a line of text if one side is empty, because its score of 0 then says nothing about a system."""
        blank = [side for side, has_text in self._has_text.items() if not has_text]
        if not blank or not self.num_lines:
            return None
        return f"nothing was compared: all {self.num_lines:,} {' and '.join(blank)} are blank"

    def scores(self) -> list[Score]:
        """Return the scores of all lines so far, at least one; without TER if all are too long for it."""
        results = []
        for metric, sums in zip(self._metrics, self._sums, strict=True):
            if sums is not None:
                result = metric._compute_score_from_stats(sums.tolist())
                num_left_out = self._num_left_out if isinstance(metric, TER) else 0
                results.append(Score(result.name, result.score, str(metric.get_signature()), num_left_out))
        return results


def low_bleu_note(bleu: float, chrf: float) -> str | None:
    """Return a line of text if BLEU, which counts four words in a row, is too low to compare systems."""
    if bleu >= _LOW_BLEU:
        return None
    return f"BLEU is below 1 and tells little: chrF is the number to look at, {chrf:.1f} here"


def bleu(translations: Sequence[str], references: Sequence[str], *, target_lang: str) -> Score:
    """Return corpus BLEU (Papineni et al., 2002) of raw, detokenised text.

    Args:
        translations: One a line.
        references: As many.
        target_lang: Chooses the tokenisation: sacreBLEU's own for Chinese, Japanese and Korean, characters for
            other languages that are written without blanks, else 13a. All kinds of codes work (`zh-Hans`,
            `zho_Hans`, `cmn`).

    Raises:
        UserError: The numbers differ, or the tokenisation needs a package that is not installed.
    """
    return _corpus_score(_bleu_metric(target_lang), translations, references)


def bleu_tokenizer(target_lang: str) -> Callable[[str], str]:
    """Return the tokenisation of `bleu`, which puts blanks between words; it raises the same errors."""
    tokenizer: Callable[[str], str] = _bleu_metric(target_lang).tokenizer
    return tokenizer


def chrf(translations: Sequence[str], references: Sequence[str]) -> Score:
    """Return corpus chrF2 (Popović, 2015) of raw, detokenised text.

    Raises:
        UserError: The numbers of translations and references differ.
    """
    return _corpus_score(CHRF(), translations, references)


def ter(translations: Sequence[str], references: Sequence[str], *, target_lang: str) -> Score:
    """Return corpus TER (Snover et al., 2006): edits for 100 words of the reference; lower is better.

    Characters are words in Chinese and Japanese.

    Raises:
        UserError: The numbers of translations and references differ.
    """
    return _corpus_score(_ter_metric(target_lang), translations, references)


def sentence_chrf(translations: Sequence[str], references: Sequence[str]) -> list[float]:
    """Return chrF2 of each line by itself, 0 to 100.

    Raises:
        UserError: The numbers of translations and references differ.
    """
    _check_counts(translations, references)
    metric = CHRF()
    return [
        metric.sentence_score(translation, [reference]).score
        for translation, reference in zip(translations, references, strict=True)
    ]


def compare(
    translations: Sequence[str], baseline: Sequence[str], references: Sequence[str], *, target_lang: str
) -> list[Comparison]:
    """Compare two systems by sacreBLEU's paired bootstrap resampling (Koehn, 2004).

    It keeps the statistics of all its 1,000 resamples in memory: about 80 kB a line.

    Args:
        translations: One a line.
        baseline: Those of the other system.
        references: As many.
        target_lang: As for `bleu`.

    Returns:
        BLEU, chrF2 and TER; TER only for lines that are short enough for it, if there are any.

    Raises:
        UserError: The numbers of lines differ, or a tokeniser is missing.
    """
    _check_counts(translations, references)
    _check_counts(baseline, references)
    metrics = _metrics(target_lang)
    ter = metrics["TER"]
    texts = [list(baseline), list(translations), list(references)]
    short = _short_lines(ter, *texts)
    if len(short[0]) == len(texts[0]):
        return _compare(metrics, *texts, num_left_out=0)
    del metrics["TER"]
    comparisons = _compare(metrics, *texts, num_left_out=0)
    if short[0]:
        comparisons += _compare({"TER": ter}, *short, num_left_out=len(texts[0]) - len(short[0]))
    return comparisons


def _compare(
    metrics: dict[str, Metric],
    baseline: list[str],
    translations: list[str],
    references: list[str],
    *,
    num_left_out: int,
) -> list[Comparison]:
    systems: list[tuple[str, Sequence[str]]] = [("baseline", baseline), ("this", translations)]
    signatures, results = PairedTest(systems, metrics, [references], test_type="bs")()
    comparisons = []
    for name in metrics:
        before, after = results[name]
        assert isinstance(before, Result) and isinstance(after, Result) and after.p_value is not None
        scores = float(before.score), float(after.score)
        signature = str(signatures[name])
        comparisons.append(Comparison(name, *scores, after.p_value, signature, num_left_out))
    return comparisons


def _short_lines(metric: Any, *texts: list[str]) -> list[list[str]]:
    """Return parallel texts without the lines that are too long for TER in any of the texts."""

    def is_short(line: str) -> bool:
        # A line has no more words than characters, so few lines need to be split into words.
        return (
            len(line) <= LONGEST_TER_LINE or len(metric._preprocess_segment(line).split()) <= LONGEST_TER_LINE
        )

    kept = [lines for lines in zip(*texts, strict=True) if all(map(is_short, lines))]
    return [[lines[i] for lines in kept] for i in range(len(texts))]


def _describe_left_out(num_left_out: int) -> str:
    if not num_left_out:
        return ""
    return f" | without {counted(num_left_out, 'line')} of more than {LONGEST_TER_LINE} words"


def verdict(comparisons: Sequence[Comparison]) -> str:
    """Return a sentence that says what a comparison means."""
    significant = [x for x in comparisons if x.is_significant]
    names = ", ".join(x.name for x in significant)
    if all(x.score == x.baseline for x in comparisons):
        return "The two are equal."
    if not significant:
        return (
            "The difference means nothing: another test set of this size could as well turn it round "
            f"(p >= {_SIGNIFICANT} by every score)."
        )
    if len({x.is_better for x in significant}) == 2:
        return f"The scores contradict each other ({names}): read some lines of both."
    word = "better" if significant[0].is_better else "worse"
    if len(significant) == len(comparisons):
        return (
            f"{word.capitalize()} than the baseline, and not by chance (p < {_SIGNIFICANT} by every score)."
        )
    others = ", ".join(x.name for x in comparisons if not x.is_significant)
    return (
        f"{word.capitalize()} than the baseline by {names} (p < {_SIGNIFICANT}); "
        f"{others} cannot tell them apart."
    )


def _metrics(target_lang: str) -> dict[str, Metric]:
    return {"BLEU": _bleu_metric(target_lang), "chrF2": CHRF(), "TER": _ter_metric(target_lang)}


def _ter_metric(target_lang: str) -> TER:
    has_no_blanks = language_of(target_lang) in ("zh", "ja") and has_own_writing(target_lang)
    return TER(normalized=has_no_blanks, asian_support=has_no_blanks)


def _bleu_metric(target_lang: str) -> BLEU:
    language = language_of(target_lang)
    if not has_own_writing(target_lang):
        return BLEU()
    if language not in _OWN_TOKENIZERS and is_written_without_blanks(target_lang):
        return BLEU(tokenize="char")
    try:
        return BLEU(trg_lang=language)
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"BLEU for `{target_lang}` must have its tokeniser, which is not installed. "
            f'Run pip install "sacrebleu[{language}]".'
        ) from error


def _corpus_score(metric: Any, translations: Sequence[str], references: Sequence[str]) -> Score:
    _check_counts(translations, references)
    result = metric.corpus_score(list(translations), [list(references)])
    return Score(result.name, result.score, str(metric.get_signature()))


def _check_counts(translations: Sequence[str], references: Sequence[str]) -> None:
    if len(translations) != len(references):
        raise UserError(
            "The reference must have as many lines as there are translations, "
            f"but has {len(references):,} for {len(translations):,}. Give one for each."
        )
    if not references:
        raise UserError("The reference must have lines to score against, but is empty. Name another.")
