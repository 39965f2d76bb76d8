"""Pairs of source and target sentences, and batches of them.

Legend: B sentences, S source length, T target length, N pairs of the data set.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nmt.data.indexed_dataset import Oddities
from nmt.data.limits import size_blocks
from nmt.data.vocabulary import EOS_ID, PAD_ID
from nmt.errors import UserError, by_number, counted

Pair = tuple[NDArray[Any], NDArray[Any]]
"""Source and target ids of a sentence pair, each one-dimensional and ending with eos."""


class Sentences(Protocol):
    """One side of a data set, as `IndexedDataset` stores it."""

    @property
    def sizes(self) -> NDArray[np.int32]:
        """Number of tokens of each sentence, eos included: (N,)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> NDArray[Any]: ...

    def digest(self) -> bytes:
        """Return a hash that tells the sentences from others."""

    def count_oddities(self) -> Oddities:
        """Count unknown tokens, and special symbols in wrong places."""


@dataclass(frozen=True)
class TranslationBatch:
    """Padded sentence pairs."""

    source: Tensor
    """(B, S) int64, padded on the right; each sentence ends with eos."""
    target_input: Tensor
    """(B, T) int64: what the decoder reads, `target` shifted right by one and begun with eos."""
    target: Tensor
    """(B, T) int64, padded on the right; each sentence ends with eos."""
    num_examples: int
    """B."""
    num_targets: int
    """Number of target tokens to be predicted: eos included, padding not."""

    def to(self, device: torch.device | str) -> Self:
        """Copy to a device, without waiting for the copy if it is from pinned memory."""
        return self._replace_tensors(
            *(
                tensor.to(device, non_blocking=True)
                for tensor in (self.source, self.target_input, self.target)
            )
        )

    def pin_memory(self) -> Self:
        """Copy to page-locked memory."""
        return self._replace_tensors(
            *(tensor.pin_memory() for tensor in (self.source, self.target_input, self.target))
        )

    def _replace_tensors(self, source: Tensor, target_input: Tensor, target: Tensor) -> Self:
        return type(self)(source, target_input, target, self.num_examples, self.num_targets)


@dataclass(frozen=True)
class PairSizes:
    """The lengths of all pairs, (N, 2) int32. `sizes[places]` reads some of them; nothing is kept.

    The two sides lie in two files. Laid side by side in memory they would take 8 bytes per pair in each process.
    """

    source: NDArray[np.int32]
    """(N,), such as a memory map."""
    target: NDArray[np.int32]
    """(N,)."""
    positions: tuple[int, int] | None = None
    """Longer lengths are given as this."""

    @property
    def shape(self) -> tuple[int, int]:
        """(N, 2)."""
        return len(self.source), 2

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.source)

    def __getitem__(self, places: Any) -> NDArray[np.int32]:
        """Return the lengths at a slice of places, or at (n,) indices: (n, 2)."""
        # Each column in one piece of memory, since lengths are used by columns.
        sizes = np.stack([self.source[places], self.target[places]]).astype(np.int32, copy=False).T
        return (
            sizes if self.positions is None else np.minimum(sizes, np.array(self.positions, dtype=np.int32))
        )


class ParallelDataset:
    """The pairs of a split: sentence i of the source belongs to sentence i of the target.

    A model may have too few positions for some pairs. Indexing gives these pairs whole. Their lengths, and their
    tokens in batches, are those that the model has positions for.

    Pickles as its two sides and their limits.
    """

    def __init__(
        self,
        source: Sentences,
        target: Sentences,
        *,
        split: str | None = None,
        positions: tuple[int, int] | None = None,
    ) -> None:
        """Pair two sides.

        Args:
            source: Sentences of ids.
            target: Their translations.
            split: The name of the split, where it has one.
            positions: How many tokens of a source, and of a target, come into batches; None: all.

        Raises:
            UserError: they have different numbers of sentences.
        """
        if len(source) != len(target):
            raise UserError(
                "the two sides of a split must have the same number of sentences, but the source has "
                f"{len(source):,} and the target {len(target):,}. Run nmt-preprocess again."
            )
        self._source = source
        self._target = target
        self.split = split
        self.positions = positions

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self._source)

    def __getitem__(self, index: int) -> Pair:
        """Return source and target ids of a pair."""
        return self._source[index], self._target[index]

    @property
    def sizes(self) -> PairSizes:
        """Numbers of source and target tokens of each pair, eos included: (N, 2)."""
        return PairSizes(self._source.sizes, self._target.sizes, self.positions)

    @property
    def longest(self) -> tuple[int, int]:
        """The longest sides that come into batches, in tokens; 0 if there are no pairs."""
        source, target = (int(side.sizes.max(initial=0)) for side in (self._source, self._target))
        return (
            (source, target)
            if self.positions is None
            else (min(source, self.positions[0]), min(target, self.positions[1]))
        )

    @property
    def num_cut(self) -> int:
        """Number of pairs that are cut in batches."""
        if self.positions is None:
            return 0
        whole = PairSizes(self._source.sizes, self._target.sizes)
        return sum(int((part > np.array(self.positions)).any(axis=1).sum()) for part in size_blocks(whole))

    def notes(self) -> list[str]:
        """Say how many pairs are cut for the loss."""
        if not (num_cut := self.num_cut):
            return []
        assert self.positions is not None
        source, target = self.positions
        return [
            f"{self.split}: {num_cut:,} of {counted(len(self), 'pair')} {by_number(num_cut, 'is', 'are')} longer "
            f"than the positions of the model ({source:,} and {target:,}): the loss is of as much as it takes; "
            f"{by_number(num_cut, 'it is', 'they are')} translated whole, in parts"
        ]

    def fingerprint(self) -> str:
        """Return a hash of all pairs in their order; it reads them all, about a gigabyte a second."""
        return blake2b(self._source.digest() + self._target.digest(), digest_size=16).hexdigest()

    def count_oddities(self) -> tuple[Oddities, Oddities]:
        """Count what is seldom right in the source, and in the target; it reads them all."""
        return self._source.count_oddities(), self._target.count_oddities()

    def collate(self, items: Sequence[Pair]) -> TranslationBatch:
        """Pad pairs to a batch."""
        if self.positions is None:
            return collate_pairs(items)
        return collate_pairs([cut_pair(pair, self.positions) for pair in items])


def cut_pair(pair: Pair, positions: tuple[int, int]) -> Pair:
    """Cut a pair to what a model has positions for.

    The source keeps its end of sentence. The target does not: the rest of it is not a whole sentence, so no end
    should be predicted.
    """
    (source, target), (longest_source, longest_target) = pair, positions
    if len(source) > longest_source:
        source = np.append(source[: longest_source - 1], source[-1:])
    return source, target[:longest_target]


def collate_pairs(pairs: Sequence[Pair]) -> TranslationBatch:
    """Pad pairs, at least one, to a batch; on the CPU."""
    sources, targets = zip(*pairs, strict=True)
    source, _ = pad_right(sources)
    target, is_token = pad_right(targets)
    target_input = np.full_like(target, PAD_ID)
    target_input[:, 0] = EOS_ID
    np.copyto(target_input[:, 1:], target[:, :-1], where=is_token[:, 1:])
    return TranslationBatch(
        source=torch.from_numpy(source),
        target_input=torch.from_numpy(target_input),
        target=torch.from_numpy(target),
        num_examples=len(pairs),
        num_targets=int(is_token.sum()),
    )


def pad_right(sentences: Sequence[NDArray[Any]]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Lay sentences side by side, padded on the right.

    Returns:
        (B, L) ids with PAD_ID at the ends, and (B, L) True at tokens; L is the longest length.
    """
    lengths = np.fromiter(map(len, sentences), dtype=np.int64, count=len(sentences))
    is_token = np.arange(lengths.max()) < lengths[:, None]  # (B, L)
    padded = np.full(is_token.shape, PAD_ID, dtype=np.int64)
    padded[is_token] = np.concatenate(sentences)
    return padded, is_token
