"""Find the translations that a person should read: signals that need no reference, and flags.

The larger a signal is, the more suspicious is the line, so that lines can be sorted by it. A flag is raised if a
signal passes its limit. docs/decoding.md says how well signals find bad lines, and `scripts/rank_bad_lines.py`
measures it on other data.
"""

import itertools
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

_UNSURE = 1.2  # nats a token: in the geometric mean, the model gave its tokens a probability of 30%
_LENGTH_SLACK = 5  # tokens, because a short sentence may easily become twice as long
_STRANGE_LENGTH = math.log(1.8)
_REPEATED = 0.2  # of the bigrams
_COPIED = 0.5  # of the words
_FEWEST_COPIED_WORDS = 3  # shorter texts do not count, because it is right to copy names and numbers
_NUMBER = re.compile(r"\d(?:[\d.,:'\u00a0\u202f]*\d)?")
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Signals:
    """Signals that a translation may be bad, each from 0 (no suspicion) upwards."""

    low_confidence: float  # mean negative log-probability of a token, nats
    strange_length: float  # how far the ratio of tokens is from 1, as |log|, softened for short sentences
    repetition: float  # share of token bigrams that came before, minus that share in the source: 0 to 1
    copied_source: float  # share of the words that are in the source, if there are three or more: 0 to 1
    missing_number: float  # how many of the source's numbers in digits the translation lacks

    @property
    def flags(self) -> list[str]:
        """The names of the signals that pass their limit."""
        raised = {
            "low_confidence": self.low_confidence > _UNSURE,
            "strange_length": self.strange_length > _STRANGE_LENGTH,
            "repetition": self.repetition > _REPEATED,
            "copied_source": self.copied_source > _COPIED,
            "missing_number": self.missing_number > 0,
        }
        return [name for name, is_raised in raised.items() if is_raised]


def find_signals(
    source: str,
    text: str,
    *,
    source_tokens: Sequence[Hashable],
    tokens: Sequence[Hashable],
    token_scores: Sequence[float],
) -> Signals:
    """Return the signals of a translation, without a reference.

    Args:
        source: The sentence.
        text: Its translation.
        source_tokens: The sentence in pieces, or their ids.
        tokens: The translation in pieces, or their ids.
        token_scores: Log-probabilities of the tokens, that of the end of sentence included.
    """
    return Signals(
        low_confidence=-sum(token_scores) / max(len(token_scores), 1),
        strange_length=abs(math.log((len(tokens) + _LENGTH_SLACK) / (len(source_tokens) + _LENGTH_SLACK))),
        repetition=max(repeated_share(tokens) - repeated_share(source_tokens), 0.0),
        copied_source=copied_share(source, text),
        missing_number=float(num_missing_numbers(source, text)),
    )


def repeated_share(tokens: Sequence[Hashable]) -> float:
    """Return the share of the bigrams that have come before in the sequence."""
    bigrams = list(itertools.pairwise(tokens))
    return 1.0 - len(set(bigrams)) / len(bigrams) if bigrams else 0.0


def copied_share(source: str, text: str) -> float:
    """Return the share of a text's words that the source also has; 0 if fewer than three words are without digits.

    Case and punctuation do not count.
    """
    own = [word for word in _WORD.findall(text.casefold()) if not any(map(str.isdigit, word))]
    if len(own) < _FEWEST_COPIED_WORDS:
        return 0.0
    others = set(_WORD.findall(source.casefold()))
    return sum(word in others for word in own) / len(own)


def num_missing_numbers(source: str, text: str) -> int:
    """Return how many of the source's numbers in digits are missing in the text.

    Marks within a number do not count (1,000 is 1.000), and neither does the script of its digits. A number that
    the translation spells out counts as missing.
    """
    return sum((Counter(_numbers(source)) - Counter(_numbers(text))).values())


def _numbers(text: str) -> list[str]:
    return [
        "".join(str(unicodedata.digit(x, "")) for x in number if x.isdecimal())
        for number in _NUMBER.findall(text)
    ]
