"""Rules of a search: what may come next, and at what cost. Each rule is a function, made once for a search.

    rules = search_rules(options, ids, prefixes=prefixes)
    for rule in rules:
        rule(scores, beam)

A rule changes log-probabilities in place, given the hypotheses so far. The probability that it takes from a token
is not given to other tokens. A rule keeps data of single sentences in tensors whose first dimension is the
sentence, and looks them up by `beam.sentences`:

    def without(forbidden: Tensor) -> Rule:            # (N, V) bool
        def rule(scores: Tensor, beam: Beam) -> None:
            scores.masked_fill_(forbidden[beam.sentences][:, None], -torch.inf)

        return rule

Shapes: N sentences at the start of the search, B in the batch now, K beam size, V vocabulary, t tokens so far.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from nmt.generation.beam_search import Beam
from nmt.generation.options import DecodingOptions

Rule = Callable[[Tensor, Beam], None]
"""Changes scores (B, K, V) in place: log-probabilities of what follows each hypothesis of the beam."""

Must = Callable[[Beam], tuple[Tensor, Tensor] | None]
"""Returns the token (B,) that is the only choice of each sentence, and in which sentences (B,) bool there is such
a token; or None if there is none at all."""


class TokenIds(NamedTuple):
    """The tokens that a search knows by name."""

    pad: int
    eos: int
    unk: int


def search_rules(
    options: DecodingOptions,
    ids: TokenIds,
    *,
    first_limit: int | None = 0,
    prefixes: Tensor | None = None,
    more: Sequence[Rule] = (),
) -> list[Rule]:
    """Return all rules of a search, in the order in which they are applied.

    A length limit overrides a prefix. A prefix overrides all other rules except the costs of tokens.

    Args:
        options: The penalties, the shortest length, and the repeats that are forbidden.
        ids: Of the vocabulary.
        first_limit: The lowest length limit of the sentences; None if no limit is checked.
        prefixes: (N, P) int64, the tokens that translations begin with, padded on the right.
        more: Rules of the caller, which forbid or favour tokens.
    """
    rules = list(more)
    if options.min_len > 0:
        rules.append(shortest(options.min_len, ids.eos))
    if options.no_repeat_ngram_size > 0:
        rules.append(no_repeats(options.no_repeat_ngram_size))
    if prefixes is not None:
        rules = [unless(begin_with(prefixes, pad_id=ids.pad), rules)]
    if first_limit is not None:
        rules = [unless(end_at_limit(ids.eos, first_limit=first_limit), rules)]
    costs = [never(ids.pad)]
    if options.unkpen != 0.0:
        costs.append(penalize(ids.unk, options.unkpen))
    return [*costs, *rules]


def never(token_id: int) -> Rule:
    """Forbid a token."""

    def rule(scores: Tensor, _: Beam) -> None:
        scores[:, :, token_id].fill_(-torch.inf)

    return rule


def penalize(token_id: int, penalty: float) -> Rule:
    """Subtract from the score of a token."""

    def rule(scores: Tensor, _: Beam) -> None:
        scores[:, :, token_id] -= penalty

    return rule


def shortest(min_len: int, eos_id: int) -> Rule:
    """Forbid the end of hypotheses that have fewer tokens than `min_len`."""

    def rule(scores: Tensor, beam: Beam) -> None:
        if beam.num_filled is not None:
            scores[:, :, eos_id].masked_fill_(beam.num_filled < min_len, -torch.inf)
        elif beam.step < min_len:
            scores[:, :, eos_id] = -torch.inf

    return rule


def no_repeats(size: int) -> Rule:
    """Forbid runs of `size` tokens that a hypothesis already has."""

    def rule(scores: Tensor, beam: Beam) -> None:
        forbid_repeats_(scores, beam.tokens, size=size, num_filled=beam.num_filled)

    return rule


def unless(must: Must, rules: Sequence[Rule]) -> Rule:
    """Apply rules where no token is prescribed. Elsewhere only the prescribed token may follow.

    A prescribed token keeps the score that it had before these rules.
    """

    def rule(scores: Tensor, beam: Beam) -> None:
        prescribed = must(beam)
        if prescribed is None:
            for each in rules:
                each(scores, beam)
            return
        tokens, where = prescribed
        tokens = tokens[:, None, None].expand(-1, scores.size(1), 1)  # (B,) -> (B, K, 1)
        where = where[:, None, None]  # (B, 1, 1)
        before = scores.gather(2, tokens)
        for each in rules:
            each(scores, beam)
        scores.masked_fill_(where, -torch.inf)
        scores.scatter_(2, tokens, torch.where(where, before, scores.gather(2, tokens)))

    return rule


def end_at_limit(eos_id: int, *, first_limit: int = 0) -> Must:
    """Prescribe eos for sentences at their length limit; no limit is below `first_limit`."""

    def must(beam: Beam) -> tuple[Tensor, Tensor] | None:
        if beam.num_filled is None and beam.step < first_limit:
            return None
        return torch.full_like(beam.limits, eos_id), beam.limits <= beam.length

    return must


def begin_with(prefixes: Tensor, *, pad_id: int) -> Must:
    """Prescribe the tokens of prefixes (N, P) int64, padded on the right."""

    def must(beam: Beam) -> tuple[Tensor, Tensor] | None:
        tokens = prefix_tokens(prefixes, beam)
        return None if tokens is None else (tokens, tokens != pad_id)

    return must


def prefix_tokens(prefixes: Tensor, beam: Beam) -> Tensor | None:
    """Return the next token (B,) of each sentence's prefix, or None if all prefixes (N, P) have ended."""
    if beam.num_filled is not None:
        column = prefixes.index_select(1, beam.num_filled.view(1)).squeeze(1)  # (N,)
    elif beam.step < prefixes.size(1):
        column = prefixes[:, beam.step]
    else:
        return None
    return column.index_select(0, beam.sentences)


def of_rows(rule: Rule, sentences: Tensor) -> Rule:
    """Return the rule for a search whose sentence i is `sentences[i]` of the given rule."""

    def renamed(scores: Tensor, beam: Beam) -> None:
        rule(scores, replace(beam, sentences=sentences[beam.sentences]))

    return renamed


def forbid_repeats_(scores: Tensor, tokens: Tensor, *, size: int, num_filled: Tensor | None = None) -> None:
    """Forbid, in place, the tokens that would complete an n-gram that the hypothesis already has.

    Args:
        scores: (B, K, V).
        tokens: (B, K, t), without the token that starts the decoder.
        size: n, at least 1.
        num_filled: () int64: how many columns of `tokens` are filled; all if None.
    """
    if tokens.size(2) < size:
        return
    ngrams = tokens.unfold(2, size, 1)  # (B, K, t) -> (B, K, t-n+1, n)
    if num_filled is None:
        last = tokens[:, :, tokens.size(2) - size + 1 :]  # (B, K, n-1)
    else:
        places = torch.arange(1 - size, 0, device=tokens.device) + num_filled  # (n-1,)
        last = tokens.index_select(2, places.clamp_(min=0))
    is_repeat = (ngrams[..., :-1] == last[:, :, None]).all(dim=3)  # (B, K, t-n+1)
    if num_filled is not None:
        ends = torch.arange(size, tokens.size(2) + 1, device=tokens.device)  # (t-n+1,)
        is_repeat &= ends <= num_filled
    penalty = torch.zeros_like(is_repeat, dtype=scores.dtype).masked_fill_(is_repeat, -torch.inf)
    scores.scatter_add_(2, ngrams[..., -1], penalty)
