"""What is asked for one sentence, and what became of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from numpy.typing import NDArray

from nmt.generation.beam_search import Hypothesis


@dataclass(frozen=True)
class Request:
    """A line of text, with all that concerns it alone."""

    text: str  # without newlines
    prefix: Sequence[int] | NDArray[Any] = ()  # ids that the translation begins with
    reference: str | None = None  # how somebody else has translated it; it comes back with the translation


@dataclass(frozen=True)
class Translation:
    """A request and what became of it."""

    request: Request
    texts: list[str]  # of the hypotheses, best first; none for a line without pieces, such as a blank one
    hypotheses: list[Hypothesis]
    source_ids: NDArray[Any]  # (S,) the pieces that were translated, without eos
    num_dropped_pieces: int = 0  # at the end of a source that is too long: they were not translated
    parts: Sequence[str] = ()  # of a source that is too long: they were translated apart; none if it was not
    is_given: bool = False  # the texts are as a user has given them to be scored, not as a model spells them

    @property
    def source(self) -> str:
        """The line that was to be translated."""
        return self.request.text

    @property
    def text(self) -> str:
        """The best translation."""
        return self.texts[0] if self.texts else ""

    @property
    def num_parts(self) -> int:
        """How many sentences were translated; eos stands between their ids."""
        return max(len(self.parts), 1)


class ScoredText(NamedTuple):
    """A translation and how sure the model is of it."""

    text: str
    score: float  # log-probability, natural, divided by length ** lenpen
    token_scores: list[float]  # log-probability of each piece, and at the end of the end of sentence
