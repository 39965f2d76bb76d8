"""Pairs of source and target sentences, and batches of them.

Legend: B sentences, S source length, T target length, N pairs of the data set.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nmt.data.vocabulary import EOS_ID, PAD_ID
from nmt.errors import UserError

Pair = tuple[NDArray[Any], NDArray[Any]]
"""Source and target ids of a sentence pair, each one-dimensional and ending with eos."""


class Sentences(Protocol):
    """One side of a data set, as `IndexedDataset` stores it."""

    @property
    def sizes(self) -> NDArray[np.int32]:
        """Number of tokens of each sentence, eos included: (N,)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> NDArray[Any]: ...


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


class ParallelDataset:
    """The pairs of a split: sentence i of the source belongs to sentence i of the target.

    Pickles as its two sides.
    """

    def __init__(self, source: Sentences, target: Sentences, *, split: str | None = None) -> None:
        """Pair two sides.

        Args:
            source: Sentences of ids.
            target: Their translations.
            split: The name of the split, where it has one.

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

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self._source)

    def __getitem__(self, index: int) -> Pair:
        """Return source and target ids of a pair."""
        return self._source[index], self._target[index]

    @cached_property
    def sizes(self) -> NDArray[np.int32]:
        """Numbers of source and target tokens of each pair, eos included: (N, 2), 8 bytes per pair."""
        return np.stack([self._source.sizes, self._target.sizes], axis=1).astype(np.int32, copy=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave out `sizes`, which the worker processes that this is pickled for never ask for."""
        return type(self), (self._source, self._target)

    def collate(self, items: Sequence[Pair]) -> TranslationBatch:
        """Pad pairs to a batch."""
        return collate_pairs(items)


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
