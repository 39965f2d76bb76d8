"""Scores of translations against references, by sacreBLEU, with the signatures that make them comparable."""

from collections.abc import Sequence
from dataclasses import dataclass

from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from nmt.errors import UserError


@dataclass(frozen=True)
class Score:
    """A score of a corpus."""

    name: str
    score: float  # 0 to 100
    signature: str  # what the score depends on: tokenisation, smoothing, version

    def __str__(self) -> str:
        return f"{self.name} {self.score:.2f} | {self.signature}"


def bleu(translations: Sequence[str], references: Sequence[str], *, target_lang: str) -> Score:
    """Return corpus BLEU (Papineni et al., 2002) of raw, detokenised text.

    Args:
        translations: One a line.
        references: As many.
        target_lang: Chooses the tokenisation: sacreBLEU's own for zh, ja and ko, else 13a. What follows the
            language itself is ignored (`zh-Hans`, `zh_CN`).

    Raises:
        UserError: The numbers differ, or the tokenisation needs a package that is not installed.
    """
    _check_counts(translations, references)
    language = target_lang.replace("_", "-").partition("-")[0].lower()
    try:
        metric = BLEU(trg_lang=language)
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"BLEU for `{target_lang}` must have its tokeniser, which is not installed. "
            f'Run pip install "sacrebleu[{language}]".'
        ) from error
    score = metric.corpus_score(list(translations), [list(references)]).score
    return Score("BLEU", score, str(metric.get_signature()))


def chrf(translations: Sequence[str], references: Sequence[str]) -> Score:
    """Return corpus chrF2 (Popović, 2015) of raw, detokenised text.

    Raises:
        UserError: The numbers of translations and references differ.
    """
    _check_counts(translations, references)
    metric = CHRF()
    score = metric.corpus_score(list(translations), [list(references)]).score
    return Score("chrF2", score, str(metric.get_signature()))


def _check_counts(translations: Sequence[str], references: Sequence[str]) -> None:
    if len(translations) != len(references):
        raise UserError(
            "The reference must have as many lines as there are translations, "
            f"but has {len(references):,} for {len(translations):,}."
        )
    if not references:
        raise UserError("The reference must have lines to score against, but is empty.")
