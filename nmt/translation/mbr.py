"""Minimum-Bayes-risk decoding: the candidate that agrees most with all the others (Eikema and Aziz, 2020).

Candidates are the n best of a search, drawn translations, or both. Agreement is sacreBLEU's sentence chrF2 or
sentence BLEU, computed for all pairs at once.

Shapes: N candidates of one sentence, M occurrences of n-grams of one order in all of them, G columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from nmt.generation.beam_search import Hypothesis
from nmt.generation.options import DecodingOptions

PairScores = Callable[[Sequence[str]], NDArray[np.float64]]
"""Scores N texts (rows) against each of them as reference (columns): (N, N), 0 to 100."""

_CHRF_ORDERS = 6
_BETA_SQUARED = 4.0
_BLEU_ORDERS = 4


class MinimumRisk:
    """Chooses among the candidates for a sentence."""

    def __init__(
        self, *, decode: Callable[[Iterable[Sequence[int]]], list[str]], pair_scores: PairScores, nbest: int
    ) -> None:
        """Take a function that turns tokens into text, one that compares texts, and the number to choose."""
        self._decode = decode
        self._pair_scores = pair_scores
        self._nbest = nbest

    def choose(self, candidates: Sequence[Hypothesis]) -> list[Hypothesis]:
        """Return the `nbest` best candidates with different texts. They keep the scores of the model."""
        texts = self._decode([candidate.tokens for candidate in candidates])
        places = choose(texts, pair_scores=self._pair_scores, nbest=self._nbest)
        return [candidates[place] for place in places]


def candidate_options(options: DecodingOptions) -> list[DecodingOptions]:
    """Return the options of the search and of the drawing that give the candidates of `mbr`: one or both.

    Each returns all of its hypotheses.
    """
    plain = replace(options, mbr=None, samples=0, mbr_over=None)
    passes = []
    if options.candidates != "samples":
        # Options that shape the distribution for drawing do not apply to the search.
        temperature = 1.0 if options.samples else options.temperature
        searched = replace(plain, nbest=options.beam, temperature=temperature)
        passes.append(replace(searched, sampling_topk=None, sampling_topp=None, seed=None))
    if options.candidates != "nbest":
        passes.append(replace(plain, sampling=True, beam=options.samples, nbest=options.samples))
    return passes


def pair_scores(metric: Literal["chrf", "bleu"], *, target_lang: str) -> PairScores:
    """Return the function that compares texts by a metric.

    Raises:
        UserError: BLEU in this language needs a tokeniser that is not installed.
    """
    if metric == "chrf":
        return chrf_pairs
    from nmt.translation.scoring import bleu_tokenizer  # here, because translation alone needs no sacreBLEU

    return partial(bleu_pairs, tokenize=bleu_tokenizer(target_lang))


def choose(texts: Sequence[str], *, pair_scores: PairScores, nbest: int) -> list[int]:
    """Return the places of the `nbest` texts with the highest expected score, best first.

    Each text is compared with all texts, including itself and its repetitions, and all count the same. A text that
    comes several times is returned once, at its first place. Of equally good texts the first one comes first.
    """
    if not texts:
        return []
    unique, firsts, counts = np.unique(np.array(texts, dtype=object), return_index=True, return_counts=True)
    expected = pair_scores(unique.tolist()) @ counts / len(texts)
    order = np.lexsort((firsts, -expected.round(9)))  # equal scores may differ by rounding
    return [int(place) for place in firsts[order[:nbest]]]


def chrf_pairs(texts: Sequence[str]) -> NDArray[np.float64]:
    """Return sentence chrF2 (Popović, 2015) without white space; see `PairScores`."""
    shape = (len(texts), len(texts))
    precision, recall, num_orders = (np.zeros(shape) for _ in range(3))
    characters = [
        np.frombuffer("".join(text.split()).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        for text in texts
    ]
    for sizes, matches in _matches(characters, _CHRF_ORDERS):
        # An order of n-grams counts if both texts have n-grams of it.
        is_there = (sizes[:, None] > 0) & (sizes[None, :] > 0)
        precision += np.divide(matches, sizes[:, None], out=np.zeros(shape), where=is_there)
        recall += np.divide(matches, sizes[None, :], out=np.zeros(shape), where=is_there)
        num_orders += is_there
    precision /= np.maximum(num_orders, 1)
    recall /= np.maximum(num_orders, 1)
    denominator = _BETA_SQUARED * precision + recall
    product = (1 + _BETA_SQUARED) * precision * recall
    return 100 * np.divide(product, denominator, out=np.zeros(shape), where=denominator > 0)


def bleu_pairs(texts: Sequence[str], *, tokenize: Callable[[str], str]) -> NDArray[np.float64]:
    """Return sentence BLEU, with effective order and exponential smoothing; see `PairScores`.

    Args:
        texts: Those of N candidates.
        tokenize: Puts blanks between words, as sacreBLEU's tokenisers do.
    """
    words = [tokenize(text.rstrip()).split() for text in texts]
    ids = {word: index for index, word in enumerate(dict.fromkeys(word for own in words for word in own))}
    shape = (len(texts), len(texts))
    logs, num_orders, num_zeros, has_match = (np.zeros(shape) for _ in range(4))
    for sizes, matches in _matches([np.array([ids[x] for x in own]) for own in words], _BLEU_ORDERS):
        is_there = np.broadcast_to(sizes[:, None] > 0, shape)  # in the hypothesis, the row
        num_zeros += is_there & (matches == 0)
        # The k-th order without a match counts 1 / 2**k matches.
        smoothed = np.where(matches > 0, matches, 0.5**num_zeros) / np.maximum(sizes[:, None], 1)
        logs += np.where(is_there, np.log(smoothed), 0.0)
        num_orders += is_there
        has_match += matches
    lengths = np.array([len(own) for own in words], dtype=np.float64)
    brevity = np.minimum(1.0 - lengths[None, :] / np.maximum(lengths[:, None], 1.0), 0.0)  # a logarithm
    return np.where(has_match > 0, 100 * np.exp(logs / np.maximum(num_orders, 1) + brevity), 0.0)


def _matches(
    sequences: Sequence[NDArray[np.integer]], max_order: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Count the n-grams of N sequences of symbols, and the n-grams that each two sequences have in common.

    Yields:
        For each order from 1: the number of n-grams of each sequence (N,), and the matches of each pair (N, N). An
        n-gram counts as often as it comes in both.
    """
    owners = np.repeat(np.arange(len(sequences)), [len(sequence) for sequence in sequences])
    _, symbols = np.unique(np.concatenate([*sequences, np.empty(0, np.int64)]), return_inverse=True)
    starts, codes = np.arange(len(symbols)), np.zeros(len(symbols), dtype=np.int64)
    for order in range(1, max_order + 1):
        # An n-gram is an (n-1)-gram and one more symbol, within the same sequence.
        is_within = starts + order <= len(symbols)
        starts, codes = starts[is_within], codes[is_within]
        is_within = owners[starts] == owners[starts + order - 1]
        starts, codes = starts[is_within], codes[is_within]
        extended = codes * len(symbols) + symbols[starts + order - 1]
        _, codes = np.unique(extended, return_inverse=True)
        table = _occurrences(owners[starts], codes, len(sequences))
        yield np.bincount(owners[starts], minlength=len(sequences)), table @ table.T


def _occurrences(owners: NDArray[np.int64], codes: NDArray[np.int64], num_owners: int) -> NDArray[np.float32]:
    """Return a table (N, G) of zeros and ones, with columns for the first, second ... time of each code (M,).

    A 1 says that an owner has the code at least so often. So the product of two rows is the number of codes that
    both owners have; a code counts as often as the owner with fewer of it has it.
    """
    order = np.lexsort((codes, owners))
    ranked = np.stack([owners, codes])[:, order]
    is_first = np.ones(len(order), dtype=bool)
    is_first[1:] = (ranked[:, 1:] != ranked[:, :-1]).any(axis=0)
    places = np.arange(len(order))
    times = places - np.maximum.accumulate(np.where(is_first, places, 0))  # how often it came before
    columns, column = np.unique(ranked[1] * (len(order) + 1) + times, return_inverse=True)
    table = np.zeros((num_owners, len(columns)), dtype=np.float32)
    table[ranked[0], column] = 1.0
    return table
