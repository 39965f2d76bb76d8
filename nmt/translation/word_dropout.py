"""Word dropout: the model reads some tokens as unknown, and must do without them."""

from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from nmt.data.packing import PackedTranslationBatch
from nmt.data.parallel_dataset import TranslationBatch
from nmt.data.vocabulary import BOS_ID, EOS_ID, PAD_ID, UNK_ID

AnyBatch = TypeVar("AnyBatch", bound=TranslationBatch | PackedTranslationBatch)
_KEPT = (BOS_ID, EOS_ID, PAD_ID)


def drop_words(batch: AnyBatch, probability: float) -> AnyBatch:
    """Replace tokens of the source and of the decoder's input by the unknown token; targets stay.

    Args:
        batch: Padded or packed sentence pairs. Tokens at the beginning or end, and padding, are never replaced.
        probability: For each token separately; drawn from the seeded generator of the batch's device.
    """
    if isinstance(batch, PackedTranslationBatch):
        dropped = batch.clone()
        for row in (dropped.source, dropped.target_input):
            row.copy_(_drop(row, probability))
        return dropped
    return replace(
        batch,
        source=_drop(batch.source, probability),
        target_input=_drop(batch.target_input, probability),
    )


def _drop(ids: Tensor, probability: float) -> Tensor:
    is_dropped = torch.rand(ids.shape, device=ids.device) < probability
    for kept in _KEPT:
        is_dropped &= ids != kept
    return ids.masked_fill(is_dropped, UNK_ID)
