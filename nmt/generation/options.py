"""The options of decoding; torch is not imported here."""

import math
from dataclasses import dataclass
from typing import Literal, TypedDict

from nmt.errors import UserError


class DecodingKeywords(TypedDict, total=False):
    """The fields of `DecodingOptions`, for the types of functions that take them by name."""

    beam: int
    nbest: int
    lenpen: float
    unnormalized: bool
    min_len: int
    max_len_a: float
    max_len_b: int
    unkpen: float
    temperature: float
    no_repeat_ngram_size: int
    repetition_penalty: float
    sampling: bool
    sampling_topk: int | None
    sampling_topp: float | None
    seed: int | None
    ensemble_by: Literal["probabilities", "log-probabilities"]
    ensemble_weights: tuple[float, ...]


@dataclass(frozen=True)
class DecodingOptions:
    """How translations are searched for, or drawn. Names and meanings are fairseq's where it has them."""

    beam: int = 5
    """Number of hypotheses that are kept for a sentence at each step; 1 is greedy search. With `sampling`, the
    number of translations that are drawn for it, each by itself."""
    nbest: int = 1
    """Number of hypotheses that are returned for a sentence, best first."""
    lenpen: float = 1.0
    """A score is (sum of log-probabilities) / length ** lenpen: more than 1 favours long translations."""
    unnormalized: bool = False
    """Rank by the plain sum of log-probabilities, without a length penalty."""
    min_len: int = 1
    """Fewest tokens before the end of sentence; a sentence's length limit goes before it."""
    max_len_a: float = 2.0
    """A translation has at most max-len-a * (source pieces + 1) + max-len-b tokens."""
    max_len_b: int = 10
    """See max-len-a."""
    unkpen: float = 0.0
    """Subtracted from the log-probability of the unknown token."""
    temperature: float = 1.0
    """Divides the logits: above 1 flattens the distribution, below 1 sharpens it."""
    no_repeat_ngram_size: int = 0
    """No run of this many tokens comes twice in a translation; 0 for no such rule."""
    repetition_penalty: float = 1.0
    """Divides the logits of the tokens that a translation has already, where they are positive, and multiplies
    negative ones (as in CTRL): above 1 discourages repetition."""
    sampling: bool = False
    """Draw each token at random, with the model's probabilities, instead of searching for the best."""
    sampling_topk: int | None = None
    """Draw among this many of the most probable tokens."""
    sampling_topp: float | None = None
    """Draw among the fewest tokens that together have this probability."""
    seed: int | None = None
    """Seed of `sampling`, 1 if left out: the same seed and line give the same translations in any batch."""
    ensemble_by: Literal["probabilities", "log-probabilities"] = "probabilities"
    """What is averaged over several models; log-probabilities are normalised again."""
    ensemble_weights: tuple[float, ...] = ()
    """The weight of each of several models, in their order; equal if left out. Their sum makes no difference."""

    def check(self) -> None:
        """Raise a `UserError` for the first value that makes no sense."""
        _require(self.beam >= 1, "beam", "at least 1", self.beam)
        _require(1 <= self.nbest <= self.beam, "nbest", f"from 1 to beam ({self.beam})", self.nbest)
        _require(math.isfinite(self.lenpen), "lenpen", "a finite number", self.lenpen)
        _require(
            not self.unnormalized or self.lenpen == 1.0, "lenpen", "left out with unnormalized", self.lenpen
        )
        _require(self.min_len >= 0, "min-len", "at least 0", self.min_len)
        _require(
            math.isfinite(self.max_len_a) and self.max_len_a >= 0, "max-len-a", "at least 0", self.max_len_a
        )
        _require(self.max_len_b >= 0, "max-len-b", "at least 0", self.max_len_b)
        _require(math.isfinite(self.unkpen), "unkpen", "a finite number", self.unkpen)
        in_range = math.isfinite(self.temperature) and self.temperature > 0
        _require(in_range, "temperature", "above 0", self.temperature)
        size = self.no_repeat_ngram_size
        _require(size >= 0, "no-repeat-ngram-size", "at least 0", size)
        is_penalty = math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0
        _require(is_penalty, "repetition-penalty", "above 0", self.repetition_penalty)
        for name in ("sampling_topk", "sampling_topp", "seed"):
            if getattr(self, name) is not None and not self.sampling:
                flag = name.replace("_", "-")
                raise UserError(f"`{flag}` must come with `sampling`. Add --sampling or leave it out.")
        if self.sampling_topk is not None:
            _require(self.sampling_topk >= 1, "sampling-topk", "at least 1", self.sampling_topk)
            _require(
                self.sampling_topp is None, "sampling-topp", "left out with sampling-topk", self.sampling_topp
            )
        if self.sampling_topp is not None:
            in_range = 0 < self.sampling_topp <= 1
            _require(in_range, "sampling-topp", "above 0 and at most 1", self.sampling_topp)
        if self.seed is not None:
            _require(0 <= self.seed < 2**63, "seed", "from 0 to 2**63 - 1", self.seed)
        are_weights = all(math.isfinite(weight) and weight > 0 for weight in self.ensemble_weights)
        _require(are_weights, "ensemble-weights", "numbers above 0", self.ensemble_weights)

    def check_models(self, num_models: int) -> None:
        """Raise a `UserError` where the options of ensembles do not suit this many models."""
        if num_models == 1 and (self.ensemble_weights or self.ensemble_by != "probabilities"):
            name = "ensemble-weights" if self.ensemble_weights else "ensemble-by"
            raise UserError(f"`{name}` must come with several models, but there is one. Name them A:B.")
        if self.ensemble_weights and len(self.ensemble_weights) != num_models:
            raise UserError(
                f"`ensemble-weights` must be {num_models} numbers, one for each model, but they are "
                f"{len(self.ensemble_weights)}."
            )


def _require(holds: bool, name: str, rule: str, value: object) -> None:
    if not holds:
        raise UserError(f"`{name}` must be {rule}, but is {value}.")
