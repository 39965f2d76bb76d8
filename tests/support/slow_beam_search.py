"""The search that the vectorised one must equal: one sentence, Python numbers, lists."""

import itertools
import math
from collections.abc import Sequence

from nmt.generation.options import DecodingOptions
from support.table_model import EOS, PAD, UNK, NextProbabilities


def next_log_probs(
    probabilities: NextProbabilities,
    name: int,
    prefix: tuple[int, ...],
    *,
    limit: int,
    options: DecodingOptions,
) -> list[float]:
    """Return the log-probability of each next token after temperature, penalties and limits."""
    # A logit of these models is a log-probability, so not positive: the repetition penalty multiplies it.
    penalized = [
        p**options.repetition_penalty if token in prefix else p
        for token, p in enumerate(probabilities(name, prefix))
    ]
    powers = [p ** (1 / options.temperature) for p in penalized]
    log_probs = [math.log(p / sum(powers)) if p > 0 else -math.inf for p in powers]
    log_probs[PAD] = -math.inf
    log_probs[UNK] -= options.unkpen
    if len(prefix) == limit:
        return [log_prob if token == EOS else -math.inf for token, log_prob in enumerate(log_probs)]
    if len(prefix) < options.min_len:
        log_probs[EOS] = -math.inf
    return log_probs


def slow_beam_search(
    probabilities: NextProbabilities, name: int, *, limit: int, options: DecodingOptions
) -> list[tuple[list[int], float]]:
    """Return all finished hypotheses with their scores, best first."""
    live: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    finished: list[tuple[list[int], float]] = []
    lenpen = 0.0 if options.unnormalized else options.lenpen
    for step in range(limit + 1):
        candidates = []
        for place, (prefix, total) in enumerate(live):
            log_probs = next_log_probs(probabilities, name, prefix, limit=limit, options=options)
            candidates += [(-(total + log_prob), place, token) for token, log_prob in enumerate(log_probs)]
        ranked = [candidate for candidate in sorted(candidates) if candidate[0] < math.inf]
        survivors = []
        for rank, (cost, place, token) in enumerate(ranked[: 2 * options.beam]):
            prefix = live[place][0]
            if token != EOS:
                survivors.append(((*prefix, token), -cost))
            elif rank < options.beam and len(finished) < options.beam:
                finished.append((list(prefix), -cost / (step + 1) ** lenpen))
        live = survivors[: options.beam]
        if len(finished) == options.beam:
            break
    return sorted(finished, key=lambda hypothesis: -hypothesis[1])


def slow_greedy_search(
    probabilities: NextProbabilities, name: int, *, limit: int, options: DecodingOptions
) -> list[int]:
    """Take the most probable token until it is eos."""
    prefix: tuple[int, ...] = ()
    while True:
        log_probs = next_log_probs(probabilities, name, prefix, limit=limit, options=options)
        token = log_probs.index(max(log_probs))
        if token == EOS:
            return list(prefix)
        prefix = (*prefix, token)


def exhaustive_search(
    probabilities: NextProbabilities, name: int, *, vocabulary_size: int, limit: int, options: DecodingOptions
) -> list[tuple[list[int], float]]:
    """Score every sequence of at most `limit` tokens, best first."""
    words = [token for token in range(vocabulary_size) if token not in (PAD, EOS)]
    lengths = range(options.min_len, limit + 1)
    results = []
    for tokens in itertools.chain.from_iterable(itertools.product(words, repeat=n) for n in lengths):
        total = score(probabilities, name, tokens, limit=limit, options=options)
        results.append((list(tokens), total / (len(tokens) + 1) ** options.lenpen))
    return sorted(results, key=lambda result: -result[1])


def score(
    probabilities: NextProbabilities,
    name: int,
    tokens: Sequence[int],
    *,
    limit: int,
    options: DecodingOptions,
) -> float:
    """Return the sum of log-probabilities of a hypothesis and the eos after it."""
    total = 0.0
    for position, token in enumerate((*tokens, EOS)):
        prefix = tuple(tokens[:position])
        total += next_log_probs(probabilities, name, prefix, limit=limit, options=options)[token]
    return total
