"""Word dropout: the model reads some tokens as unknown, and must do without them."""

from dataclasses import replace

import torch
from torch import Tensor

from nmt.data.parallel_dataset import TranslationBatch
from nmt.data.vocabulary import BOS_ID, EOS_ID, PAD_ID, UNK_ID

_KEPT = (BOS_ID, EOS_ID, PAD_ID)


def drop_words(batch: TranslationBatch, probability: float) -> TranslationBatch:
    """Replace tokens of the source and of the decoder's input by the unknown one; targets stay.

    Args:
        batch: Padded sentence pairs; no beginning, end or padding is replaced.
        probability: Of each token, on its own; drawn from the seeded generator of the batch's device.
    """
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
