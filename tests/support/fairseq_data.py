"""Data directories as fairseq-preprocess leaves them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nmt.data.indexed_dataset import IndexedDatasetWriter
from nmt.data.vocabulary import EOS_ID, Vocabulary

PAIRS = [("a b", "A B C"), ("b", "B"), ("", "C A")]


def write_split(folder: Path, split: str, *, languages: Sequence[str] = ("en", "de")) -> None:
    """Write a split as fairseq-preprocess does: ids and eos, nothing else."""
    for side, lang in enumerate(languages):
        vocabulary = Vocabulary.load(folder / f"dict.{lang}.txt")
        prefix = folder / f"{split}.{'-'.join(languages)}.{lang}"
        with IndexedDatasetWriter(prefix, np.dtype("<u2")) as writer:
            for pair in PAIRS:
                writer.add(np.array([*map(vocabulary.id, pair[side].split()), EOS_ID]))
