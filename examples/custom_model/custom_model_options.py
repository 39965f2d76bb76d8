"""The options of the two models, and the tasks made with them. Imports no torch, so that --help is quick."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nmt.errors import UserError
from nmt.translation.options import TranslationOptions

if TYPE_CHECKING:
    from gru_model import GruModel
    from mean_model import MeanModel

FIXED = {"fixed": True}  # may not change when a run is resumed


@dataclass(frozen=True)
class GruOptions:
    """A bidirectional GRU that encodes, and one with attention that decodes."""

    hidden_size: int = field(default=512, metadata=FIXED)
    """Width of embeddings and hidden states; even."""
    dropout: float = 0.2
    """Dropout on embeddings and on what predicts a token."""
    max_source_positions: int = field(default=1024, metadata=FIXED)
    """Longest source."""
    max_target_positions: int = field(default=1024, metadata=FIXED)
    """Longest target."""

    def check(self) -> None:
        if self.hidden_size < 2 or self.hidden_size % 2:
            raise UserError(f"`hidden-size` must be even and at least 2, but is {self.hidden_size}.")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"`dropout` must be at least 0 and below 1, but is {self.dropout}.")

    def build(self, *, source_vocabulary_size: int, target_vocabulary_size: int, pad_id: int) -> GruModel:
        from gru_model import GruModel

        return GruModel(self, source_vocabulary_size, target_vocabulary_size, pad_id)


@dataclass(frozen=True)
class MeanOptions:
    """The mean of the source's embeddings, and a GRU that decodes it: the least that is a model."""

    hidden_size: int = field(default=256, metadata=FIXED)
    """Width of embeddings and hidden states."""
    max_source_positions = max_target_positions = 256  # constants will do

    def build(self, *, source_vocabulary_size: int, target_vocabulary_size: int, pad_id: int) -> MeanModel:
        from mean_model import MeanModel

        return MeanModel(self, source_vocabulary_size, target_vocabulary_size, pad_id)


GruTranslation = TranslationOptions[GruOptions]
MeanTranslation = TranslationOptions[MeanOptions]
