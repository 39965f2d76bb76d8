"""The options of decoding; torch is not imported here."""

import math
from dataclasses import dataclass
from typing import TypedDict

from nmt.errors import UserError


class DecodingKeywords(TypedDict, total=False):
    """The fields of `DecodingOptions`, for the types of functions that take them by name."""

    beam: int
    nbest: int
    lenpen: float
    unnormalized: bool
    min_len: int
    max_len_a: float
    max_len_b: int
    unkpen: float
    temperature: float
    no_repeat_ngram_size: int


@dataclass(frozen=True)
class DecodingOptions:
    """How translations are searched for. Names and meanings are fairseq's."""

    beam: int = 5
    """Number of hypotheses that are kept for a sentence at each step; 1 is greedy search."""
    nbest: int = 1
    """Number of hypotheses that are returned for a sentence, best first."""
    lenpen: float = 1.0
    """A score is (sum of log-probabilities) / length ** lenpen: more than 1 favours long translations."""
    unnormalized: bool = False
    """Rank by the plain sum of log-probabilities, without a length penalty."""
    min_len: int = 1
    """Fewest tokens before the end of sentence; a sentence's length limit goes before it."""
    max_len_a: float = 2.0
    """A translation has at most max-len-a * (source pieces + 1) + max-len-b tokens."""
    max_len_b: int = 10
    """See max-len-a."""
    unkpen: float = 0.0
    """Subtracted from the log-probability of the unknown token."""
    temperature: float = 1.0
    """Divides the logits: above 1 flattens the distribution, below 1 sharpens it."""
    no_repeat_ngram_size: int = 0
    """No run of this many tokens comes twice in a translation; 0 for no such rule."""

    def check(self) -> None:
        """Raise a `UserError` for the first value that makes no sense."""
        _require(self.beam >= 1, "beam", "at least 1", self.beam)
        _require(1 <= self.nbest <= self.beam, "nbest", f"from 1 to beam ({self.beam})", self.nbest)
        _require(math.isfinite(self.lenpen), "lenpen", "a finite number", self.lenpen)
        _require(
            not self.unnormalized or self.lenpen == 1.0, "lenpen", "left out with unnormalized", self.lenpen
        )
        _require(self.min_len >= 0, "min-len", "at least 0", self.min_len)
        _require(
            math.isfinite(self.max_len_a) and self.max_len_a >= 0, "max-len-a", "at least 0", self.max_len_a
        )
        _require(self.max_len_b >= 0, "max-len-b", "at least 0", self.max_len_b)
        _require(math.isfinite(self.unkpen), "unkpen", "a finite number", self.unkpen)
        in_range = math.isfinite(self.temperature) and self.temperature > 0
        _require(in_range, "temperature", "above 0", self.temperature)
        size = self.no_repeat_ngram_size
        _require(size >= 0, "no-repeat-ngram-size", "at least 0", size)


def _require(holds: bool, name: str, rule: str, value: object) -> None:
    if not holds:
        raise UserError(f"`{name}` must be {rule}, but is {value}.")
