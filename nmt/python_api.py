"""What nmt-preprocess, nmt-average and nmt-score do, from Python. Imports no torch before it is needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nmt.cli.options import AverageOptions
from nmt.config.mapping import check_options, from_mapping
from nmt.data.options import PreprocessOptions
from nmt.errors import UserError, shown

if TYPE_CHECKING:
    from nmt.translation.scoring import Score


def preprocess(
    *,
    source_lang: str,
    target_lang: str,
    destdir: Path | str,
    trainpref: str | None = None,
    validpref: str | None = None,
    testpref: str | None = None,
    sentencepiece_model: Path | str | None = None,
    vocab_size: int = PreprocessOptions.vocab_size,
    model_type: Literal["bpe", "unigram"] = PreprocessOptions.model_type,
    character_coverage: float = PreprocessOptions.character_coverage,
    extra_symbols: Sequence[str] = (),
    normalization: Literal["nmt_nfkc", "nfkc", "identity"] = PreprocessOptions.normalization,
    max_length: int = PreprocessOptions.max_length,
    workers: int = PreprocessOptions.workers,
    overwrite: bool = PreprocessOptions.overwrite,
    log: Callable[[str], object] | None = None,
) -> Path:
    """Make a data directory of raw text, as nmt-preprocess does.

    Args:
        log: Called with each line of the report; nothing is printed without it.
        The others: The options of nmt-preprocess, which `nmt-preprocess --help` explains.

    Returns:
        The data directory.

    Raises:
        UserError: Anything is wrong with the input, the options, or the place of the directory.
    """
    from nmt.data import preprocess as story

    given = {
        "source_lang": source_lang,
        "target_lang": target_lang,
        "destdir": Path(destdir),
        "trainpref": trainpref,
        "validpref": validpref,
        "testpref": testpref,
        "sentencepiece_model": None if sentencepiece_model is None else Path(sentencepiece_model),
        "vocab_size": vocab_size,
        "model_type": model_type,
        "character_coverage": character_coverage,
        "extra_symbols": tuple(extra_symbols),
        "normalization": normalization,
        "max_length": max_length,
        "workers": workers,
        "overwrite": overwrite,
    }
    options = from_mapping(PreprocessOptions, given, where="preprocess")
    story.preprocess(options, log=log or _ignore)
    return options.destdir


def average(
    checkpoints: Path | str,
    output: Path | str,
    *,
    last: int | None = None,
    best: int | None = None,
) -> Path:
    """Write a model folder whose weights are the mean of a run's checkpoints, as nmt-average does.

    Args:
        checkpoints: The folder of a run, or its `checkpoints` folder.
        output: The model folder to write; it must not exist.
        last: Average this many of the newest checkpoints; 5 if neither this nor `best` is given.
        best: Average this many of the best ones instead.

    Returns:
        The model folder.

    Raises:
        UserError: There are fewer checkpoints, or the options contradict each other.
    """
    from nmt.cli.average import average_run

    options = AverageOptions(Path(checkpoints), Path(output), last, best)
    check_options(options)
    average_run(options)
    return options.output


def score(translations: Sequence[str], references: Sequence[str], *, target_lang: str = "") -> list[Score]:
    """Return BLEU, chrF2 and TER of translations, as nmt-score prints them.

    >>> for one in score(["Ein Hund läuft schnell"], ["Ein Hund läuft schnell"]):
    ...     print(f"{one.name} {one.score:.1f}")
    BLEU 100.0
    chrF2 100.0
    TER 0.0

    Args:
        translations: One a line.
        references: As many.
        target_lang: The language of the translations: zh, ja and ko have their own words for BLEU.

    Raises:
        UserError: The numbers of lines differ, there are none, or one string is given instead of a list.
    """
    from nmt.translation.scoring import RunningScores

    for name, lines in (("translations", translations), ("references", references)):
        if isinstance(lines, str):
            raise UserError(f"`{name}` must be a list of lines, but is one string. Put it in a list.")
        if (stranger := next((line for line in lines if not isinstance(line, str)), "")) != "":
            raise UserError(f"`{name}` must be lines of text, but one is {shown(stranger)}.")
    if len(translations) != len(references) or not references:
        raise UserError(
            "`references` must have a line for each translation, and at least one, but there are "
            f"{len(references):,} for {len(translations):,}."
        )
    running = RunningScores(target_lang=target_lang)
    running.add(translations, references)
    return running.scores()


def _ignore(_: str) -> None:
    pass
