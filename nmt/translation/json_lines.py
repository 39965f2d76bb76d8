"""A translation as a line of JSON: the hypotheses, how sure the model is, and whether a person should read it."""

import dataclasses
import json
import math
from collections.abc import Sequence

from nmt.data.vocabulary import Vocabulary
from nmt.translation.alignment import Links
from nmt.translation.quality import find_signals
from nmt.translation.request import Translation


def to_json_line(
    number: int,
    translation: Translation,
    *,
    target_vocabulary: Vocabulary,
    alignments: Sequence[Links] | None = None,
) -> str:
    """Return a line of JSON without its newline.

    Args:
        number: The number of the sentence, from 0; becomes its `id`.
        translation: The translation of the sentence.
        target_vocabulary: Gives the names of the tokens.
        alignments: For each hypothesis, pairs (place in the source, place in the text), from 0.
    """
    hypotheses = []
    for rank, (text, hypothesis) in enumerate(zip(translation.texts, translation.hypotheses, strict=True)):
        record: dict[str, object] = {
            "text": text,
            "score": _finite(hypothesis.score, 6),
            "tokens": [target_vocabulary.tokens[token] for token in hypothesis.tokens],
            "token_scores": [_finite(score, 4) for score in hypothesis.token_scores],
        }
        if alignments is not None:
            record["alignment"] = [list(link) for link in alignments[rank]]
        hypotheses.append(record)
    signals, flags = _judge(translation)
    return json.dumps(
        {
            "id": number,
            "source": translation.source,
            "hypotheses": hypotheses,
            "flags": flags,
            "signals": signals,
        },
        ensure_ascii=False,
    )


def _judge(translation: Translation) -> tuple[dict[str, float] | None, list[str]]:
    """Return the signals and flags of the best hypothesis; none if the line has no hypothesis."""
    flags = ["too_long"] if translation.num_parts > 1 or translation.num_dropped_pieces else []
    if not translation.hypotheses:
        return None, flags
    best = translation.hypotheses[0]
    if best.score == -math.inf:
        return None, [*flags, "no_translation"]
    signals = find_signals(
        translation.source,
        translation.text,
        source_tokens=translation.source_ids.tolist(),
        tokens=best.tokens,
        token_scores=best.token_scores,
    )
    rounded = {name: round(value, 4) for name, value in dataclasses.asdict(signals).items()}
    return rounded, [*flags, *signals.flags]


def _finite(value: float, digits: int) -> float | None:
    """Round a number; None if JSON cannot hold it (infinity, NaN)."""
    return round(value, digits) if math.isfinite(value) else None
