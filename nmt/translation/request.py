"""A request to translate one line, and its result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from numpy.typing import NDArray

from nmt.generation.beam_search import Hypothesis


@dataclass(frozen=True)
class Request:
    """A line of text, with everything that concerns only this line."""

    text: str  # without newlines
    prefix: Sequence[int] | NDArray[Any] = ()  # ids that the translation begins with
    reference: str | None = None  # a translation by somebody else; comes back together with ours


@dataclass(frozen=True)
class Translation:
    """A request and its result."""

    request: Request
    texts: list[str]  # of the hypotheses, best first; none for a line without pieces, such as a blank one
    hypotheses: list[Hypothesis]
    source_ids: NDArray[Any]  # (S,) the pieces that were translated, without eos
    num_dropped_pieces: int = 0  # at the end of a source that is too long; they were not translated
    parts: Sequence[str] = ()  # of a source that is too long, if its parts were translated separately
    is_given: bool = False  # the texts were given by a user to be scored, and not made by a model

    @property
    def source(self) -> str:
        """The line to translate."""
        return self.request.text

    @property
    def text(self) -> str:
        """The best translation."""
        return self.texts[0] if self.texts else ""

    @property
    def num_parts(self) -> int:
        """The number of sentences that were translated; there is an eos between their ids."""
        return max(len(self.parts), 1)


class ScoredText(NamedTuple):
    """A translation and how sure the model is of it."""

    text: str
    score: float  # natural log-probability, divided by length ** lenpen
    token_scores: list[float]  # log-probability of each piece, and last that of the end of sentence
