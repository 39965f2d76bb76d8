"""What torch.compile puts into its programs in place of operations that are written by hand.

`models/fused.py` computes in steps that are fast one by one on a CPU. A compiler joins steps by itself, and is to
see PyTorch's own operations; it cannot look into oneDNN's products and 64-bit random numbers anyway.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from nmt.models import attention, fused


@cache  # torch takes each of these once a process
def trace_plain_operations() -> None:
    """Make it so for all that is compiled from now on; what is not compiled stays as it is."""
    instead_of = torch.compiler.substitute_in_graph
    instead_of(attention._is_for_fused)(_never_fused)
    instead_of(fused._is_for_onednn)(_never_for_onednn)
    instead_of(fused.embed)(_embed)
    instead_of(fused.random_mask)(_random_mask)


def _never_fused(x: Tensor) -> bool:
    return False


def _never_for_onednn(x: Tensor, weight: Tensor) -> bool:
    return False


def _embed(token_ids: Tensor, weight: Tensor, *, pad_id: int) -> Tensor:
    return F.embedding(token_ids, weight, pad_id)


def _random_mask(x: Tensor, p: float) -> Tensor:
    return F.dropout(torch.ones_like(x), p)
