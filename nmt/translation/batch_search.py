"""The work on a batch of sentences: a search for their translations, or scores of given ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from nmt.data.parallel_dataset import pad_right
from nmt.generation.beam_search import Hypothesis
from nmt.generation.generator import Generator
from nmt.generation.options import DecodingOptions
from nmt.translation.mbr import MinimumRisk, candidate_options, pair_scores
from nmt.translation.sentences import Ids, Sentence


class BatchSearch(Protocol):
    """Finds hypotheses for sentences."""

    def run(
        self, sentences: Sequence[Sentence], may_drop_stragglers: bool
    ) -> Sequence[list[Hypothesis] | None]:
        """Return each sentence's hypotheses, best first; None if it was given up, see `Generator.generate`."""


class Search:
    """Searches for translations, draws them, or chooses among candidates from both."""

    def __init__(
        self, generators: Sequence[Generator], device: torch.device, *, risk: MinimumRisk | None = None
    ) -> None:
        """Take one generator, or several; `risk` then chooses among their candidates."""
        assert risk is not None or len(generators) == 1
        self._generators = generators
        self._device = device
        self._risk = risk

    def run(self, sentences: Sequence[Sentence], may_drop_stragglers: bool) -> list[list[Hypothesis] | None]:
        """See `BatchSearch`. With `risk` nothing is given up, because the drawn candidates would be lost."""
        found = [
            generator.generate(
                self._padded([x.source for x in sentences]),
                self._padded([x.target for x in sentences])
                if any(len(x.target) for x in sentences)
                else None,
                lines=torch.tensor([x.number for x in sentences], device=self._device),
                may_drop_stragglers=may_drop_stragglers and self._risk is None,
            )
            for generator in self._generators
        ]
        if self._risk is None:
            return [hypotheses or None for hypotheses in found[0]]
        candidates = [[x for part in parts for x in part] for parts in zip(*found, strict=True)]
        return [self._risk.choose(own) for own in candidates]

    def _padded(self, sentences: Sequence[Ids]) -> Tensor:
        return torch.from_numpy(pad_right(sentences)[0]).to(self._device)


class Scoring:
    """Scores the targets of sentences."""

    def __init__(self, score: Callable[[Sequence[Ids], Sequence[Ids]], list[list[Hypothesis]]]) -> None:
        """Take the function that scores targets, given their sources."""
        self._score = score

    def run(self, sentences: Sequence[Sentence], may_drop_stragglers: bool) -> list[list[Hypothesis]]:
        """See `BatchSearch`."""
        return self._score([x.source for x in sentences], [x.target for x in sentences])


def make_search(
    options: DecodingOptions,
    generator: Callable[[DecodingOptions], Generator],
    device: torch.device,
    *,
    decode: Callable[[Iterable[Sequence[int]]], list[str]],
    target_lang: str,
) -> Search:
    """Return the search for translations, or a choice among the candidates of one or two searches.

    Args:
        options: How to search.
        generator: Makes a generator from options.
        device: The device of the models.
        decode: Turns tokens into text.
        target_lang: The language of the text.

    Raises:
        UserError: An option has a value that makes no sense.
    """
    options.check()
    if options.mbr is None:
        return Search([generator(options)], device)
    pairs = pair_scores(options.mbr, target_lang=target_lang)
    risk = MinimumRisk(decode=decode, pair_scores=pairs, nbest=options.nbest)
    return Search([generator(own) for own in candidate_options(options)], device, risk=risk)
