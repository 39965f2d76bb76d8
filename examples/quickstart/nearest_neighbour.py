"""Translate by looking up: copy the translation of the training sentence that is nearest to the source.

Nearest by word edit distance, and by shared word n-grams (Dice coefficient of unigrams, bigrams and trigrams).
Where several training sentences are equally near, a translation counts as right if that of any of them is, so
the figures are upper bounds of what copying can reach.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable

Ngrams = Counter[tuple[str, ...]]


def count_ngrams(sentence: str, *, longest: int) -> Ngrams:
    words = sentence.split()
    return Counter(tuple(words[i : i + n]) for n in range(1, longest + 1) for i in range(len(words) - n + 1))


class Index:
    """Counts the n-grams that a sentence shares with each of the sentences given."""

    def __init__(self, sentences: Iterable[str], *, longest: int) -> None:
        self.longest = longest
        self.sizes: list[int] = []
        self._postings: defaultdict[tuple[str, ...], list[tuple[int, int]]] = defaultdict(list)
        for number, sentence in enumerate(sentences):
            ngrams = count_ngrams(sentence, longest=longest)
            self.sizes.append(ngrams.total())
            for ngram, count in ngrams.items():
                self._postings[ngram].append((number, count))

    def shared(self, sentence: str) -> list[int]:
        shared = [0] * len(self.sizes)
        for ngram, count in count_ngrams(sentence, longest=self.longest).items():
            for number, other in self._postings.get(ngram, ()):
                shared[number] += min(count, other)
        return shared


def edit_distance(first: list[str], second: list[str]) -> int:
    """Count the words to insert, delete or replace (Levenshtein)."""
    row = list(range(len(second) + 1))
    for i, word in enumerate(first, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(second, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (word != other))
    return row[-1]


def nearest_by_edits(sentence: str, sentences: list[str], index: Index) -> list[int]:
    """Find the sentences at the smallest word edit distance; `index` holds their unigrams."""
    words = sentence.split()
    # Every word of the longer side that the shorter one lacks costs an edit: a bound that spares most distances.
    bounds = [
        max(len(words), size) - shared
        for size, shared in zip(index.sizes, index.shared(sentence), strict=True)
    ]
    best, nearest = len(words) + max(index.sizes), []
    for number in sorted(range(len(sentences)), key=bounds.__getitem__):
        if bounds[number] > best:
            break
        distance = edit_distance(words, sentences[number].split())
        if distance < best:
            best, nearest = distance, []
        if distance == best:
            nearest.append(number)
    return nearest


def nearest_by_ngrams(sentence: str, index: Index) -> list[int]:
    """Find the sentences with the highest Dice coefficient of n-grams."""
    size = count_ngrams(sentence, longest=index.longest).total()
    dice = [
        2 * shared / (size + other) for other, shared in zip(index.sizes, index.shared(sentence), strict=True)
    ]
    best = max(dice)
    return [number for number, value in enumerate(dice) if value == best]


def score_copying(
    train: tuple[list[str], list[str]], test: tuple[list[str], list[str]]
) -> tuple[float, float]:
    """Return the share of the test that copying gets exactly right, by edit distance and by n-grams."""
    words, ngrams = Index(train[0], longest=1), Index(train[0], longest=3)
    right = [0, 0]
    for source, reference in zip(*test, strict=True):
        for method, nearest in enumerate(
            (nearest_by_edits(source, train[0], words), nearest_by_ngrams(source, ngrams))
        ):
            right[method] += any(train[1][number] == reference for number in nearest)
    return right[0] / len(test[0]), right[1] / len(test[0])
