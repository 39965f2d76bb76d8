"""Turn requests into sentences of ids for a model. A line that is too long becomes several sentences."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from nmt.data.segmenter import PieceSegmenter, Segmenter
from nmt.data.vocabulary import EOS_ID
from nmt.errors import UserError
from nmt.generation.beam_search import Hypothesis
from nmt.translation.long_sentences import join_hypotheses, join_texts, split_ids, split_to_ids
from nmt.translation.request import Request, Translation

TooLong = Literal["split", "truncate", "error"]
"""What becomes of a line of more pieces than a model has positions for: it is split at punctuation and its parts
are translated separately, or its end is cut off, or it is an error."""

Ids = NDArray[Any]
NOTHING: Ids = np.empty(0, dtype=np.int32)
END: Ids = np.array([EOS_ID], dtype=np.int32)
_MOST_LINES = 2**40


def in_buffers(lines: Iterable[str | Request], size: int) -> Iterator[list[Request]]:
    """Yield a stream in lists of `size` requests."""
    remaining = iter(lines)
    while buffer := list(itertools.islice(remaining, size)):
        yield [Request(line) if isinstance(line, str) else line for line in buffer]


@dataclass(frozen=True)
class Sentence:
    """One item of a batch."""

    source: Ids  # (S,) eos at the end
    target: Ids  # (T,) a forced beginning of the translation; or the whole translation with eos, to be scored
    number: int  # of its line and part; with the seed it determines what is drawn for the sentence
    request: Request  # of the line; a search makes rules for single sentences from it

    @property
    def lengths(self) -> tuple[int, int]:
        """The lengths of both sides."""
        return len(self.source), len(self.target)


@dataclass(frozen=True)
class Line:
    """A request and its sentences: usually one, none if the line has no pieces, or the parts of a long line."""

    request: Request
    ids: Ids  # of all sentences, with eos between the parts but not at the end
    sentences: list[Sentence] = field(default_factory=list)
    num_dropped: int = 0
    texts: Sequence[str] = ()  # of the parts, if the line was split


class Lines:
    """Turns requests into sentences."""

    def __init__(self, segmenter: Segmenter | PieceSegmenter, *, longest: int, too_long: TooLong) -> None:
        """Take the segmenter, and the most pieces of a sentence."""
        self._segmenter = segmenter
        self._longest = longest
        self._too_long = too_long
        self._number = 0  # of the last line, from 1

    def read(self, requests: Sequence[Request], targets: Sequence[Ids] | None = None) -> list[Line]:
        """Turn the next requests into lines.

        Args:
            requests: In the order of their lines.
            targets: Ids of given translations to score, eos at the end; they replace forced beginnings.

        Raises:
            UserError: A line is too long, and that is to be an error.
        """
        ids = self._segmenter.encode([request.text for request in requests])
        if targets is None:
            targets = [np.asarray(x.prefix, dtype=np.int32) if len(x.prefix) else NOTHING for x in requests]
        lines = []
        for request, own, target in zip(requests, ids, targets, strict=True):
            self._number += 1
            lines.append(self._to_line(request, own, target))
        return lines

    def _to_line(self, request: Request, ids: Ids, target: Ids) -> Line:
        longest = self._longest
        if len(ids) <= longest:
            return Line(request, ids, self._sentences(request, [ids], target))
        if self._too_long == "error":
            raise UserError(
                f"Line {self._number} must have at most {longest} pieces, as many as the model takes, but has "
                f"{len(ids)}. Shorten it, or take --too-long split."
            )
        if self._too_long == "truncate":
            kept = ids[:longest]
            return Line(request, kept, self._sentences(request, [kept], target), len(ids) - longest)
        both = split_to_ids(request.text, self._segmenter, limit=longest)
        parts = [part[:longest] for _, part in both]
        return Line(
            request,
            np.concatenate([x for part in parts for x in (part, END)] or [NOTHING])[:-1],
            self._sentences(request, parts, target),
            sum(max(len(part) - longest, 0) for _, part in both),
            [text for text, _ in both],
        )

    def _sentences(self, request: Request, parts: Sequence[Ids], target: Ids) -> list[Sentence]:
        return [
            Sentence(
                np.append(ids, EOS_ID),
                target if part == 0 else NOTHING,  # a forced beginning belongs to the first part
                self._number + part * _MOST_LINES,
                request,
            )
            for part, ids in enumerate(parts)
            if len(ids) > 0
        ]


def to_translation(
    line: Line,
    results: Sequence[list[Hypothesis]],
    segmenter: Segmenter | PieceSegmenter,
    *,
    language: str,
    lenpen: float,
) -> Translation:
    """Put the translation of a line together from the results of its sentences.

    Args:
        line: The line, from `Lines.read`.
        results: Hypotheses of each sentence, best first.
        segmenter: Turns ids into text.
        language: The target language.
        lenpen: Exponent of the length in the joined score of parts.
    """
    if len(results) <= 1:
        hypotheses = results[0] if results else []
        texts = segmenter.decode([hypothesis.tokens for hypothesis in hypotheses])
    else:
        hypotheses = join_hypotheses(results, lenpen=lenpen)
        texts = [
            join_texts(segmenter.decode(split_ids(hypothesis.tokens)), language=language)
            for hypothesis in hypotheses
        ]
    return Translation(line.request, texts, hypotheses, line.ids, line.num_dropped, line.texts)
