"""Decide which sentences stay in the batch of a search.

Sentences that are done leave the batch when there are enough of them. When nearly all are done, a few others often
go on up to their limit, and a step costs hardly less for few sentences than for many. These stragglers may be
given up; the caller then searches them again, together with those of other batches.

An example of 9 sentences, of which 3 are done (x):

    place      0 1 2 3 4 5 6 7 8
    is done    . x . x . . . . x     6 sentences stay, in the first 6 places
    keep       0 6 2 7 4 5           sentences 6 and 7 move to the free places 1 and 3

Shapes: B sentences in the batch now.
"""

import torch
from torch import Tensor

_DONE_SHARE = 16  # done sentences leave the batch when they are at least 1/16 of it
# Stragglers: at most 1/16 of the sentences are left, and the search has taken twice as many steps as when half of
# them were done.
_STRAGGLING_SHARE = 16
_STRAGGLING_TIMES = 2.0


class Stragglers:
    """Decides when a search gives up the sentences that are left."""

    def __init__(self, num_sentences: int, *, may_be_dropped: bool) -> None:
        """Take the number of sentences at the start, and whether stragglers may be given up at all."""
        self._num_sentences = num_sentences
        self._most = num_sentences // _STRAGGLING_SHARE if may_be_dropped else 0
        self._from_step = float("inf")  # known once half of the sentences are done

    def are_given_up(self, num_left: int, *, step: int) -> bool:
        """Whether the search ends after `step` steps: no sentence is left, or only stragglers are."""
        if 2 * num_left <= self._num_sentences:
            self._from_step = min(self._from_step, _STRAGGLING_TIMES * step)
        return num_left == 0 or (num_left <= self._most and step >= self._from_step)


class Roster:
    """Decides which sentences stay in one search, and when it is over."""

    def __init__(self, num_sentences: int, *, may_drop_stragglers: bool = False) -> None:
        """Begin with all sentences in the batch."""
        self._stragglers = Stragglers(num_sentences, may_be_dropped=may_drop_stragglers)
        self._num_left = num_sentences

    def is_over(self, is_done: Tensor, *, step: int) -> bool:
        """Whether the search ends with this step, given which sentences (B,) are done.

        This is the only read from the device in a step.
        """
        self._num_left = is_done.numel() - int(is_done.sum())
        return self._stragglers.are_given_up(self._num_left, step=step)

    def places_to_keep(self, is_done: Tensor) -> Tensor | None:
        """Return the places (B',) of the sentences that stay in the batch, or None if all do.

        All sentences that are not done stay. Some that are done may stay, too, to make a round number.
        """
        num_sentences = is_done.numel()
        num_done = num_sentences - self._num_left
        num_kept = _round_up(self._num_left)
        if num_done * _DONE_SHARE < num_sentences or num_sentences <= num_kept:
            return None
        return _places_to_keep(is_done, num_kept=num_kept)


def _round_up(num_sentences: int) -> int:
    """Return how many sentences a batch keeps: above 8 a multiple of 8, so that there are few different shapes.

    oneDNN prepares its products for each number of rows, and keeps the prepared products in memory.
    """
    return num_sentences if num_sentences <= 8 else -(-num_sentences // 8) * 8


def _places_to_keep(is_done: Tensor, *, num_kept: int) -> Tensor:
    """Return the places (num_kept,) of all sentences that go on, and of some that are done if there are too few.

    The order moves as few sentences as possible. Those in the first places stay there. The others take the places
    of sentences that are done (the head of this file has an example).
    """
    places = torch.arange(num_kept, device=is_done.device)
    late = (~is_done[num_kept:]).nonzero().squeeze(1) + num_kept
    free = is_done[:num_kept].nonzero().squeeze(1)[: late.numel()]
    places[free] = late
    return places
