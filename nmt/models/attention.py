"""Multi-head attention (Vaswani et al., 2017, section 3.2) in its two places; `attend` computes it by device.

Shapes: B sentences, K beam size, R = B*K rows, S source length, T target length, D model, H heads, E head size.
"""

import torch
from torch import Tensor, nn

from nmt.models.decoder_state import LayerState
from nmt.models.packed import Spans, attend_to_other, attend_to_self
from nmt.models.training_ops import Linear, attend, split_heads


class SelfAttention(nn.Module):
    """Attention of a sequence to itself; query, key and value are projected by one product."""

    def __init__(self, dim: int, num_heads: int, *, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.qkv_proj = Linear(dim, 3 * dim)
        self.out_proj = Linear(dim, dim)
        # fairseq draws q, k and v as separate (dim, dim) matrices and narrows them by 1/sqrt(2); these are views.
        for weight in self.qkv_proj.weight.chunk(3):
            nn.init.xavier_uniform_(weight, gain=2**-0.5)
        nn.init.zeros_(self.qkv_proj.bias)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        x: Tensor,
        *,
        attention_mask: Tensor | Spans | None = None,
        is_causal: bool = False,
        state: LayerState | None = None,
    ) -> Tensor:
        """Attend within `x`.

        Args:
            x: (R, T, D).
            attention_mask: bool, True where attention is allowed, broadcastable to (R, H, T, T); or the parts of a
                packed row. With these, `is_causal` and `state` are not used.
            is_causal: Position t attends to the positions up to t only.
            state: The positions before `x`. Every position of `x` may attend to them. `x` is added to the state.

        Returns:
            (R, T, D).
        """
        if isinstance(attention_mask, Spans):
            return self.out_proj(
                attend_to_self(
                    self.qkv_proj(x),
                    attention_mask,
                    num_heads=self.num_heads,
                    dropout=self.dropout if self.training else 0.0,
                )
            )
        assert attention_mask is None or not is_causal
        query, keys, values = split_heads(self.qkv_proj(x), 3, self.num_heads)
        if state is not None:
            num_new = x.size(1)
            keys, values = state.append(keys, values)
            if is_causal and num_new > 1:  # a single new token may see all positions, so it needs no mask
                everything = torch.ones(num_new, state.length, dtype=torch.bool, device=x.device)
                # Query t stands at position length - num_new + t.
                attention_mask = everything.tril(diagonal=state.length - num_new)
            is_causal = False
        dropout = self.dropout if self.training else 0.0
        return self.out_proj(
            attend(query, keys, values, attention_mask=attention_mask, is_causal=is_causal, dropout=dropout)
        )


class CrossAttention(nn.Module):
    """Attention of the target to the source, whose keys and values are projected once per sentence."""

    # Methods besides `forward` that use weights. `nmt/update/sharded.py` reads this list.
    entrances = ("project_memory", "attend_packed")

    def __init__(self, dim: int, memory_dim: int, num_heads: int, *, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.q_proj = Linear(dim, dim)
        self.kv_proj = Linear(memory_dim, 2 * dim)
        self.out_proj = Linear(dim, dim)
        for weight in (self.q_proj.weight, *self.kv_proj.weight.chunk(2)):
            nn.init.xavier_uniform_(weight, gain=2**-0.5)
        nn.init.xavier_uniform_(self.out_proj.weight)
        for linear in (self.q_proj, self.kv_proj, self.out_proj):
            nn.init.zeros_(linear.bias)

    def project_memory(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        """Project the encoder's output (B, S, memory_dim) to keys and values, (B, H, S, E) each."""
        keys, values = split_heads(self.kv_proj(encoded), 2, self.num_heads)
        return keys, values

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, *, attention_mask: Tensor) -> Tensor:
        """Let each row attend to the memory of its sentence.

        Args:
            x: (R, T, D), the K rows of a sentence side by side.
            keys: (B, H, S, E).
            values: (B, H, S, E).
            attention_mask: (B, 1, 1, S) bool, False at padding.

        Returns:
            (R, T, D).
        """
        num_sentences = keys.size(0)
        num_rows, length, dim = x.shape
        # The rows of a sentence are just more queries: (R, T, D) -> (B, K*T, D).
        queries = self.q_proj(x).reshape(num_sentences, -1, dim)
        dropout = self.dropout if self.training else 0.0
        (heads,) = split_heads(queries, 1, self.num_heads)
        attended = attend(heads, keys, values, attention_mask=attention_mask, dropout=dropout)
        return self.out_proj(attended).view(num_rows, length, dim)  # (B, K*T, D) -> (R, T, D)

    def weights(self, x: Tensor, keys: Tensor, *, padding_mask: Tensor) -> Tensor:
        """Return the attention weights of x (B, T, D) on keys (B, H, S, E): (B, T, S) float32, mean over heads."""
        (queries,) = split_heads(self.q_proj(x), 1, self.num_heads)  # (B, T, D) -> (B, H, T, E)
        scores = queries @ keys.transpose(2, 3) / queries.size(-1) ** 0.5  # (B, H, T, S)
        scores = scores.float().masked_fill(padding_mask[:, None, None, :], -torch.inf)
        return scores.softmax(dim=-1).mean(dim=1)

    def attend_packed(self, x: Tensor, memory: Tensor, spans: Spans) -> Tensor:
        """Let each part of a packed row attend to the same part of another row.

        Args:
            x: (1, N, D).
            memory: (1, M, memory_dim): the other row.
            spans: Which parts of the two rows belong together.

        Returns:
            (1, N, D).
        """
        dropout = self.dropout if self.training else 0.0
        query, projected = self.q_proj(x), self.kv_proj(memory)
        attended = attend_to_other(query, projected, spans, num_heads=self.num_heads, dropout=dropout)
        return self.out_proj(attended)
