"""Sentences one after another in one row, and attention that stays within each of them.

Shapes: N, M tokens of the rows of queries and keys, P parts, I items, H heads, E head size, D = H*E model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from nmt.system.slower import warn_slower


@dataclass(frozen=True)
class PackedTokens:
    """A row of token ids that is made of parts: sentences, and what fills the row."""

    ids: Tensor
    """(N,) integers."""
    positions: Tensor
    """(N,) integers: the place of each token in its part, from 0."""
    parts: Tensor
    """(N,) int32: the number of each token's part."""
    starts: Tensor
    """(P+1,) int32: where each part begins, and N; a part may be empty."""
    longest: int
    """No part has more tokens."""
    items: Tensor
    """(I, 6) int32: blocks of tokens for kernels (`nmt/data/packing.py`)."""
    is_target: bool
    """On which side of the items' groups this row stands."""


@dataclass(frozen=True)
class Spans:
    """Which tokens attend to which: those of part i of one row to those of part i of another, or of the same."""

    queries: PackedTokens
    keys: PackedTokens
    is_causal: bool = False
    """Each token attends to those up to itself (a row to itself)."""
    by_kernels: bool = False
    """Whether our own kernels compute it, see `have_kernels`."""
    has_layer_kernels: bool = False
    """Whether our own kernels may compute the rest of a layer, see `packed_layers.have_kernels`."""


def attend_to_self(projected: Tensor, spans: Spans, *, num_heads: int, dropout: float) -> Tensor:
    """Compute softmax(Q K^T / sqrt(E)) V for each head, within each part of a row.

    Args:
        projected: (1, N, 3*D): queries, keys and values side by side.
        spans: The row's, to itself.
        num_heads: H.
        dropout: Probability with which an attention weight is dropped.

    Returns:
        (1, N, D): the heads side by side.
    """
    if spans.by_kernels:
        return _by_kernels(projected.flatten(0, 1), None, spans, num_heads=num_heads, dropout=dropout)
    query, keys, values = projected.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
    return _attend(query, keys, values, spans, dropout=dropout)


def attend_to_other(
    query: Tensor, projected: Tensor, spans: Spans, *, num_heads: int, dropout: float
) -> Tensor:
    """Compute the same between the parts of one row and those of another.

    Args:
        query: (1, N, D).
        projected: (1, M, 2*D): keys and values side by side.
        spans: Of the row of queries to that of keys.
        num_heads: H.
        dropout: Probability with which an attention weight is dropped.

    Returns:
        (1, N, D).
    """
    if spans.by_kernels:
        rows = query.flatten(0, 1), projected.flatten(0, 1)
        return _by_kernels(*rows, spans, num_heads=num_heads, dropout=dropout)
    (heads,) = query.unflatten(-1, (1, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
    keys, values = projected.unflatten(-1, (2, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
    return _attend(heads, keys, values, spans, dropout=dropout)


@cache
def have_kernels(dtype: torch.dtype, head_size: int, device: torch.device) -> bool:
    """Return whether our own kernels attend here: in half precision on a GPU, where Triton and a C compiler work.

    They are tried out the first time; a warning says why they cannot be used.
    """
    is_half = dtype in (torch.bfloat16, torch.float16)
    if device.type != "cuda" or not is_half or head_size not in (16, 32, 64, 128):
        return False
    return works("Triton", lambda: _kernels().try_out(dtype, head_size, device))


def works(what: str, try_out: Callable[[], None]) -> bool:
    """Return whether kernels of ours can be used; a warning says why not."""
    try:
        try_out()
    except (
        Exception
    ) as error:  # of Triton, of the compiler that it calls, of the driver: there is no common type
        warn_slower(what, error)
        return False
    return True


def _kernels() -> ModuleType:
    from nmt.models import packed_kernels  # Triton is where PyTorch is built for GPUs

    return packed_kernels


def _by_kernels(
    query: Tensor, projected: Tensor | None, spans: Spans, *, num_heads: int, dropout: float
) -> Tensor:
    """(N, 3*D), or (N, D) and (M, 2*D) -> (1, N, D).

    Rows come by `flatten`, whose gradient is a view; that of an index is filled with zeros and copied into.
    """
    kernels = _kernels()
    queries, keys = spans.queries, spans.keys
    device = query.device
    # Nothing reads the seed where nothing is dropped.
    seed = torch.randint(2**62, (1,), device=device) if dropout else queries.starts
    tables = (queries.items, keys.items, queries.parts, keys.parts, seed)
    sides = [kernels.TARGET if row.is_target else kernels.SOURCE for row in (queries, keys)]
    settings = (num_heads, *sides, spans.is_causal, dropout)
    return kernels.attend(query, projected, tables, settings)[None]


def _attend(query: Tensor, keys: Tensor, values: Tensor, spans: Spans, *, dropout: float) -> Tensor:
    """Attend with PyTorch's own operations: (1, H, N, E) and twice (1, H, M, E) -> (1, N, D).

    On a GPU by FlashAttention (Dao, 2023) in half precision, and by the memory-efficient kernels (Rabe and Staats,
    2021) in float32: both take starts of parts, and neither plans anew for another shape. Elsewhere by a mask over
    the whole rows: the reference for tests.
    """
    is_causal = spans.is_causal
    if not query.is_cuda:
        mask = spans.queries.parts[:, None] == spans.keys.parts[None, :]
        mask = mask.tril() if is_causal else mask
        heads = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, dropout_p=dropout)
        return heads.transpose(1, 2).flatten(2)  # (1, H, N, E) -> (1, N, D)
    starts = (spans.queries.starts, spans.keys.starts, spans.queries.longest, spans.keys.longest)
    by_token = [x.transpose(1, 2) for x in (query, keys, values)]  # (1, H, N, E) -> (1, N, H, E)
    is_half = query.dtype in (torch.bfloat16, torch.float16)
    has_flash = torch.cuda.get_device_capability(query.device) >= (8, 0)  # Ampere and newer
    if has_flash and is_half and query.size(3) % 8 == 0 and query.size(3) <= 256:
        heads = torch.ops.aten._flash_attention_forward(
            *(x.squeeze(0) for x in by_token), *starts, dropout, is_causal, False
        )[0]
        return heads.flatten(1)[None]  # (N, H, E) -> (1, N, D)
    mask_type = 1 if is_causal else 0  # 1: causal from the top left
    heads = torch.ops.aten._efficient_attention_forward(
        *by_token, None, *starts, dropout, mask_type, torch.is_grad_enabled()
    )[0]
    return heads.flatten(2)  # (1, N, H, E) -> (1, N, D)
