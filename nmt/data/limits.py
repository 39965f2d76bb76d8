"""What a batch may hold, and which examples of a data set fit. The data set is read a block at a time.

Legend: N examples of the data set, n examples at hand, C lengths per example (columns: source, target).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nmt.data.options import BatchingOptions
from nmt.data.order import Indices
from nmt.task import AllSizes

Sizes = NDArray[np.integer]
"""(n, C) lengths of examples at hand."""

_BLOCK = 2**16  # examples whose lengths are in memory at a time: they stay in the processor's cache


@dataclass(frozen=True)
class BatchLimits:
    """What a batch may hold. Two equal limits cut the same examples into the same batches."""

    max_tokens: int | None
    max_sentences: int | None = None
    multiple: int = 8
    least: int = 1
    """Smallest number of examples in a batch."""
    is_packed: bool = False
    """Without padding: `max_tokens` limits the sum of the lengths of each column, and the order stays random."""

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "BatchLimits":
        """Restore limits from `dataclasses.asdict`. Older checkpoints lack some fields, and have one more."""
        return cls(
            max_tokens=fields["max_tokens"],
            max_sentences=fields["max_sentences"],
            multiple=fields["multiple"],
            least=fields.get("least", 1),
            is_packed=fields.get("is_packed", False),
        )


class Survey(NamedTuple):
    """What remains of a data set under limits."""

    num_too_long: int
    """Number of examples beyond the limits."""
    longest: int
    """The longest length, of any column, of the other examples; 0 if there are none."""
    sums: list[int]
    """The sum of each column over the other examples, such as source and target tokens."""


def batch_limits(options: BatchingOptions) -> BatchLimits:
    """Return the limits that the options set."""
    assert options.max_tokens != "auto", "find it first (nmt/run/memory_probe.py)"
    can_have_least = options.batch_size is None or options.batch_size >= options.min_batch_size
    return BatchLimits(
        max_tokens=options.max_tokens,
        max_sentences=options.batch_size,
        multiple=options.required_batch_size_multiple,
        least=options.min_batch_size if can_have_least else 1,
    )


def survey(sizes: AllSizes, limits: BatchLimits, *, block: int = _BLOCK) -> Survey:
    """Look at the lengths of all examples once."""
    num_too_long, most, sums = 0, 0, np.zeros(sizes.shape[1], dtype=np.int64)
    for part in size_blocks(sizes, block=block):
        is_too_long = too_long(part, limits)
        num_too_long += int(np.count_nonzero(is_too_long))
        within = part[~is_too_long] if is_too_long.any() else part
        most = max(most, int(within.max(initial=0)))
        sums += within.sum(axis=0, dtype=np.int64)
    return Survey(num_too_long, most, sums.tolist())


def are_all_equal(sizes: AllSizes) -> bool:
    """Return whether all examples have the same lengths."""
    first = sizes[:1]
    return all(bool((part == first).all()) for part in size_blocks(sizes))


def size_blocks(sizes: AllSizes, *, block: int = _BLOCK) -> Iterator[Sizes]:
    """Yield the lengths of all examples, a block at a time."""
    for start in range(0, len(sizes), block):
        yield sizes[start : start + block]


def longest(sizes: Sizes) -> Indices:
    """Return the longest length of each example: (n, C) -> (n,) int64."""
    columns: Iterator[Sizes] = iter(sizes.T)
    return reduce(np.maximum, columns).astype(np.int64)


def too_long(sizes: Sizes, limits: BatchLimits) -> NDArray[np.bool_]:
    """Return which examples are too long even for a batch of their own (True): (n, C) -> (n,)."""
    if limits.max_tokens is None:
        return np.zeros(len(sizes), dtype=bool)
    return np.asarray(longest(sizes) > limits.max_tokens)
