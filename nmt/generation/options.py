"""The options of decoding; torch is not imported here."""

import math
from dataclasses import dataclass, field
from typing import Literal, TypedDict

from nmt.config.fields import key_of
from nmt.config.ranges import ANY, check_limits, check_numbers, check_ranges, limits
from nmt.errors import UserError, counted

# A million tokens to the power of 5 is 1e30, and a million times 1e30 is within float32, which ends at 3e38.
MOST_HYPOTHESES = 10_000  # of a beam
_RANGES = {
    "beam": (-math.inf, MOST_HYPOTHESES),
    "lenpen": (-5, 5),
    "max_len_a": (0, 1e6),
    "samples": (-math.inf, 10_000),  # each is compared with each other
    "temperature": (1e-6, 1e6),
    "repetition_penalty": (1e-6, 1e6),
}


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
    mbr: Literal["chrf", "bleu"] | None
    samples: int
    mbr_over: Literal["nbest", "samples", "both"] | None
    ensemble_by: Literal["probabilities", "log-probabilities"]
    ensemble_weights: tuple[float, ...]


@dataclass(frozen=True)
class DecodingOptions:
    """How translations are searched for, or drawn. Names and meanings are fairseq's where it has them."""

    beam: int = field(default=5, metadata=limits(least=1))
    """Number of hypotheses that are kept for a sentence at each step; 1 is greedy search. With `sampling`, the
    number of translations that are drawn for it, each by itself."""
    nbest: int = 1
    """Number of hypotheses that are returned for a sentence, best first."""
    lenpen: float = 1.0
    """A score is (sum of log-probabilities) / length ** lenpen: more than 1 favours long translations."""
    unnormalized: bool = False
    """Rank by the plain sum of log-probabilities, without a length penalty."""
    min_len: int = field(default=1, metadata=limits(least=0))
    """Fewest tokens before the end of sentence; a sentence's length limit goes before it."""
    max_len_a: float = 2.0
    """A translation has at most max-len-a * (source pieces + 1) + max-len-b tokens."""
    max_len_b: int = field(default=10, metadata=limits(least=0))
    """See max-len-a."""
    unkpen: float = 0.0
    """Subtracted from the log-probability of the unknown token."""
    temperature: float = 1.0
    """Divides the logits: above 1 flattens the distribution, below 1 sharpens it."""
    no_repeat_ngram_size: int = field(default=0, metadata=limits(least=0))
    """No run of this many tokens comes twice in a translation; 0 for no such rule."""
    repetition_penalty: float = 1.0
    """Divides the logits of the tokens that a translation has already, where they are positive, and multiplies
    negative ones (as in CTRL): above 1 discourages repetition."""
    sampling: bool = False
    """Draw each token at random, with the model's probabilities, instead of searching for the best."""
    sampling_topk: int | None = field(default=None, metadata=limits(least=1))
    """Draw among this many of the most probable tokens."""
    sampling_topp: float | None = field(default=None, metadata=limits(above=0, most=1))
    """Draw among the fewest tokens that together have this probability."""
    seed: int | None = field(default=None, metadata={"range": ANY})
    """Seed of `sampling` and `samples`, 1 if left out: the same seed and line give the same translations in any
    batch."""
    mbr: Literal["chrf", "bleu"] | None = None
    """Minimum Bayes risk: of many candidates take not the most probable one, but the one that has the highest mean
    sentence chrF, or BLEU, against all of them."""
    samples: int = field(default=0, metadata=limits(least=0))
    """Candidates of `mbr` that are drawn for a sentence, with the model's probabilities; `temperature`,
    `sampling-topk` and `sampling-topp` shape these alone."""
    mbr_over: Literal["nbest", "samples", "both"] | None = None
    """The candidates of `mbr`: the `beam` best of the search, what is drawn, or both. If it is left out, what is
    drawn where there are `samples`, else the best of the search."""
    ensemble_by: Literal["probabilities", "log-probabilities"] = "probabilities"
    """What is averaged over several models; log-probabilities are normalised again."""
    ensemble_weights: tuple[float, ...] = ()
    """The weight of each of several models, in their order; equal if left out. Their sum makes no difference."""

    def check(self) -> None:
        """Raise a `UserError` for the first value that makes no sense, or that float32 cannot compute with."""
        check_ranges(self, _RANGES)
        check_limits(self)
        self._check_mbr()
        limit, of_what = (self.beam, "beam") if self.mbr is None else (self.num_candidates, "candidates")
        _require(1 <= self.nbest <= limit, "nbest", f"from 1 to {of_what} ({limit})", self.nbest)
        _require(
            not self.unnormalized or self.lenpen == 1.0, "lenpen", "left out with unnormalized", self.lenpen
        )
        for name in ("sampling_topk", "sampling_topp", "seed"):
            if getattr(self, name) is not None and not (self.sampling or self.samples):
                flag = key_of(name)
                raise UserError(f"`{flag}` must come with `sampling`. Add --sampling or leave it out.")
        if self.sampling_topk is not None:
            _require(
                self.sampling_topp is None, "sampling-topp", "left out with sampling-topk", self.sampling_topp
            )
        if self.seed is not None:
            _require(0 <= self.seed < 2**63, "seed", "from 0 to 2**63 - 1", self.seed)
        are_weights = all(math.isfinite(weight) and weight > 0 for weight in self.ensemble_weights)
        _require(are_weights, "ensemble-weights", "numbers above 0", self.ensemble_weights)
        check_numbers(self)

    @property
    def length_exponent(self) -> float:
        """The exponent of the length in a score; 0 where the score is the plain sum."""
        return 0.0 if self.unnormalized else self.lenpen

    @property
    def candidates(self) -> Literal["nbest", "samples", "both"]:
        """Where the candidates of `mbr` come from."""
        return self.mbr_over or ("samples" if self.samples else "nbest")

    @property
    def num_candidates(self) -> int:
        """How many candidates `mbr` has to choose from."""
        num_found = 0 if self.candidates == "samples" else self.beam
        return num_found + (0 if self.candidates == "nbest" else self.samples)

    def _check_mbr(self) -> None:
        if self.mbr is None:
            for name, is_given in (("samples", self.samples > 0), ("mbr-over", self.mbr_over is not None)):
                if is_given:
                    raise UserError(f"`{name}` must come with `mbr`. Add --mbr chrf or leave it out.")
            return
        if self.sampling:
            raise UserError(
                "`sampling` must be left out with `mbr`. Say by `samples` how many candidates to draw."
            )
        if self.samples and self.candidates == "nbest":
            raise UserError(
                "`samples` must be left out with `mbr-over` nbest. Take `mbr-over` both for both."
            )
        if not self.samples and self.candidates != "nbest":
            raise UserError(
                f"`mbr-over` {self.candidates} must come with `samples`, but there are none. Add --samples 64."
            )
        if self.num_candidates < 2:
            raise UserError(
                f"`mbr` must have candidates to choose from, but has {self.num_candidates}. Raise `beam`, or give "
                "`samples`."
            )

    def check_models(self, num_models: int) -> None:
        """Raise a `UserError` where the options of ensembles do not suit this many models."""
        if num_models == 1 and (self.ensemble_weights or self.ensemble_by != "probabilities"):
            name = "ensemble-weights" if self.ensemble_weights else "ensemble-by"
            raise UserError(f"`{name}` must come with several models, but there is one. Name them A:B.")
        if self.ensemble_weights and len(self.ensemble_weights) != num_models:
            raise UserError(
                f"`ensemble-weights` must be {counted(num_models, 'number')}, one for each model, but they are "
                f"{len(self.ensemble_weights)}. Give as many."
            )


def _require(holds: bool, name: str, rule: str, value: object) -> None:
    if not holds:
        raise UserError(f"`{name}` must be {rule}, but is {value}.")
