"""The order of an epoch: which example stands at which of its places.

An order can be asked about any places, in any sequence, and holds nothing as long as the data set. The planning of
batches (`nmt/data/batching.py`) knows nothing else of it: an example may stand at several places, or at none.

Every random choice is a function of (seed, epoch, window). It is taken from raw bits, because NumPy promises not
to change their stream between versions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]

# Two Feistel rounds each. With this number, even the permutations of five elements are equally frequent over keys.
_NUM_ROUND_PAIRS = 8

# First entry of a key, so that the two uses of randomness never share a stream.
_EXAMPLES_KEY, _BATCHES_KEY = 1, 2


class Order(Protocol):
    """The order of one epoch. It never changes."""

    @property
    def seed(self) -> int:
        """Decides the order of all epochs."""

    @property
    def epoch(self) -> int:
        """The number of the epoch, from 1 on."""

    @property
    def num_places(self) -> int:
        """Number of places of this epoch."""

    def examples_at(self, places: Indices, /) -> Indices:
        """Return the indices of the examples at some places: (n,), each in range(num_places) -> (n,)."""


@dataclass(frozen=True)
class Permutation:
    """Each example comes once, in a random order."""

    num_places: int
    seed: int
    epoch: int

    def examples_at(self, places: Indices) -> Indices:
        """Return the indices of the examples at some places: (n,) -> (n,)."""
        return keyed_permutation(places, size=self.num_places, key=(_EXAMPLES_KEY, self.seed, self.epoch))


def shuffled(count: int, order: Order, *, window: int, cut: int) -> Indices:
    """Return range(count) in a random order, for the batches of one cut of a window: (count,)."""
    key = (_BATCHES_KEY, order.seed, order.epoch, window, cut)
    return np.random.Philox(np.random.SeedSequence(key)).random_raw(count).argsort(kind="stable")


def keyed_permutation(indices: Indices, *, size: int, key: Sequence[int]) -> Indices:
    """Evaluate a pseudo-random permutation of range(size) at some indices.

    A Feistel network (Luby and Rackoff 1988) permutes range(N), N the smallest power of two that holds `size` (but
    at least 4). The bits of a number are cut into a high and a low half, and each round changes one half by a
    random table of the other one, which can be undone, so no two numbers ever become the same:

        high --------+------ xor --> high'          two rounds; there are `_NUM_ROUND_PAIRS` such pairs
                     |        |
                   table    table
                     |        |
        low ------- xor ------+----> low'

    An image outside range(size) is permuted again until it is inside (cycle walking, Black and Rogaway 2002). That
    takes under two passes on average. A table holds about sqrt(size) numbers.

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
    while len(outside):  # walks along the cycle of the number, which leads back into the range
        images[outside] = encipher(images[outside])
        outside = outside[images[outside] >= size]
    return images


def _random_tables(random: np.random.Philox, *, from_bits: int, to_bits: int) -> Indices:
    """Draw a random function for each pair of rounds: (pairs, 2**from_bits), numbers of `to_bits` bits."""
    bits = random.random_raw(_NUM_ROUND_PAIRS << from_bits) >> np.uint64(64 - to_bits)
    return bits.astype(np.int64).reshape(_NUM_ROUND_PAIRS, -1)
