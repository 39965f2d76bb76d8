"""From the lengths of the examples to batches of their indices, one window of an epoch at a time.

The order of an epoch is a keyed permutation of all examples that can be evaluated at any index, so that
nothing as long as the data set has to be kept. The epoch is cut into windows of, say, 2**20 consecutive
places of that order. Each window is sorted by length, cut into batches and its batches are shuffled, knowing
nothing of the other windows.

Every random choice is a function of (seed, epoch, window) and is taken from raw bits, whose stream NumPy
promises not to change between versions.

Legend: N examples of the data set, n examples at hand, C lengths per example (columns: source, target).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
Sizes = NDArray[np.integer]

# Two Feistel rounds each. With so many, even permutations of five elements are equally frequent over keys.
_NUM_ROUND_PAIRS = 8

# First entry of every key, so that the two uses of randomness never share a stream.
_ORDER_KEY, _SHUFFLE_KEY = 1, 2


@dataclass(frozen=True)
class BatchLimits:
    """What a batch may hold. Two equal limits cut the same examples into the same batches."""

    max_tokens: int | None
    max_sentences: int | None = None
    multiple: int = 8
    least: int = 1
    """Smallest number of examples in a batch."""
    max_positions: tuple[int, ...] | None = None
    """Largest length per column, or one for all of them: what the model can take."""
    is_packed: bool = False
    """Nothing is padded: `max_tokens` limits the sum of the lengths of each column, and the order stays random."""


@dataclass(frozen=True)
class Window:
    """One window of one epoch: the places [number * size, (number + 1) * size) of the epoch's order."""

    seed: int
    epoch: int
    number: int
    size: int


Cut = tuple[BatchLimits, int]
"""The limits that a window was cut with, and how many of the resulting batches have been consumed."""


def plan_window(sizes: Sizes, cuts: Sequence[Cut], *, window: Window) -> list[Indices]:
    """Return the batches of a window that are still to come.

    A run that is resumed with other limits cuts what is left of its window again. So the history of a window
    is a list of cuts: each takes all that the ones before it have left, and cuts it with its own limits; the
    number of batches consumed of it says what it leaves in turn.

    Args:
        sizes: (N, C) lengths of all examples; only those of the window are read, so it may be a memory map.
        cuts: the history of the window, the current cut last.
        window: which one.

    Returns:
        Index batches in the order of training. Examples beyond the current limits are in none of them, nor are
        fewer than `least` that alone are left of an epoch.
    """
    left = window_examples(window, num_examples=len(sizes))
    batches: list[Indices] = []
    for number, (limits, num_consumed) in enumerate(cuts):
        left_sizes = sizes[left]
        fitting = np.flatnonzero(~too_long(left_sizes, limits))
        cut = cut_by(left_sizes[fitting], limits)
        if len(cut) == 1 and len(cut[0]) < limits.least and len(left) < len(sizes):
            cut = []  # there is nothing that it could go with; other epochs have these examples
        key = (_SHUFFLE_KEY, window.seed, window.epoch, window.number, number)
        local_batches = [fitting[cut[i]] for i in _shuffled(len(cut), key)]
        batches = [left[batch] for batch in local_batches[num_consumed:]]
        is_left = np.ones(len(left), dtype=bool)
        for batch in local_batches[:num_consumed]:
            is_left[batch] = False
        left = left[is_left]
    return batches


def cut_by(sizes: Sizes, limits: BatchLimits) -> list[Indices]:
    """Cut examples into batches: by length, or where batches are packed as the examples come."""
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


def window_examples(window: Window, *, num_examples: int) -> Indices:
    """Return the indices of the examples of a window, in the order of the epoch: (n,), n <= `window.size`."""
    start = window.number * window.size
    places = np.arange(start, max(start, min(start + window.size, num_examples)), dtype=np.int64)
    return keyed_permutation(places, size=num_examples, key=(_ORDER_KEY, window.seed, window.epoch))


def num_windows(num_examples: int, window_size: int) -> int:
    """Return how many windows an epoch has."""
    return -(-num_examples // window_size)


def cut_batches(
    sizes: Sizes,
    *,
    max_tokens: int | None,
    max_sentences: int | None = None,
    multiple: int = 8,
    least: int = 1,
) -> list[Indices]:
    """Sort examples by length and cut them greedily into batches.

    They are sorted by the first column and within it by the last, upwards and downwards in turn. Each batch
    takes as many as it may: its number of examples times its longest length, of any column, is at most
    `max_tokens`. If more than `multiple` fit, their number is cut down to a multiple of it; the last batch is
    kept whatever its size.

    Args:
        sizes: (n, C) lengths. An example longer than `max_tokens` becomes a batch of its own; leave such
            examples out beforehand (`too_long`) where the limit must hold.
        max_tokens: largest padded size of a batch; None: no limit.
        max_sentences: largest number of examples in a batch; None: no limit.
        multiple: which numbers of examples are preferred.
        least: a last batch of fewer examples goes with the one before it, if that may have so many; both together
            may be beyond the limits.

    Returns:
        Arrays of row numbers of `sizes`, shortest examples first; each row is in exactly one.
    """
    # The last key is the first to sort by. The order of targets turns round from one source length to the next,
    # so that a batch which spans two of them holds neighbours: a third less padding than always upwards.
    last = sizes[:, -1].astype(np.int64)
    order = np.lexsort((np.where(sizes[:, 0] % 2, last, -last), sizes[:, 0]))
    lengths = longest(sizes)[order]
    num_examples = len(order)
    counts = np.arange(1, num_examples + 1)
    most = num_examples if max_sentences is None else min(max_sentences, num_examples)
    batches = []
    start = 0
    while start < num_examples:
        fit = min(most, num_examples - start)
        if max_tokens is not None:
            # No batch from here can have more examples than its first one's length allows. Among those,
            # the padded size grows with every example taken.
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


def cut_packed(sizes: Sizes, *, max_tokens: int, max_sentences: int | None) -> list[Indices]:
    """Cut examples, as they come, into batches of which no side has more than `max_tokens` tokens.

    Args:
        sizes: (n, C) lengths, each at most `max_tokens`.
        max_tokens: Most tokens of a batch on any side.
        max_sentences: Most examples of a batch.

    Returns:
        Arrays of consecutive row numbers; each row is in exactly one.
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


def plan_ordered(sizes: Sizes, limits: BatchLimits, *, rank: int, world_size: int) -> list[Indices]:
    """Return this rank's share of all examples, in batches by length: nothing shuffled, nothing left out.

    An example longer than `limits.max_tokens` is a batch of its own, since a validation must see all of them.
    """
    return cut_by(sizes, limits)[rank::world_size]


def longest(sizes: Sizes) -> Indices:
    """Return the longest length of each example: (n, C) -> (n,) int64."""
    columns: Iterator[Sizes] = iter(sizes.T)
    return reduce(np.maximum, columns).astype(np.int64)


def padded_size(sizes: Sizes, batch: Indices) -> int:
    """Return the number of examples of a batch times its longest length."""
    return len(batch) * int(longest(sizes[batch]).max())


def too_long(sizes: Sizes, limits: BatchLimits) -> NDArray[np.bool_]:
    """Return which examples are beyond the limits, True: too long, even alone: (n, C) -> (n,)."""
    result = np.zeros(len(sizes), dtype=bool)
    if limits.max_tokens is not None:
        result |= longest(sizes) > limits.max_tokens
    if limits.max_positions is not None:
        result |= (sizes > np.asarray(limits.max_positions)).any(axis=1)
    return result


def longest_within(sizes: Sizes, limits: BatchLimits, *, block: int = 2**20) -> int:
    """Return the longest length, of any column, of the examples within the limits; 0 if there are none."""
    blocks = (sizes[start : start + block] for start in range(0, len(sizes), block))
    return max(int(longest(block[~too_long(block, limits)]).max(initial=0)) for block in blocks)


def count_too_long(sizes: Sizes, limits: BatchLimits, *, block: int = 2**20) -> int:
    """Count the examples of the whole data set that are beyond the limits, reading a block at a time."""
    return sum(
        int(np.count_nonzero(too_long(sizes[start : start + block], limits)))
        for start in range(0, len(sizes), block)
    )


def keyed_permutation(indices: Indices, *, size: int, key: Sequence[int]) -> Indices:
    """Evaluate a pseudo-random permutation of range(size) at some indices.

    A Feistel network (Luby and Rackoff 1988) with tables of random bits as round functions permutes the
    smallest power of two that holds `size`; what falls outside the range walks on along its cycle until it
    is inside (Black and Rogaway 2002), under two passes on average. A table holds about sqrt(size) numbers.

    Args:
        indices: (n,) int64, each in range(size).
        size: number of elements permuted.
        key: non-negative numbers; another key is another permutation.

    Returns:
        (n,) int64: their images. Over all of range(size) each number comes exactly once.
    """
    num_bits = max(2, (size - 1).bit_length())
    num_low = num_bits // 2
    num_high = num_bits - num_low
    random = np.random.Philox(np.random.SeedSequence(key))
    high_to_low = _random_tables(random, from_bits=num_high, to_bits=num_low)
    low_to_high = _random_tables(random, from_bits=num_low, to_bits=num_high)

    def encipher(values: Indices) -> Indices:
        high, low = values >> num_low, values & ((1 << num_low) - 1)
        for to_low, to_high in zip(high_to_low, low_to_high, strict=True):
            low ^= to_low[high]
            high ^= to_high[low]
        return (high << num_low) | low

    images = encipher(indices)
    outside = np.flatnonzero(images >= size)
    while len(outside):
        images[outside] = encipher(images[outside])
        outside = outside[images[outside] >= size]
    return images


def _random_tables(random: np.random.Philox, *, from_bits: int, to_bits: int) -> Indices:
    """Draw a random function for each pair of rounds: (pairs, 2**from_bits), numbers of `to_bits` bits."""
    bits = random.random_raw(_NUM_ROUND_PAIRS << from_bits) >> np.uint64(64 - to_bits)
    return bits.astype(np.int64).reshape(_NUM_ROUND_PAIRS, -1)


def _shuffled(count: int, key: Sequence[int]) -> Indices:
    """Return range(count) in a random order: (count,) int64."""
    return np.random.Philox(np.random.SeedSequence(key)).random_raw(count).argsort(kind="stable")
