"""Packed batches: sentences one after another in one row, without padding between them; all rows have one size.

With one shape, one recording (`nmt/system/cuda_graphs.py`) or one compiled program serves all updates on a GPU.
The rest of a row after its last sentence is filled with parts that count for nothing:

    row     [ sentence 0 | sentence 1 | ... | sentence B-1 | filler | filler ]     L tokens
    part      0            1                  B-1            B        B+1          the parts up to P-1 are empty

Legend: B sentences, L tokens of a row, P parts of a row: its sentences, then those that fill it, then empty ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nmt.data.batching import cut_packed
from nmt.data.limits import BatchLimits, batch_limits, longest
from nmt.data.options import BatchingOptions
from nmt.data.parallel_dataset import Pair, PairSizes, ParallelDataset
from nmt.data.vocabulary import EOS_ID, PAD_ID
from nmt.task import AllSizes

MOST_PARTS = 65_535
"""Most parts of a row: CUDA starts no more programs along the axis on which PyTorch's attention puts them."""
_TOKENS_OF_A_FILLER = 256
_NUM_SAMPLED = 2**16  # examples, to estimate how long sentences are
_NUM_ROWS = 7  # of `PackedTranslationBatch.content`, before the tables
_BLOCK = 128  # tokens that one program of a kernel works on (`nmt/models/packed_kernels.py`)


@dataclass(frozen=True)
class PackedShape:
    """The shape that all packed batches of a run have."""

    length: int
    """L: tokens of a row on either side. Sentences may take fewer, since each filler needs at least one."""
    num_parts: int
    """P."""
    longest: int
    """Most tokens of a part."""

    @property
    def num_items(self) -> int:
        """I: most blocks that a row of this length can have on one side, see `_make_items`.

        Two neighbouring groups together have more than a block of tokens on one side. So there are at most
        4L / 128 + 1 groups. A long part is a group that is cut into one more block for each 128 tokens.
        """
        return -(-5 * self.length // _BLOCK) + 2

    @classmethod
    def of(cls, *, max_tokens: int, max_sentences: int, longest: int) -> Self:
        """Return the shape for at most `max_tokens` a side, `max_sentences`, and `longest` tokens a sentence."""
        num_fillers = _num_fillers(max_tokens)
        length = -(-(max_tokens + num_fillers) // 64) * 64  # GPUs multiply in tiles of 64
        return cls(length, max_sentences + num_fillers, max(longest, -(-length // num_fillers)))


def most_sentences(max_tokens: int) -> int:
    """Return how many sentences a row of `max_tokens` may hold at most, of any length."""
    return MOST_PARTS - _num_fillers(max_tokens)


def packed_limits(options: BatchingOptions, sizes: AllSizes) -> BatchLimits:
    """Return what a packed batch may hold.

    The number of examples is always limited, since the tensors must have room for them: a quarter more than a
    sample of the data lets expect.

    Args:
        options: `max_tokens` is a number.
        sizes: (N, C) lengths of all examples.
    """
    limits = batch_limits(options)
    assert limits.max_tokens is not None
    sample = np.linspace(0, len(sizes) - 1, min(len(sizes), _NUM_SAMPLED)).astype(np.int64)
    lengths = longest(sizes[sample])
    mean = (
        float(lengths[lengths <= limits.max_tokens].mean()) if (lengths <= limits.max_tokens).any() else 1.0
    )
    room = min(int(1.25 * limits.max_tokens / mean) + 8, most_sentences(limits.max_tokens))
    most = room if limits.max_sentences is None else min(room, limits.max_sentences)
    return replace(limits, max_sentences=most, is_packed=True)


def _num_fillers(max_tokens: int) -> int:
    return max(8, min(-(-max_tokens // _TOKENS_OF_A_FILLER), MOST_PARTS // 2))


@dataclass(frozen=True)
class PackedTranslationBatch:
    """Sentence pairs in a source row and a target row; part i of one belongs to part i of the other.

    Everything is in one tensor, so that one copy takes it to another process or to a device.
    """

    content: Tensor
    """(7L + 2(P+1) + 12I,) int32."""
    shape: PackedShape
    num_examples: int
    """B."""
    num_targets: int
    """Number of target tokens to be predicted: eos included, padding not."""

    @property
    def source(self) -> Tensor:
        """(L,) int32 token ids; each sentence ends with eos, fillers are padding."""
        return self._row(0)

    @property
    def source_positions(self) -> Tensor:
        """(L,) int32: the place of each token in its part, from 0."""
        return self._row(1)

    @property
    def target_input(self) -> Tensor:
        """(L,) int32: what the decoder reads, each sentence shifted right by one and begun with eos."""
        return self._row(2)

    @property
    def target(self) -> Tensor:
        """(L,) int32: the tokens to be predicted; padding where there is none."""
        return self._row(3)

    @property
    def target_positions(self) -> Tensor:
        """(L,) int32, as for the source."""
        return self._row(4)

    @property
    def source_parts(self) -> Tensor:
        """(L,) int32: the number of each token's part."""
        return self._row(5)

    @property
    def target_parts(self) -> Tensor:
        """(L,) int32, as for the source."""
        return self._row(6)

    @property
    def source_starts(self) -> Tensor:
        """(P+1,) int32: where each part begins, and the end of the last one, which is L."""
        return self._starts(0)

    @property
    def target_starts(self) -> Tensor:
        """(P+1,) int32, as for the source."""
        return self._starts(1)

    @property
    def source_items(self) -> Tensor:
        """(I, 6) int32: blocks of the source for kernels, see `_make_items`."""
        return self._items(0)

    @property
    def target_items(self) -> Tensor:
        """(I, 6) int32: blocks of the target."""
        return self._items(1)

    def to(self, device: torch.device | str) -> Self:
        """Copy to a device, without waiting for the copy if it is from pinned memory."""
        return self._replace(self.content.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """Copy to page-locked memory."""
        return self._replace(self.content.pin_memory())

    def clone(self) -> Self:
        """Copy on its device."""
        return self._replace(self.content.clone())

    def copy_(self, other: "PackedTranslationBatch") -> None:
        """Copy the tensors of another batch of the same shape. The counts stay, since they are on the host."""
        assert other.shape == self.shape, (other.shape, self.shape)
        self.content.copy_(other.content, non_blocking=True)

    def _replace(self, content: Tensor) -> Self:
        return type(self)(content, self.shape, self.num_examples, self.num_targets)

    def _row(self, number: int) -> Tensor:
        length = self.shape.length
        return self.content[number * length : (number + 1) * length]

    def _starts(self, number: int) -> Tensor:
        size = self.shape.num_parts + 1
        first = _NUM_ROWS * self.shape.length + number * size
        return self.content[first : first + size]

    def _items(self, number: int) -> Tensor:
        size = 6 * self.shape.num_items
        first = _NUM_ROWS * self.shape.length + 2 * (self.shape.num_parts + 1) + number * size
        return self.content[first : first + size].view(-1, 6)


class PackedDataset:
    """The pairs of a data set, which are collated into packed batches of one shape. Pickles."""

    def __init__(self, pairs: ParallelDataset, shape: PackedShape) -> None:
        self.pairs = pairs
        self.shape = shape

    @property
    def sizes(self) -> PairSizes:
        """Numbers of source and target tokens of each pair, eos included: (N, 2)."""
        return self.pairs.sizes

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.pairs)

    def __getitem__(self, index: int) -> Pair:
        """Return source and target ids of a pair."""
        return self.pairs[index]

    def collate(self, items: Sequence[Pair]) -> PackedTranslationBatch:
        """Pack pairs, which must fit."""
        return pack_pairs(items, self.shape)


def pack_pairs(pairs: Sequence[Pair], shape: PackedShape) -> PackedTranslationBatch:
    """Lay pairs, at least one, one after another; on the CPU."""
    assert len(pairs) < shape.num_parts, "more sentences than the shape has room for"
    sources, targets = zip(*pairs, strict=True)
    lengths = np.zeros((2, shape.num_parts), dtype=np.int64)
    for side, sentences in enumerate((sources, targets)):
        lengths[side, : len(pairs)] = np.fromiter(map(len, sentences), dtype=np.int64, count=len(pairs))
    num_tokens = lengths.sum(axis=1)
    left = shape.length - num_tokens
    num_fillers = -(-int(left.max()) // shape.longest)
    assert len(pairs) + num_fillers <= shape.num_parts, "more sentences than the shape has room for"
    assert num_fillers <= left.min(), "each filler must have a token on either side"
    for side in range(2):
        fillers = left[side] // num_fillers + (np.arange(num_fillers) < left[side] % num_fillers)
        lengths[side, len(pairs) : len(pairs) + num_fillers] = fillers
    starts = np.zeros((2, shape.num_parts + 1), dtype=np.int32)
    np.cumsum(lengths, axis=1, out=starts[:, 1:])
    rows = np.full((_NUM_ROWS, shape.length), PAD_ID, dtype=np.int32)
    rows[0, : num_tokens[0]] = np.concatenate(sources)
    rows[3, : num_tokens[1]] = np.concatenate(targets)
    rows[2, 1 : num_tokens[1]] = rows[3, : num_tokens[1] - 1]
    rows[2, starts[1, : len(pairs)]] = EOS_ID
    for side, positions, parts in ((0, 1, 5), (1, 4, 6)):
        rows[parts] = np.repeat(np.arange(shape.num_parts), lengths[side])
        rows[positions] = np.arange(shape.length) - starts[side, rows[parts]]
    items = _make_items(lengths[:, : len(pairs) + num_fillers], shape)
    content = np.concatenate([rows.ravel(), starts.ravel(), items.ravel()])
    return PackedTranslationBatch(torch.from_numpy(content), shape, len(pairs), int(num_tokens[1]))


def _make_items(lengths: NDArray[np.int64], shape: PackedShape) -> NDArray[np.int32]:
    """Return the blocks that the programs of a kernel work on.

    Neighbouring parts form a group as long as the group fits into a block on both sides. A token attends only to
    tokens of its group, so a program has all that a block needs. A longer part is a group of its own, cut into
    blocks:

        parts     30  50  40 | 20  90 | 300
        groups         0         1       2
        blocks        120       110     128, 128, 44

    Args:
        lengths: (2, p): the lengths of the parts of source and target.
        shape: The shape of the batch.

    Returns:
        (2, I, 6): for each block of the source, and of the target: its start and end, then start and end of its
        group in the source, and in the target. Zeros if there are fewer blocks than I.
    """
    ends = np.cumsum(lengths, axis=1)
    groups = cut_packed(lengths.T, max_tokens=_BLOCK, max_sentences=None)
    lasts = np.array([group[-1] for group in groups])
    group_ends = ends[:, lasts]  # (2, groups)
    group_starts = np.concatenate([np.zeros((2, 1), dtype=np.int64), group_ends[:, :-1]], axis=1)
    spans = np.stack([group_starts[0], group_ends[0], group_starts[1], group_ends[1]], axis=1)  # (groups, 4)
    items = np.zeros((2, shape.num_items, 6), dtype=np.int32)
    for side in range(2):
        counts = -(-(group_ends[side] - group_starts[side]) // _BLOCK)
        owner = np.repeat(np.arange(len(groups)), counts)  # the group of each block
        number = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)  # within its group
        first = group_starts[side, owner] + number * _BLOCK
        items[side, : len(owner), 0] = first
        items[side, : len(owner), 1] = np.minimum(first + _BLOCK, group_ends[side, owner])
        items[side, : len(owner), 2:] = spans[owner]
    return items
