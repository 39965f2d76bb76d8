"""Which sentences of a batch a search still works at.

Those that are done leave the batch when there are enough of them. A few others often go on where nearly all are
done, up to their limit, and a step costs hardly less for few sentences than for many. These stragglers may be
given up, for the caller to search again together with those of other batches.

Shapes: B sentences in the batch now.
"""

import torch
from torch import Tensor

_DONE_SHARE = 16  # done sentences leave the batch when they are at least one in so many
# Stragglers: at most one in so many of the sentences is left, and the search has taken so many times the steps
# after which half of them were done.
_STRAGGLING_SHARE = 16
_STRAGGLING_TIMES = 2.0


class Stragglers:
    """Decides when a search gives up the sentences that are left."""

    def __init__(self, num_sentences: int, *, may_be_dropped: bool) -> None:
        """Take the number of sentences at the start, and whether any may be given up at all."""
        self._num_sentences = num_sentences
        self._most = num_sentences // _STRAGGLING_SHARE if may_be_dropped else 0
        self._from_step = float("inf")  # known once half of the sentences are done

    def are_given_up(self, num_left: int, *, step: int) -> bool:
        """Whether the search ends, because no sentence is left after so many steps, or none worth going on for."""
        if 2 * num_left <= self._num_sentences:
            self._from_step = min(self._from_step, _STRAGGLING_TIMES * step)
        return num_left == 0 or (num_left <= self._most and step >= self._from_step)


class Roster:
    """Keeps account of one search."""

    def __init__(self, num_sentences: int, *, may_drop_stragglers: bool = False) -> None:
        """Begin with all sentences."""
        self._stragglers = Stragglers(num_sentences, may_be_dropped=may_drop_stragglers)
        self._num_left = num_sentences

    def is_over(self, is_done: Tensor, *, step: int) -> bool:
        """Whether the search ends with this step, given which sentences (B,) are done.

        This is the one read from the device in a step.
        """
        self._num_left = is_done.numel() - int(is_done.sum())
        return self._stragglers.are_given_up(self._num_left, step=step)

    def places_to_keep(self, is_done: Tensor) -> Tensor | None:
        """Return the places (B',) of the sentences that stay in the batch, or None if all do.

        All that are not done stay, and of those that are done as many as make their number round.
        """
        num_sentences = is_done.numel()
        num_done = num_sentences - self._num_left
        num_kept = _round_up(self._num_left)
        if num_done * _DONE_SHARE < num_sentences or num_sentences <= num_kept:
            return None
        return _places_to_keep(is_done, num_kept=num_kept)


def _round_up(num_sentences: int) -> int:
    """Return how many sentences a batch keeps: above 8 a multiple of 8, so that few shapes come up.

    oneDNN prepares its products for each number of rows, and keeps what it has prepared.
    """
    return num_sentences if num_sentences <= 8 else -(-num_sentences // 8) * 8


def _places_to_keep(is_done: Tensor, *, num_kept: int) -> Tensor:
    """Return the places (num_kept,) of all sentences that go on, and of others if there are fewer.

    In the order in which the fewest have to move: those in the first places stay there, and the others take the
    places of sentences that are done.
    """
    places = torch.arange(num_kept, device=is_done.device)
    late = (~is_done[num_kept:]).nonzero().squeeze(1) + num_kept
    free = is_done[:num_kept].nonzero().squeeze(1)[: late.numel()]
    places[free] = late
    return places
