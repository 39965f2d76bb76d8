"""Compare how our model and its export to CTranslate2 translate the same lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nmt.data.text import is_blank
from nmt.data.vocabulary import EOS_ID, UNK_ID
from nmt.errors import UserError, counted
from nmt.generation.options import DecodingOptions
from nmt.translation.request import Translation
from nmt.translation.translator import Translator

_PAD = "<blank>"
_BEAM = 5
_LONGEST = 200  # tokens of a translation
_NUM_FIRST = 10  # lines that show whether translations end by themselves
_TOLERANCE = 1e-3  # of scores; a smaller difference also counts as a tie
_TIES_PER_THOUSAND = 2
_LONGEST_RANDOM = 25  # pieces of a random sentence


@dataclass(frozen=True)
class Agreement:
    """The result when both models have translated a sample."""

    num_sentences: int  # with translations that ended by themselves
    num_equal: int
    num_ties: int  # other translations, to which our model gives the same score within the tolerance
    largest_difference: float  # between the scores that the two give to the same translation
    mean_difference: float
    faults: list[str]  # sentences that differ beyond a tie
    # Translations by one of the models that were cut off at the limit; only the scores of ours are compared.
    num_cut: int = 0
    num_left_out: int = 0  # lines that were left out because translations do not end

    def is_exact(self) -> bool:
        """Whether the two models are the same except for rounding."""
        most_ties = -(-self.num_sentences * _TIES_PER_THOUSAND // 1000)
        return not self.faults and self.num_ties <= most_ties and self.largest_difference <= _TOLERANCE

    def __str__(self) -> str:
        found = "no translation ended by itself"
        if self.num_sentences:
            found = (
                f"{self.num_equal:,} of {counted(self.num_sentences, 'translation')} equal, "
                f"{counted(self.num_ties, 'tie')}, {counted(len(self.faults), 'other')}"
            )
        cut = (
            f"; {self.num_cut:,} cut off at the limit, compared by their scores alone" if self.num_cut else ""
        )
        left_out = f" (left out besides: {counted(self.num_left_out, 'line')})" if self.num_left_out else ""
        return (
            f"{found}{cut}{left_out}; scores differ by {self.largest_difference:.1e} at most, "
            f"{self.mean_difference:.1e} on average"
        )


@dataclass(frozen=True)
class OwnTranslations:
    """Translations of a sample by our model with beam search, to compare with those of another model."""

    translations: list[Translation]
    longest: int  # the most tokens of each
    num_left_out: int = 0

    def is_cut(self, translation: Translation) -> bool:
        """Return whether a translation did not end by itself."""
        return len(translation.hypotheses[0].tokens) >= self.longest


def own_translations(translator: Translator, sample: Sequence[str]) -> OwnTranslations:
    """Translate a sample with our model.

    A model that has not learned to end translates up to the limit, which takes long and shows little. If it does
    so for most of the first lines, only these lines are used. The scores of all their tokens are still compared.

    Args:
        translator: Our model.
        sample: Lines. Blank lines are left out, and so is the end of a line that is too long.

    Raises:
        UserError: There is nothing to compare.
    """
    lines = [line for line in sample if not is_blank(line)]
    encoded = translator.source_segmenter.encode(lines)
    # The default length limit of translations.
    longest = 2 * min(max(map(len, encoded), default=0), translator.longest_source) + 10
    longest = min(longest, _LONGEST, translator.models[0].max_target_positions - 1)
    # No shortest length, because CTranslate2 forbids the end before the softmax, and we (and fairseq) after it.
    options = DecodingOptions(beam=_BEAM, min_len=0, max_len_a=0.0, max_len_b=longest)

    def translate(some: Sequence[str]) -> list[Translation]:
        found = translator.translate_lines(some, options, too_long="truncate")
        return [x for x in found if x.hypotheses]

    first, rest = lines[:_NUM_FIRST], lines[_NUM_FIRST:]
    own = OwnTranslations(translate(first), longest, num_left_out=len(rest))
    if 2 * sum(map(own.is_cut, own.translations)) <= len(own.translations):
        own = OwnTranslations([*own.translations, *translate(rest)], longest)
    if not own.translations:
        raise UserError(
            "`sample` must have lines that the model can translate, but it has no pieces for any of them. "
            "Name other text in the source language."
        )
    return own


def compare(translator: Translator, other: Any, own: OwnTranslations) -> Agreement:
    """Let another model score our translations, and translate the sources whose own translation by us has ended.

    Args:
        translator: Our model.
        other: A `ctranslate2.Translator` with the same vocabularies.
        own: From `own_translations`.
    """
    ours = sorted(own.translations, key=own.is_cut)
    num_ended = len(ours) - sum(map(own.is_cut, ours))
    source, target = translator.task.source_vocabulary.tokens, translator.task.target_vocabulary.tokens
    sources = [[name_of(source[i]) for i in x.source_ids] for x in ours]
    own_tokens = [[name_of(target[i]) for i in x.hypotheses[0].tokens] for x in ours]
    theirs = other.translate_batch(
        sources[:num_ended],
        beam_size=_BEAM,
        min_decoding_length=0,
        max_decoding_length=own.longest,
        max_batch_size=16,
        return_scores=True,
    )
    scored = other.score_batch(sources, own_tokens, max_batch_size=16, max_input_length=0)
    ids = {name_of(token): index for index, token in enumerate(target)}
    # This compares scores of the same translation, so it does not depend on the search.
    differences = [
        abs(_score(translator, x, x.hypotheses[0].tokens) - float(np.mean(score.log_probs)))
        for x, score in zip(ours, scored, strict=True)
    ]
    faults, num_ties, num_cut = [], 0, 0
    for place, result in enumerate(theirs):
        x, best = ours[place], ours[place].hypotheses[0]
        found = [ids[token] for token in result.hypotheses[0]]
        if found == best.tokens:
            differences[place] = max(differences[place], abs(best.score - result.scores[0]))
        elif abs(_score(translator, x, found) - best.score) <= _TOLERANCE:
            num_ties += 1
        elif len(found) >= own.longest:
            num_cut += 1  # theirs has not ended; at the limit the two count the end differently
        else:
            other_text = translator.task.target_segmenter.decode([found])[0]
            faults.append(
                f"{x.source!r}: ours {x.text!r} ({best.score:.4f}), CTranslate2's {other_text!r} "
                f"({result.scores[0]:.4f})"
            )
    return Agreement(
        num_sentences=num_ended - num_cut,
        num_equal=num_ended - num_cut - num_ties - len(faults),
        num_ties=num_ties,
        largest_difference=max(differences),
        mean_difference=float(np.mean(differences)),
        faults=faults,
        num_cut=len(ours) - num_ended + num_cut,
        num_left_out=own.num_left_out,
    )


def random_sentences(translator: Translator, count: int) -> list[str]:
    """Return sentences of random pieces, drawn by their counts in the training text if these are known."""
    generator = np.random.default_rng(1)
    vocabulary = translator.task.source_vocabulary
    weights = np.array(vocabulary.counts, dtype=np.float64)
    if not weights.any():
        weights[UNK_ID + 1 :] = 1.0
    longest = min(_LONGEST_RANDOM, translator.longest_source // 2)
    drawn = [
        generator.choice(len(weights), size=generator.integers(1, longest + 1), p=weights / weights.sum())
        for _ in range(count)
    ]
    return translator.task.source_segmenter.decode(drawn)


def name_of(token: str) -> str:
    """Return CTranslate2's name of a token."""
    return _PAD if token == "<pad>" else token


def _score(translator: Translator, translation: Translation, tokens: Sequence[int]) -> float:
    """Return our model's score of CTranslate2's translation."""
    ((scored,),) = translator.score_ids(
        [np.append(translation.source_ids, EOS_ID)], [np.array([*tokens, EOS_ID])]
    )
    return scored.score
