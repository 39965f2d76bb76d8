"""From the lengths of the examples to batches of their indices, one window of an epoch at a time.

The epoch is cut into windows of, say, 2**20 consecutive places of its order (`nmt/data/order.py`). Each window is
sorted by length and cut into batches, and its batches are shuffled. A window needs nothing from the others, so
only the lengths of its own examples are read. A window of 8 places:

    place                  0 1 2 3 4 5 6 7
    example there          7 2 9 0 5 4 1 8           as the order of the epoch says
    its length             3 9 4 3 8 4 9 3
    sorted by length       7 0 8 9 4 5 2 1           lengths 3 3 3 4 4 8 9 9
    cut, max_tokens 18     [7 0 8 9] [4 5] [2 1]     number of examples * longest length <= 18
    shuffled               [4 5] [2 1] [7 0 8 9]

Legend: N examples of the data set, n examples at hand, C lengths per example (columns: source, target).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nmt.data.limits import BatchLimits, Sizes, longest, too_long
from nmt.data.order import Indices, Order, shuffled
from nmt.task import AllSizes


@dataclass(frozen=True)
class Window:
    """One window of one epoch: the places [number * size, (number + 1) * size) of its order."""

    order: Order
    number: int
    size: int


Cut = tuple[BatchLimits, int]
"""The limits that a window was cut with, and how many of the resulting batches were consumed."""


def plan_window(sizes: AllSizes, cuts: Sequence[Cut], *, window: Window) -> list[Indices]:
    """Return the batches of a window that are still to come.

    A run that is resumed with other limits cuts the rest of its window again. So the history of a window is a list
    of cuts. Each cut takes the examples that the cuts before it have left, and cuts them with its own limits. The
    number of consumed batches tells what it leaves to the next one:

        cut 0 (4,096 tokens, 3 consumed)   [b0] [b1] [b2] | b3   b4   b5
        cut 1 (2,048 tokens, 1 consumed)                  [c0] | c1  c2  c3  c4    of the examples of b3 to b5
        to come                                                  c1  c2  c3  c4

    Args:
        sizes: (N, C) lengths of all examples; only those of the window are read.
        cuts: the history of the window, the current cut last.
        window: which one.

    Returns:
        Index batches in the order of training. Examples beyond the current limits are in no batch. Nor is the last
        batch of an epoch if it has fewer examples than `least` and there is no other batch to join.
    """
    left = window_examples(window)
    batches: list[Indices] = []
    for number, (limits, num_consumed) in enumerate(cuts):
        left_sizes = sizes[left]
        fitting = np.flatnonzero(~too_long(left_sizes, limits))
        cut = cut_by(left_sizes[fitting], limits)
        if len(cut) == 1 and len(cut[0]) < limits.least and len(left) < window.order.num_places:
            cut = []  # there is no other batch for it to join; other epochs have these examples
        random_order = shuffled(len(cut), window.order, window=window.number, cut=number)
        local_batches = [fitting[cut[i]] for i in random_order]
        batches = [left[batch] for batch in local_batches[num_consumed:]]
        is_left = np.ones(len(left), dtype=bool)
        for batch in local_batches[:num_consumed]:
            is_left[batch] = False
        left = left[is_left]
    return batches


def cut_by(sizes: Sizes, limits: BatchLimits) -> list[Indices]:
    """Cut examples into batches: by length, or for packed batches in the order in which they come."""
    if limits.is_packed:
        assert limits.max_tokens is not None
        return cut_packed(sizes, max_tokens=limits.max_tokens, max_sentences=limits.max_sentences)
    return cut_batches(
        sizes,
        max_tokens=limits.max_tokens,
        max_sentences=limits.max_sentences,
        multiple=limits.multiple,
        least=limits.least,
    )


def window_examples(window: Window) -> Indices:
    """Return the indices of the examples of a window, in the order of the epoch: (n,), n <= `window.size`."""
    start = window.number * window.size
    end = max(start, min(start + window.size, window.order.num_places))
    return window.order.examples_at(np.arange(start, end, dtype=np.int64))


def num_windows(num_places: int, window_size: int) -> int:
    """Return how many windows an epoch of `num_places` places has."""
    return -(-num_places // window_size)


def cut_batches(
    sizes: Sizes,
    *,
    max_tokens: int | None,
    max_sentences: int | None = None,
    multiple: int = 8,
    least: int = 1,
) -> list[Indices]:
    """Sort examples by length and cut them greedily into batches.

    They are sorted as `_by_length` says. Each batch takes as many examples as it may: their number times the
    longest length, of any column, is at most `max_tokens`. If more than `multiple` fit, their number is lowered to
    a multiple of it. The last batch may have any number.

    Args:
        sizes: (n, C) lengths. An example longer than `max_tokens` becomes a batch of its own; leave such
            examples out beforehand (`too_long`) where the limit must hold.
        max_tokens: largest padded size of a batch; None: no limit.
        max_sentences: largest number of examples in a batch; None: no limit.
        multiple: the number of examples is a multiple of this where it can be.
        least: a last batch of fewer examples joins the one before it if that has at least so many; both together
            may be beyond the limits.

    Returns:
        Arrays of row numbers of `sizes`, shortest examples first; each row is in exactly one array.
    """
    order = _by_length(sizes)
    lengths = longest(sizes)[order]
    num_examples = len(order)
    counts = np.arange(1, num_examples + 1)
    most = num_examples if max_sentences is None else min(max_sentences, num_examples)
    batches = []
    start = 0
    while start < num_examples:
        fit = min(most, num_examples - start)
        if max_tokens is not None:
            # The length of the first example bounds the number of examples. Among so many, the padded size
            # grows with every example taken.
            fit = max(1, min(fit, max_tokens // max(1, int(lengths[start]))))
            padded = np.maximum.accumulate(lengths[start : start + fit])
            padded *= counts[:fit]
            fit = max(1, int(padded.searchsorted(max_tokens, side="right")))
        if fit > multiple and start + fit < num_examples:
            fit -= fit % multiple
        batches.append(order[start : start + fit])
        start += fit
    if len(batches) > 1 and len(batches[-1]) < least <= len(batches[-2]):
        batches[-2:] = [np.concatenate(batches[-2:])]
    return batches


def _by_length(sizes: Sizes) -> Indices:
    """Return the order of rows by their first column, and within it by the last, upwards and downwards in turn.

        source length    4 4 4 4 | 5 5 5 5 | 6 6 6 6
        target length    9 7 5 3 | 3 5 7 9 | 9 7 5 3

    So a batch that spans two source lengths has similar target lengths: a third less padding than always upwards.
    """
    # Stable sorts of 16 bits count instead of comparing: a fifth of the time of `np.lexsort`.
    dtype = np.int16 if sizes.max(initial=0) < 2**15 else np.int64
    first, last = sizes[:, 0].astype(dtype), sizes[:, -1].astype(dtype)
    order = np.where(first % 2, last, np.negative(last)).argsort(kind="stable")
    return order[first[order].argsort(kind="stable")]


def cut_packed(sizes: Sizes, *, max_tokens: int, max_sentences: int | None) -> list[Indices]:
    """Cut examples, as they come, into batches in which no side has more than `max_tokens` tokens.

    Args:
        sizes: (n, C) lengths, each at most `max_tokens`.
        max_tokens: Most tokens of a batch on any side.
        max_sentences: Most examples of a batch.

    Returns:
        Arrays of consecutive row numbers; each row is in exactly one array.
    """
    ends = np.cumsum(sizes, axis=0, dtype=np.int64)
    batches, start = [], 0
    while start < len(sizes):
        before = ends[start] - sizes[start]
        fits = [
            int(column.searchsorted(first + max_tokens, side="right"))
            for column, first in zip(ends.T, before, strict=True)
        ]
        end = max(start + 1, min(*fits, len(sizes) if max_sentences is None else start + max_sentences))
        batches.append(np.arange(start, end))
        start = end
    return batches


def plan_ordered(sizes: AllSizes, limits: BatchLimits, *, rank: int, world_size: int) -> list[Indices]:
    """Return this rank's share of all examples, in batches by length; nothing is shuffled or left out.

    An example longer than `limits.max_tokens` is a batch of its own, since a validation must see every example.
    """
    return cut_by(sizes[:], limits)[rank::world_size]


def padded_size(sizes: AllSizes, batch: Indices) -> int:
    """Return the number of examples of a batch times its longest length."""
    return len(batch) * int(longest(sizes[batch]).max())
