"""Text that a model cannot use: unknown pieces, special symbols, and pieces in place of raw text."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nmt.data.segmenter import PieceSegmenter, Segmenter
from nmt.data.vocabulary import UNK_ID
from nmt.errors import by_number, counted

_LARGE_SHARE = 0.05
_LARGE_SHARE_OF_DATA = 0.1  # the same share as in nmt-preprocess
_SIGNS_OF_PIECES = ("▁", "@@ ")  # SentencePiece's mark of a blank, and subword-nmt's end of a piece


def about_unknown(name: str, shares: tuple[float, float]) -> list[str]:
    """Return a line on the shares of unknown source and target tokens of a split, or none if all are known."""
    if not any(shares):
        return []
    line = "{}: {:.2%} of the source tokens and {:.2%} of the target tokens are <unk>".format(name, *shares)
    if max(shares) <= _LARGE_SHARE_OF_DATA:
        return [line]
    return [
        f"warning: {line}, of which a model learns nothing. Binarise the text again, split into the pieces of the "
        "dictionary, or with a dictionary of its own pieces"
    ]


def about_specials(name: str, num_within: int, num_without_end: int) -> list[str]:
    """Return lines on special symbols of a split: one if they are in wrong places, and one if they are missing.

    fairseq-preprocess makes special symbols from words with the same spelling.
    """
    lines = []
    if num_within:
        stand = by_number(num_within, "special symbol stands", "special symbols stand")
        lines.append(
            f"warning: {name}: {num_within:,} {stand} within sentences (`<s>`, `<pad>`, `</s>`), where a model "
            "takes them for ends and for nothing. Binarise the text again, without words that are spelled so"
        )
    if num_without_end:
        end = by_number(num_without_end, "sentence ends", "sentences end")
        lines.append(
            f"warning: {name}: {num_without_end:,} {end} without `</s>`, by which a model learns to stop. "
            "Binarise the text again, with it"
        )
    return lines


class UnknownPieces:
    """Counts the pieces of a stream of lines, and says at its end what is wrong with them."""

    def __init__(self, segmenter: Segmenter | PieceSegmenter, *, named: str, input_is_pieces: bool) -> None:
        """Begin to count.

        Args:
            segmenter: Splits the lines.
            named: What to call the lines in a warning, such as "input".
            input_is_pieces: Whether the user has said that the lines are in pieces.
        """
        self._has_model = isinstance(segmenter, Segmenter)
        self._named = named
        self._input_is_pieces = input_is_pieces
        self._num_pieces = 0
        self._num_unknown = 0
        self._num_lines = 0
        self._num_in_pieces = 0

    def add(self, line: str, ids: Sequence[int] | NDArray[Any]) -> None:
        """Count the next line and its ids."""
        if not len(ids):
            return
        self._num_lines += 1
        self._num_in_pieces += self._has_model and any(sign in line for sign in _SIGNS_OF_PIECES)
        self._num_pieces += len(ids)
        self._num_unknown += int(np.count_nonzero(np.asarray(ids) == UNK_ID))

    def warnings(self) -> list[str]:
        """Return a line for each thing that is wrong."""
        found = []
        share = self._num_unknown / max(self._num_pieces, 1)
        if share > _LARGE_SHARE:
            if self._has_model:
                remedy = "Is it in the language of the model?"
            elif self._input_is_pieces:
                remedy = "It must be split into the pieces of the model's dictionary, joined by blanks."
            else:
                remedy = (
                    "The model comes without a SentencePiece model: what it reads must be split into pieces as "
                    "its training text was, joined by blanks."
                )
            found.append(f"{share:.1%} of the pieces of the {self._named} are unknown to the model. {remedy}")
        if 2 * self._num_in_pieces > self._num_lines:
            found.append(
                f"{self._num_in_pieces:,} of {counted(self._num_lines, 'line')} of the {self._named} "
                f"{by_number(self._num_in_pieces, 'looks', 'look')} as if split into pieces already, but the "
                "model splits raw text itself. If that is so, say it with `input-is-pieces`."
            )
        return found
