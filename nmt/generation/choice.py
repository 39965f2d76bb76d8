"""A step's choice, from the models' logits to the candidates: what all searches have in common.

Shapes: B sentences, K beam size, R = B*K rows, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from nmt.generation.adjust import adjust_, combine, penalize_repetition_
from nmt.generation.beam_search import Beam, Candidates
from nmt.generation.options import DecodingOptions
from nmt.generation.select import best_candidates, sample_tokens, single_candidates


@dataclass(frozen=True)
class Rules:
    """By what a choice is made, besides logits and hypotheses."""

    options: DecodingOptions
    pad_id: int
    eos_id: int
    unk_id: int
    logit_offsets: tuple[float, ...]  # of each model: by how much its logits are less than they would be

    @property
    def read_tokens(self) -> bool:
        """Whether it matters which tokens the hypotheses have, and not only how many."""
        return self.options.no_repeat_ngram_size > 0 or self.options.repetition_penalty != 1.0


def choose(
    logits: Sequence[Tensor],
    hypotheses: Beam,
    rules: Rules,
    *,
    some_at_limit: bool,
    forced: Tensor | None,
    numbers: Tensor | None,
) -> Candidates:
    """Return each sentence's best candidates, or the one that is drawn for it.

    Args:
        logits: (R, V) of each model; overwritten.
        hypotheses: The R of B sentences.
        rules: What else counts.
        some_at_limit: Whether a sentence may be at its length limit.
        forced: (B,) int64, see `adjust_`.
        numbers: (R,) random numbers to draw with.
    """
    options = rules.options
    if options.repetition_penalty != 1.0:
        logits = [x if x.dtype.itemsize >= 4 else x.float() for x in logits]
        for x, offset in zip(logits, rules.logit_offsets, strict=True):
            penalize_repetition_(
                x,
                hypotheses.tokens.flatten(0, 1),
                penalty=options.repetition_penalty,
                offset=offset,
                num_filled=hypotheses.num_filled,
            )
    scores = combine(logits, options)
    adjust_(
        scores.unflatten(0, hypotheses.scores.shape),
        hypotheses,
        options=options,
        pad_id=rules.pad_id,
        eos_id=rules.eos_id,
        unk_id=rules.unk_id,
        some_at_limit=some_at_limit,
        forced=forced,
    )
    if numbers is None:
        return best_candidates(scores, hypotheses)
    return single_candidates(scores, sample_tokens(scores, numbers, options), hypotheses)
