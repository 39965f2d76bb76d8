"""Sentences packed one after another into one row, and attention that stays within each sentence.

Shapes: N, M tokens of the rows of queries and keys, P parts, I items, H heads, E head size, D = H*E model.
"""

from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from nmt.system.slower import works


@dataclass(frozen=True)
class PackedTokens:
    """A row of token ids that is made of parts: sentences, and filling at the end."""

    ids: Tensor
    """(N,) integers."""
    positions: Tensor
    """(N,) integers: the place of each token in its part, from 0."""
    parts: Tensor
    """(N,) int32: the number of each token's part."""
    starts: Tensor
    """(P+1,) int32: where each part begins, and at the end N; a part may be empty."""
    longest: int
    """No part has more tokens than this."""
    items: Tensor
    """(I, 6) int32: blocks of tokens for kernels (`nmt/data/packing.py`)."""
    is_target: bool
    """Whether this row is the target side of `items`, and not the source side."""


@dataclass(frozen=True)
class Spans:
    """Which tokens attend to which: part i of one row attends to part i of another row, or of the same row."""

    queries: PackedTokens
    keys: PackedTokens
    is_causal: bool = False
    """Each token attends to tokens up to itself (both rows are the same then)."""
    by_kernels: bool = False
    """Whether our own kernels compute the attention, see `have_kernels`."""
    has_layer_kernels: bool = False
    """Whether our own kernels may compute the rest of a layer, see `packed_layers.have_kernels`."""


def attend_to_self(projected: Tensor, spans: Spans, *, num_heads: int, dropout: float) -> Tensor:
    """Compute softmax(Q K^T / sqrt(E)) V for each head, within each part of a row.

    Args:
        projected: (1, N, 3*D): queries, keys and values side by side.
        spans: Of the row to itself.
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
    """Compute softmax(Q K^T / sqrt(E)) V for each head, from the parts of one row to those of another.

    Args:
        query: (1, N, D).
        projected: (1, M, 2*D): keys and values side by side.
        spans: Of the row of queries to the row of keys.
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
    """Return whether our own kernels compute attention: in half precision on a GPU with Triton and a C compiler.

    The first call tries them out. If they fail, a warning says why.
    """
    is_half = dtype in (torch.bfloat16, torch.float16)
    if device.type != "cuda" or not is_half or head_size not in (16, 32, 64, 128):
        return False
    return works("Triton", lambda: _kernels().try_out(dtype, head_size, device))


def _kernels() -> ModuleType:
    from nmt.models import packed_kernels  # here, because only PyTorch's builds for GPUs come with Triton

    return packed_kernels


def _by_kernels(
    query: Tensor, projected: Tensor | None, spans: Spans, *, num_heads: int, dropout: float
) -> Tensor:
    """(N, 3*D), or (N, D) and (M, 2*D) -> (1, N, D).

    The rows come from `flatten`, whose gradient is a view. The gradient of an index would be a copy into zeros.
    """
    kernels = _kernels()
    queries, keys = spans.queries, spans.keys
    device = query.device
    # Without dropout nothing reads the seed, so any tensor will do.
    seed = torch.randint(2**62, (1,), device=device) if dropout else queries.starts
    tables = (queries.items, keys.items, queries.parts, keys.parts, seed)
    sides = [kernels.TARGET if row.is_target else kernels.SOURCE for row in (queries, keys)]
    settings = (num_heads, *sides, spans.is_causal, dropout)
    return kernels.attend(query, projected, tables, settings)[None]


def _attend(query: Tensor, keys: Tensor, values: Tensor, spans: Spans, *, dropout: float) -> Tensor:
    """Attend with PyTorch's own operations: (1, H, N, E) and twice (1, H, M, E) -> (1, N, D).

    A GPU uses FlashAttention (Dao, 2023) in half precision, and the memory-efficient kernels (Rabe and Staats,
    2021) in float32. Both take the starts of parts, and neither has to prepare for each new shape. Other devices
    use a mask over the whole rows, which is also the reference for tests.
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
