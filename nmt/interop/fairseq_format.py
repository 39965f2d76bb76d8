"""The lines of fairseq-generate: S source, T reference, H hypothesis, D its text, P scores of its tokens.

Columns are separated by tabs. The first column is the letter and the number of the sentence, from 0. Scores are
logarithms to the base 2. They are computed and printed as float32, as in fairseq.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nmt.data.vocabulary import UNK_ID, Vocabulary
from nmt.translation.request import Translation
from nmt.translation.task import TranslationTask

_LN2 = np.float32(math.log(2))
_ESCAPED_UNK = "<<unk>>"  # so that an unknown token of the reference never equals a token of a hypothesis


def to_lines(
    number: int, translation: Translation, *, reference: NDArray[Any] | None, task: TranslationTask
) -> Iterator[str]:
    """Yield the lines of a sentence, best hypothesis first.

    A line without pieces gets one empty hypothesis of probability 1, so that every sentence has an H line.

    Args:
        number: The number of the sentence, from 0.
        translation: The translation of the sentence.
        reference: Ids of the reference, eos at the end; None if there is none.
        task: The vocabularies.
    """
    yield f"S-{number}\t{_join(translation.source_ids, task.source_vocabulary)}"
    if reference is not None:
        yield f"T-{number}\t{_join(reference, task.target_vocabulary, unk=_ESCAPED_UNK)}"
    if not translation.hypotheses:
        yield from (f"H-{number}\t0.0\t", f"D-{number}\t0.0\t", f"P-{number}\t0.0000")
    for hypothesis, text in zip(translation.hypotheses, translation.texts, strict=True):
        score = float(np.float32(hypothesis.score) / _LN2)
        token_scores = np.array(hypothesis.token_scores, dtype=np.float32) / _LN2
        yield f"H-{number}\t{score}\t{_join(hypothesis.tokens, task.target_vocabulary)}"
        yield f"D-{number}\t{score}\t{text}"
        yield f"P-{number}\t{' '.join(f'{x:.4f}' for x in token_scores.tolist())}"


def _join(ids: Sequence[int] | NDArray[Any], vocabulary: Vocabulary, *, unk: str | None = None) -> str:
    """Join tokens by blanks; bos, pad and eos are left out."""
    tokens = vocabulary.tokens
    return " ".join(unk if unk and i == UNK_ID else tokens[i] for i in ids if i >= UNK_ID)
