"""What the rest of the package asks of a translation model: for training, for a search, and for optional uses.

A model is an `nn.Module` with the methods of `TranslationModel`. Its options (`ModelOptions`) make it. Nothing
else is needed: the loss, the search, checkpoints and BLEU accept every model with these methods.

Shapes: B sentences, K beam size, R = B*K rows, S source length, T target length, N and M tokens of packed rows,
D model, V vocabulary. Sequences are padded on the right.
"""

from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from nmt.models.packed import PackedTokens


class TrainedModel(Protocol):
    """What a loss asks of a model; enough to score given translations, too."""

    training: bool

    @property
    def max_source_positions(self) -> int:
        """The most tokens of a source, its eos counted."""

    @property
    def max_target_positions(self) -> int:
        """The most tokens of a target, its eos counted."""

    @property
    def output_weight(self) -> Tensor:
        """(V, D). Its product with hidden states gives the logits. Losses compute it in parts, to save memory."""

    def __call__(self, source: Tensor, target_input: Tensor, /) -> Tensor:
        """Run the model in one pass (its `forward`).

        Args:
            source: (B, S) int64, each sentence ending in eos.
            target_input: (B, T) int64, the target shifted right, with eos at its start.

        Returns:
            (B, T, D), the hidden states that predict the next tokens.
        """

    def project(self, features: Tensor, /) -> Tensor:
        """(..., D) -> (..., V) logits, which the caller may overwrite."""


class SourceMemory(Protocol):
    """The result of `encode` for B sources. All K rows of a sentence read the same memory, without copies."""

    def select(self, sentences: Tensor, /) -> Self:
        """Return the memory of the sentences at the places (B',) int64; a place may be named several times."""

    def keep(self, sentences: Tensor, /) -> Self:
        """Return the memory of the sentences that go on, fewer than B; the old memory may be overwritten."""


class PrefixState(Protocol):
    """What a model remembers of the tokens that R rows have taken so far."""

    def reorder_(self, rows: Tensor, /) -> None:
        """Let new row i continue old row `rows[i]`, (R',) int64; the rows of a sentence stay together."""


class SearchModel(Protocol):
    """What a search asks of a model, which takes one new token for each row at a time."""

    @property
    def max_target_positions(self) -> int:
        """The most tokens of a target, its eos counted."""

    @property
    def dtype(self) -> torch.dtype:
        """The type of hidden states. If it is float64, sums of log-probabilities are float64, else float32."""

    @property
    def logit_offset(self) -> float:
        """The number that `project` subtracts from all logits, or 0. It changes no probability."""

    def encode(self, source: Tensor, /) -> Any:
        """Encode sources (B, S) int64, each ending in eos, to a `SourceMemory`."""

    def start_state(self) -> Any:
        """Return a `PrefixState` of rows without tokens; the first step shows how many rows there are."""

    def step(self, tokens: Tensor, memory: Any, state: Any, /) -> Tensor:
        """Decode one new token for each row, and add it to the state.

        Args:
            tokens: (R,) int64, eos in the first step; the K rows of a sentence lie side by side.
            memory: From `encode`, of B sentences.
            state: From `start_state`; changed in place.

        Returns:
            (R, D), the hidden states that predict the next tokens.
        """

    def project(self, features: Tensor, /) -> Tensor:
        """(..., D) -> (..., V) logits, which the caller may overwrite."""


class TranslationModel(TrainedModel, SearchModel, Protocol):
    """A model that can be trained, and that a search can use without another form."""


@runtime_checkable
class AttendingModel(Protocol):
    """A model that can tell which source tokens a target token comes from."""

    @property
    def num_attention_layers(self) -> int:
        """The number of layers that can tell it."""

    def attention_weights(self, source: Tensor, target_input: Tensor, /, *, layer: int) -> Tensor:
        """Return how much each target position attends to each source position.

        Args:
            source: (B, S), as for `forward`.
            target_input: (B, T), as for `forward`.
            layer: From 0; negative numbers count from the last one.

        Returns:
            (B, T, S) float32; each row sums to 1, and source padding has weight 0.
        """


class PackedModel(Protocol):
    """A model that trains on sentences packed into one row, without padding."""

    @property
    def output_weight(self) -> Tensor:
        """(V, D), as in `TrainedModel`."""

    def packed_features(self, source: PackedTokens, target_input: PackedTokens) -> Tensor:
        """N source and M target tokens -> (M, D): hidden states; part i of one belongs to part i of the other."""
