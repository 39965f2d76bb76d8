"""From the windows of an epoch to updates: which batches are one rank's part of each.

There is one global sequence of batches per epoch, the same for any number of ranks. Each update takes the
next world_size * update_freq batches of it; rank r gets every world_size-th of these, from the r-th on. So a
position in the sequence means the same to all ranks, and to a later run with another number of them.

With two ranks and two micro-batches each, for an epoch of 9 batches:

    batches   0 1 2 3 | 4 5 6 7 | 8
    rank 0    0   2   | 4   6   | 8
    rank 1      1   3 |   5   7 | (8)      the filler: a repeated batch, of weight 0
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from nmt.data.batching import cut_by, num_windows, plan_window
from nmt.data.limits import BatchLimits, longest
from nmt.data.order import Indices
from nmt.data.position import Position
from nmt.task import AllSizes


@dataclass(frozen=True)
class Dealing:
    """How batches are cut, and dealt to the ranks."""

    limits: BatchLimits
    rank: int
    world_size: int
    update_freq: int
    """Number of batches per rank and update."""
    split_above: int | None
    """Larger batches are run in parts, see `BatchIterator.split_above`."""


class PlannedUpdate(NamedTuple):
    """The part of one rank in one update."""

    batches: list[Indices]
    weights: list[float]
    """1.0, or 0.0 for a filler."""
    end: Position
    """The position once this update is handed out; the same on all ranks."""


def plan_updates(sizes: AllSizes, position: Position, dealing: Dealing) -> Iterator[PlannedUpdate]:
    """Yield this rank's part of every update from a position to the end of the epoch.

    In an update, the parts of all ranks have the same number of batches. The last update may be smaller.
    """
    group_size = dealing.world_size * dealing.update_freq
    group: list[Indices] = []
    end = position
    for batch, end in plan_batches(sizes, position, dealing.limits):
        group.append(batch)
        if len(group) == group_size:
            yield _deal(sizes, group, end, dealing)
            group = []
    if group:
        yield _deal(sizes, group, end, dealing)


def plan_batches(
    sizes: AllSizes, position: Position, limits: BatchLimits
) -> Iterator[tuple[Indices, Position]]:
    """Yield all ranks' batches from a position to the epoch's end, each with the position after it.

    If the open window was cut with other limits, the rest of it is cut again with these.
    """
    window, cuts, examples_consumed = position.window, position.cuts, position.examples_consumed
    if cuts[-1][0] != limits:
        cuts = (*cuts, (limits, 0))
    for number in range(window.number, num_windows(window.order.num_places, window.size)):
        window = replace(window, number=number)
        *earlier_cuts, (_, num_consumed) = cuts
        for batch in plan_window(sizes, cuts, window=window):
            num_consumed += 1
            examples_consumed += len(batch)
            end = (*earlier_cuts, (limits, num_consumed))
            yield batch, Position(window, end, examples_consumed)
        cuts = ((limits, 0),)


def _deal(sizes: AllSizes, group: list[Indices], end: Position, dealing: Dealing) -> PlannedUpdate:
    """Return this rank's share of the batches of an update, with fillers if other ranks get more."""
    shares = [
        [part for batch in group[rank :: dealing.world_size] for part in _split(sizes, batch, dealing)]
        for rank in range(dealing.world_size)
    ]
    share = shares[dealing.rank]
    num_fillers = max(map(len, shares)) - len(share)
    weights = [1.0] * len(share) + [0.0] * num_fillers
    return PlannedUpdate(share + shares[0][:1] * num_fillers, weights, end)


def _split(sizes: AllSizes, batch: Indices, dealing: Dealing) -> list[Indices]:
    """Cut a batch into parts that fit into the device's memory."""
    if dealing.split_above is None:
        return [batch]
    if dealing.limits.is_packed:
        limits = replace(dealing.limits, max_tokens=dealing.split_above)
        return [batch[part] for part in cut_by(sizes[batch], limits)]
    most = max(1, dealing.split_above // int(longest(sizes[batch]).max()))
    return np.array_split(batch, -(-len(batch) // most))
