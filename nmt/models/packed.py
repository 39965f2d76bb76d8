"""Sentences one after another in one row, and attention that stays within each of them.

Shapes: N tokens of a row, P parts of it, H heads, E head size, D model.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class PackedTokens:
    """A row of token ids that is made of parts: sentences, and what fills the row."""

    ids: Tensor
    """(N,) integers."""
    positions: Tensor
    """(N,) integers: the place of each token in its part, from 0."""
    starts: Tensor
    """(P+1,) int32: where each part begins, and N; a part may be empty."""
    longest: int
    """No part has more tokens."""


@dataclass(frozen=True)
class Spans:
    """Which tokens attend to which: those of part i of one row to those of part i of another, or of the same."""

    query_starts: Tensor  # (P+1,) int32
    key_starts: Tensor  # (P+1,) int32
    longest_query: int
    longest_key: int

    @classmethod
    def between(cls, queries: PackedTokens, keys: PackedTokens) -> "Spans":
        """Return the spans of two rows."""
        return cls(queries.starts, keys.starts, queries.longest, keys.longest)


def attend_within(
    query: Tensor, keys: Tensor, values: Tensor, spans: Spans, *, is_causal: bool, dropout: float
) -> Tensor:
    """Compute softmax(Q K^T / sqrt(E)) V for each head and each part.

    On a GPU by FlashAttention (Dao, 2023) in half precision, and by the memory-efficient kernels (Rabe and Staats,
    2021) in float32: both take starts of parts, and neither plans anew for another shape. Elsewhere by a mask over
    the whole rows: the reference for tests.

    Args:
        query: (1, H, N, E).
        keys: (1, H, M, E).
        values: (1, H, M, E).
        spans: P parts of the N and of the M tokens.
        is_causal: Each token attends to those up to itself in its part (a row to itself).
        dropout: Probability with which an attention weight is dropped.

    Returns:
        (1, N, D): the heads side by side.
    """
    if not query.is_cuda:
        mask = _mask(spans, query.size(2), keys.size(2), is_causal=is_causal)
        heads = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, dropout_p=dropout)
        return heads.transpose(1, 2).flatten(2)  # (1, H, N, E) -> (1, N, D)
    by_token = [x.transpose(1, 2) for x in (query, keys, values)]  # (1, H, N, E) -> (1, N, H, E)
    if query.dtype in (torch.bfloat16, torch.float16) and query.size(3) % 8 == 0 and query.size(3) <= 256:
        heads = torch.ops.aten._flash_attention_forward(
            *(x.squeeze(0) for x in by_token),
            *(spans.query_starts, spans.key_starts, spans.longest_query, spans.longest_key),
            *(dropout, is_causal, False),
        )[0]
        return heads.flatten(1)[None]  # (N, H, E) -> (1, N, D)
    heads = torch.ops.aten._efficient_attention_forward(
        *by_token,
        None,  # bias
        *(spans.query_starts, spans.key_starts, spans.longest_query, spans.longest_key),
        *(dropout, 1 if is_causal else 0, torch.is_grad_enabled()),  # 1: causal from the top left
    )[0]
    return heads.flatten(2)  # (1, N, H, E) -> (1, N, D)


def _mask(spans: Spans, num_queries: int, num_keys: int, *, is_causal: bool) -> Tensor:
    """Return where attention is allowed: (N, M) bool."""
    places = [
        torch.arange(count, dtype=starts.dtype, device=starts.device)
        for count, starts in ((num_queries, spans.query_starts), (num_keys, spans.key_starts))
    ]
    # The part of a token is the number of starts up to it; empty parts have the same start as the next one.
    parts = [
        torch.searchsorted(starts, place, right=True)
        for place, starts in zip(places, (spans.query_starts, spans.key_starts), strict=True)
    ]
    mask = parts[0][:, None] == parts[1][None, :]
    return mask & (places[0][:, None] >= places[1][None, :]) if is_causal else mask
