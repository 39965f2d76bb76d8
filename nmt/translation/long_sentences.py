"""Sentences that are too long for a model: cut into parts, translated separately, and joined."""

import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from nmt.data.languages import is_written_without_blanks
from nmt.data.segmenter import PieceSegmenter, Segmenter
from nmt.data.vocabulary import EOS_ID
from nmt.generation.beam_search import Hypothesis

# Where to cut, best places first: after a sentence, after a clause, after a phrase, at white space. The marks of
# Chinese, Japanese, Khmer, Burmese and Tibetan need no blank after them.
_CUTS = (
    re.compile(r"(?<=[.!?…।॥؟۔።])[\"'”’»)\]]*\s+|(?<=[。！？｡．។။།])"),
    re.compile(r"(?<=[;:؛፤])\s+|\s+[–—]\s*|(?<=[；：])"),
    re.compile(r"(?<=[,،፣])\s+|(?<=[，、､၊])"),
    re.compile(r"\s+"),
)


def split_to_ids(
    text: str, segmenter: Segmenter | PieceSegmenter, *, limit: int
) -> list[tuple[str, NDArray[np.int32]]]:
    """Cut a text that is too long for a model into parts, each with its ids. Parts without pieces are left out.

    Args:
        text: One line.
        segmenter: Turns text into ids.
        limit: Most ids of a part; only a part of a single character may have more.
    """
    texts = split_text(text, limit=limit, count_pieces=lambda part: len(segmenter.encode([part])[0]))
    return [(part, ids) for part, ids in zip(texts, segmenter.encode(texts), strict=True) if len(ids)]


def split_text(text: str, *, limit: int, count_pieces: Callable[[str], int]) -> list[str]:
    """Cut a text into parts that fit a model, at punctuation if possible.

    A text that is too long is cut in two, at the best kind of place in it, as near to the middle as possible.
    Parts that are still too long are cut again.

    Args:
        text: One line.
        limit: Most pieces of a part, at least 1.
        count_pieces: Counts the pieces of a text.

    Returns:
        The parts, none of them blank, without the white space between them. A part is longer than `limit` only
        if it is a single character.
    """
    text = text.strip()
    if len(text) <= 1 or count_pieces(text) <= limit:
        return [text] if text else []
    left, right = _halves(text)
    return [
        *split_text(left, limit=limit, count_pieces=count_pieces),
        *split_text(right, limit=limit, count_pieces=count_pieces),
    ]


def _halves(text: str) -> tuple[str, str]:
    middle = len(text) / 2
    for cut in _CUTS:
        ends = [match.end() for match in cut.finditer(text) if 0 < match.end() < len(text)]
        if ends:
            end = min(ends, key=lambda place: abs(place - middle))
            return text[:end], text[end:]
    return text[: len(text) // 2], text[len(text) // 2 :]


def join_texts(texts: Sequence[str], *, language: str) -> str:
    """Join the translations of the parts, by blanks if the language uses them."""
    return joiner(language).join(text for text in texts if text)


def joiner(language: str) -> str:
    """Return the text between two sentences of a language: a blank, or nothing."""
    return "" if is_written_without_blanks(language) else " "


def join_hypotheses(parts: Sequence[Sequence[Hypothesis]], *, lenpen: float) -> list[Hypothesis]:
    """Join the best hypotheses of all parts, then the second best, and so on.

    Args:
        parts: For each part at least one hypothesis. A part with fewer hypotheses than another repeats its last.
        lenpen: The exponent of the length in a score.

    Returns:
        As many hypotheses as the part with the most has, best first. A joined hypothesis has eos between its
        parts, so that every token has a score. The score of the hypothesis counts all tokens.
    """
    joined = []
    for rank in range(max(map(len, parts))):
        chosen = [part[min(rank, len(part) - 1)] for part in parts]
        tokens = [token for x in chosen for token in (*x.tokens, EOS_ID)][:-1]
        token_scores = [score for x in chosen for score in x.token_scores]
        score = sum(token_scores) / len(token_scores) ** lenpen
        joined.append(Hypothesis(tokens=tokens, score=score, token_scores=token_scores))
    return joined


def split_ids(ids: Sequence[int]) -> Iterator[list[int]]:
    """Yield the parts of ids that were joined by eos."""
    array = np.asarray(ids, dtype=np.int64)
    for part in np.split(array, np.flatnonzero(array == EOS_ID)):
        yield part[part != EOS_ID].tolist()
