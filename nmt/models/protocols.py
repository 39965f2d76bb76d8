"""What the rest of the package asks of a translation model: in training, in a search, and what only some can do.

A model is an `nn.Module` with the methods of `TranslationModel`, made by its options (`ModelOptions`). It needs to
know nothing else: the loss, the search, checkpoints and BLEU take whatever has them.

Shapes: B sentences, K beam size, R = B*K rows, S source length, T target length, N and M tokens of packed rows,
D model, V vocabulary. Sequences are padded on the right.
"""

from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from nmt.models.packed import PackedTokens


class TrainedModel(Protocol):
    """What a loss asks of a model, and what scores given translations."""

    training: bool

    @property
    def max_source_positions(self) -> int:
        """The most tokens of a source, its eos counted."""

    @property
    def max_target_positions(self) -> int:
        """The most tokens of a target, its eos counted."""

    @property
    def output_weight(self) -> Tensor:
        """(V, D), whose product with hidden states are the logits: losses take it apart, to save memory."""

    def __call__(self, source: Tensor, target_input: Tensor, /) -> Tensor:
        """Run the model in one pass: its `forward`.

        Args:
            source: (B, S) int64, each sentence ending in eos.
            target_input: (B, T) int64, the target shifted right and begun with eos.

        Returns:
            (B, T, D), the hidden states that predict the next tokens.
        """

    def project(self, features: Tensor, /) -> Tensor:
        """(..., D) -> (..., V) logits, which the caller may overwrite."""


class SourceMemory(Protocol):
    """What `encode` makes of B sources. All K rows of a sentence read the same, so it is not repeated for them."""

    def select(self, sentences: Tensor, /) -> Self:
        """Return the memory of the sentences at the places (B',) int64, which may come several times."""

    def keep(self, sentences: Tensor, /) -> Self:
        """Return the same for sentences that go on, fewer than B; the old memory is not used again."""


class PrefixState(Protocol):
    """What a model remembers of the tokens that R rows have taken so far."""

    def reorder_(self, rows: Tensor, /) -> None:
        """Let new row i go on from old row `rows[i]`, (R',) int64; the rows of a sentence stay together."""


class SearchModel(Protocol):
    """What a search asks of a model, one new token a row at a time."""

    @property
    def max_target_positions(self) -> int:
        """The most tokens of a target, its eos counted."""

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states; sums of log-probabilities are float64 if it is, and else float32."""

    @property
    def logit_offset(self) -> float:
        """By how much all logits of `project` are less than the model's: 0, or what changes no probability."""

    def encode(self, source: Tensor, /) -> Any:
        """Encode sources (B, S) int64, each ending in eos, to a `SourceMemory`."""

    def start_state(self) -> Any:
        """Return a `PrefixState` of rows that have taken nothing; how many there are, the first step shows."""

    def step(self, tokens: Tensor, memory: Any, state: Any, /) -> Tensor:
        """Take one new token a row into the state.

        Args:
            tokens: (R,) int64, eos at first; the K rows of a sentence lie side by side.
            memory: From `encode`, of B sentences.
            state: From `start_state`; it is changed in place.

        Returns:
            (R, D), the hidden states that predict the next tokens.
        """

    def project(self, features: Tensor, /) -> Tensor:
        """(..., D) -> (..., V) logits, which the caller may overwrite."""


class TranslationModel(TrainedModel, SearchModel, Protocol):
    """A model that is trained and then searches as it is."""


@runtime_checkable
class AttendingModel(Protocol):
    """A model that can tell which source tokens a target token comes from."""

    @property
    def num_attention_layers(self) -> int:
        """How many layers can tell it."""

    def attention_weights(self, source: Tensor, target_input: Tensor, /, *, layer: int) -> Tensor:
        """Return what each target position looks at in the source.

        Args:
            source: (B, S), as for `forward`.
            target_input: (B, T), as for `forward`.
            layer: From 0; negative numbers count from the last one.

        Returns:
            (B, T, S) float32; each row sums to 1, and padding of the source has 0.
        """


class PackedModel(Protocol):
    """A model that trains on sentences packed into one row, without padding."""

    @property
    def output_weight(self) -> Tensor:
        """(V, D), as in `TrainedModel`."""

    def packed_features(self, source: PackedTokens, target_input: PackedTokens) -> Tensor:
        """N source and M target tokens -> (M, D): hidden states; part i of one belongs to part i of the other."""
