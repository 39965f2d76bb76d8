"""Minimum-Bayes-risk decoding: the candidate that agrees most with all the others (Eikema and Aziz, 2020).

Agreement is sacreBLEU's sentence chrF2, computed for all pairs at once from counts of character n-grams.

Shapes: N candidates of one sentence, G different n-grams of one order among them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from nmt.translation.translator import Translation

_ORDERS = 6
_BETA_SQUARED = 4.0


def rerank(translation: Translation, *, nbest: int) -> Translation:
    """Put the candidates with the highest expected chrF first, and keep `nbest` of them.

    Each candidate is compared with all of them, itself included, and all count alike. Scores stay those of the
    model; of equal candidates the one that the model ranked higher stays before the other.
    """
    order = np.argsort(-expected_chrf(translation.texts), kind="stable")[:nbest].tolist()
    return replace(
        translation,
        texts=[translation.texts[i] for i in order],
        hypotheses=[translation.hypotheses[i] for i in order],
    )


def expected_chrf(texts: Sequence[str]) -> NDArray[np.float64]:
    """Return for each of N texts its mean sentence chrF2 against all of them: (N,), 0 to 100."""
    if not texts:
        return np.empty(0)
    unique, places, counts = np.unique(np.array(texts, dtype=object), return_inverse=True, return_counts=True)
    return (chrf_matrix(unique.tolist()) @ counts / len(texts))[places]


def chrf_matrix(texts: Sequence[str]) -> NDArray[np.float64]:
    """Return sentence chrF2 of each of N texts (rows) against each as reference (columns): (N, N), 0 to 100."""
    num_texts = len(texts)
    precision, recall, num_orders = (np.zeros((num_texts, num_texts)) for _ in range(3))
    for counts in _ngram_counts(texts):
        sizes = counts.sum(axis=1)
        matches = np.stack([np.minimum(counts, row).sum(axis=1) for row in counts], axis=1)
        # An order counts where both have n-grams of it.
        is_there = (sizes[:, None] > 0) & (sizes[None, :] > 0)
        precision += np.divide(matches, sizes[:, None], out=np.zeros(matches.shape), where=is_there)
        recall += np.divide(matches, sizes[None, :], out=np.zeros(matches.shape), where=is_there)
        num_orders += is_there
    precision /= np.maximum(num_orders, 1)
    recall /= np.maximum(num_orders, 1)
    denominator = _BETA_SQUARED * precision + recall
    product = (1 + _BETA_SQUARED) * precision * recall
    return 100 * np.divide(product, denominator, out=np.zeros(product.shape), where=denominator > 0)


def _ngram_counts(texts: Sequence[str]) -> Iterator[NDArray[np.int64]]:
    """Yield for each order how often each text has each n-gram of characters, white space left out: (N, G)."""
    joined = ["".join(text.split()) for text in texts]
    owners = np.repeat(np.arange(len(texts)), [len(text) for text in joined])
    characters = np.array([ord(character) for text in joined for character in text], dtype=np.int64)
    starts, codes = np.arange(len(characters)), np.zeros(len(characters), dtype=np.int64)
    for order in range(1, _ORDERS + 1):
        # An n-gram is one of the (n-1)-grams and a character more, within the same text.
        is_within = starts + order <= len(characters)
        starts, codes = starts[is_within], codes[is_within]
        is_within = owners[starts] == owners[starts + order - 1]
        starts, codes = starts[is_within], codes[is_within]
        extended = (codes << 21) | characters[starts + order - 1]  # a code point has at most 21 bits
        unique, codes = np.unique(extended, return_inverse=True)
        flat = np.bincount(owners[starts] * max(len(unique), 1) + codes, minlength=len(texts) * len(unique))
        yield flat.reshape(len(texts), len(unique))
