"""Sentences in memory, where a data directory would be read."""

from typing import Any

import numpy as np

from nmt.data.parallel_dataset import ParallelDataset
from nmt.data.vocabulary import EOS_ID


class Side:
    """One side of a data set, in memory."""

    def __init__(self, sentences: list[Any]) -> None:
        self.sentences = sentences
        self.sizes = np.array([len(sentence) for sentence in sentences], dtype=np.int32)

    def __len__(self) -> int:
        return len(self.sentences)

    def __getitem__(self, index: int) -> Any:
        return self.sentences[index]


def numbered_pairs() -> ParallelDataset:
    """Return 60 pairs of 2 to 10 ids."""
    lines = [np.array([4 + i % 50] * (1 + i % 9) + [EOS_ID], dtype=np.uint16) for i in range(60)]
    return ParallelDataset(Side(lines), Side(lines[::-1]))
