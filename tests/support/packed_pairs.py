"""Pairs of random ids, and the shape that packs them."""

import numpy as np

from nmt.data.packing import PackedShape
from nmt.data.vocabulary import EOS_ID
from support.random_transformer import VOCABULARY_SIZE


def make_pairs(lengths, seed=0):
    """Pairs of random ids, each ending with eos."""
    random = np.random.default_rng(seed)

    def sentence(length):
        return np.append(random.integers(4, VOCABULARY_SIZE, size=length - 1), EOS_ID)

    return [(sentence(source), sentence(target)) for source, target in lengths]


def shape_for(lengths, *, slack=0):
    most = max(sum(source for source, _ in lengths), sum(target for _, target in lengths)) + slack
    return PackedShape.of(max_tokens=most, max_sentences=len(lengths) + slack, longest=12)
