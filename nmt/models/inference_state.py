"""What the decoder of `inference.py` reads besides its input: the memory, and the past of each hypothesis.

Keys and values stay where they were written. The K hypotheses of a sentence share one table of keys and values.
Each step adds K columns to it, and a mask says which columns are a hypothesis's own past. When hypotheses branch
and die, rows of the mask are copied instead of keys and values. When the table is full, the columns that belong
to no hypothesis are dropped.

An example of one sentence with K = 3. In the mask x stands for 0 (own past) and . for -inf.

    step 1: eos goes to column 0. It is computed once for all three, and `branch` copies its row of the mask.
    step 2: the search has chosen the tokens A, B, C. They go to columns 1 to 3.
    `reorder_([0, 0, 2])`: the best continuations are A D, A E and C F. B dies, and rows 0, 0, 2 are copied.
    step 3: the tokens D, E, F go to columns 4 to 6.

                  step 1    step 2          reorder_        step 3
                  eos       eos  A B C      eos  A B C      eos  A B C  D E F
    hypothesis 0   x         x   x . .       x   x . .       x   x . .  x . .
    hypothesis 1   x         x   . x .       x   x . .       x   x . .  . x .
    hypothesis 2   x         x   . . x       x   . . x       x   . . x  . . x

    Now column B belongs to nobody. `_make_room` drops it when the table is full.

Shapes: B sentences, K beam size, R = B*K rows, S source length, N columns of the past, L layers, H heads,
E head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nmt.models.training_ops import LEAST_WIDTH


@dataclass(frozen=True)
class InferenceMemory:
    """The encoded source, as keys and values for all decoder layers.

    Attributes:
        parts: (L, 2, B, H, S, E), the keys and the values for each layer.
        padding: (B, S), -inf at padding and else 0. It is added to attention scores and has their type: float32
            where `parts` are bfloat16 on a CPU, else the type of `parts`.
    """

    parts: Tensor
    padding: Tensor

    @cached_property
    def tables(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values (B, H, S, E) of each layer."""
        return [(keys, values) for keys, values in self.parts]

    @cached_property
    def mask(self) -> Tensor:
        """The padding (B, 1, 1, S)."""
        return self.padding[:, None, None]

    def select(self, sentences: Tensor) -> InferenceMemory:
        """Return the memory of the sentences (B',); a sentence may be named several times."""
        return InferenceMemory(self.parts[:, :, sentences], self.padding[sentences])

    def keep(self, sentences: Tensor) -> InferenceMemory:
        """Return the memory of the sentences (B',), fewer than B. It overwrites this memory."""
        _move_(self.parts, sentences, dim=2)
        return InferenceMemory(self.parts[:, :, : sentences.numel()], self.padding[sentences])


class Past(NamedTuple):
    """The keys and values of the hypotheses for one decoder layer, and the place of its newest columns."""

    room: Tensor  # (2, B, H, K, E): a view of the newest columns, which the layer fills
    keys: Tensor  # (B, H, N, E)
    values: Tensor  # (B, H, N, E)


class BeamState:
    """What the decoder remembers of K hypotheses for each of B sentences.

    Attributes:
        length: Number of positions that have been decoded.
        num_columns: Number of columns that are filled; the K of the newest position stand last.
    """

    def __init__(self) -> None:
        self.length = 0
        self.num_columns = 0
        # Keys and values of each layer, (2, B' >= B, H, capacity, E). One tensor a layer, so that `_make_room`
        # can replace them one by one.
        self._tables: list[Tensor] = []
        # Views of each table: both parts, keys, values. Kept only while tables are used whole, because then the
        # views are the same at each step; emptied when the tables change.
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []
        self._is_used_whole = False  # whether all columns of the tables are returned, even unfilled ones
        self._mask = torch.empty(0)  # (B, K, capacity): 0 where a column belongs to the hypothesis, else -inf

    def reorder_(self, rows: Tensor) -> None:
        """Let new row i continue old row `rows[i]`, (R',) int64; the rows of a sentence stay together."""
        num_sentences, beam_size, capacity = self._mask.shape
        if beam_size == 1 and rows.numel() == num_sentences:
            return
        self._mask = self._mask.flatten(0, 1)[rows].view(-1, beam_size, capacity)
        if rows.numel() < num_sentences * beam_size:
            sentences = rows.view(-1, beam_size)[:, 0] // beam_size
            for table in self._tables:
                _move_(table[:, :, :, : self.num_columns], sentences, dim=1)
            self._seen = []

    def branch(self, beam_size: int) -> None:
        """Let K hypotheses continue the only hypothesis of each sentence."""
        self._mask = self._mask.expand(-1, beam_size, -1).contiguous()

    def add_columns(
        self, memory: InferenceMemory, beam_size: int, *, later: int
    ) -> tuple[list[Past], Tensor | None]:
        """Add columns for a new position, and return all columns.

        Args:
            memory: The memory of the sentences; the past has the same sizes and type.
            beam_size: K in this step. At the first step it may be 1.
            later: K in the steps after it.

        Returns:
            The past of each layer, whose newest columns the caller must fill; and the mask (B, 1, K, N), or None
            if every row sees every column.
        """
        if self.length == 0:
            num_layers, *sizes, source_length, head_size = memory.parts.shape
            self._is_used_whole = multiplied_by_onednn(memory.parts.dtype, memory.parts.device)
            filled = max(LEAST_WIDTH, _round_up(beam_size))
            capacity = filled if self._is_used_whole else max(filled, _first_capacity(source_length, later))
            self._tables = [memory.parts.new_empty((*sizes, capacity, head_size)) for _ in range(num_layers)]
            for table in self._tables:
                # Columns that are not filled yet are masked, so they get weight 0. But 0 times infinity, which
                # fresh memory may hold, is not a number. So they begin as zeros.
                table[:, :, :, :filled] = 0.0
            self._mask = memory.padding.new_full((sizes[1], beam_size, capacity), -torch.inf)
        elif self.num_columns + beam_size > self._mask.size(2):
            self._make_room(beam_size)
        capacity = self._mask.size(2)
        new = slice(self.num_columns, self.num_columns + beam_size)
        self.num_columns += beam_size
        self.length += 1
        self._mask[:, :, new].diagonal(dim1=1, dim2=2).zero_()
        width = capacity if self._is_used_whole else max(self.num_columns, LEAST_WIDTH)
        sees_all = beam_size == 1 and width == self.num_columns
        mask = None if sees_all else self._mask[:, None, :, :width]
        seen = self._seen
        if not seen:
            used = [table[:, : self._mask.size(0), :, :width] for table in self._tables]
            seen = [(table, table[0], table[1]) for table in used]
            if self._is_used_whole:
                self._seen = seen
        return [Past(table[:, :, :, new], keys, values) for table, keys, values in seen], mask

    def _make_room(self, beam_size: int) -> None:
        """Copy the tables into new ones without the columns that belong to no hypothesis.

        The new tables get spare columns. Attention computes these, too, although they are masked, so there are
        few: an eighth where tables are used whole, else a quarter, because copying float32 takes longer. A table
        may even be narrower than the old one. With K = 1 no column is ever dropped, so outside of tables used
        whole a half is added, to copy rarely.
        """
        self._seen = []  # otherwise it would keep the old tables in memory
        mask = self._mask[:, :, : self.num_columns]
        is_alive = (mask == 0).any(dim=1)  # (B, N)
        width = int(is_alive.sum(dim=1).max())
        # Columns in use come first, in their order. All sentences get the same width, so a sentence with fewer
        # columns in use keeps some masked ones.
        order = is_alive.byte().argsort(dim=1, descending=True, stable=True)  # (B, N)
        old_capacity = self._mask.size(2)
        eighths = 9 if self._is_used_whole else 10 if beam_size > 1 else 12
        capacity = _round_up((width + beam_size) * eighths // 8)
        # The spare columns are masked, so it does not matter which columns fill them.
        columns = F.pad(order, (0, max(0, capacity - order.size(1))))[:, :capacity]  # (B, capacity)
        _, num_stored, num_heads, _, head_size = self._tables[0].shape
        blocks = torch.arange(2 * num_stored * num_heads, device=mask.device)
        blocks = blocks.view(2, num_stored, num_heads, 1)[:, : mask.size(0)]
        # (2, B, H, capacity) rows of E numbers: copying rows is many times as fast as gathering in a dimension.
        rows = blocks * old_capacity + columns[:, None]
        spare = self._tables[0].new_empty(0, head_size)
        for layer, old in enumerate(self._tables):
            # The old table of one layer becomes the new one of the next: fresh memory costs as much as the copy.
            if len(spare) < rows.numel():
                spare = old.new_empty(rows.numel(), head_size)
            new = spare[: rows.numel()]
            spare = old.view(-1, head_size)
            torch.index_select(spare, 0, rows.flatten(), out=new)
            self._tables[layer] = new.view(*rows.shape, head_size)
        self._mask = mask.new_full((*mask.shape[:2], capacity), -torch.inf)
        self._mask[:, :, :width] = mask.gather(2, order[:, None, :width].expand(-1, beam_size, -1))
        self.num_columns = width


def _first_capacity(source_length: int, beam_size: int) -> int:
    """Return how many columns a table has at first.

    Most translations are hardly longer than their source. When they reach its length, a third of the hypotheses'
    columns or more can be dropped. Larger tables would cost time: fresh memory takes longer to get than to fill.
    """
    return max(LEAST_WIDTH, _round_up(source_length * (beam_size + 1) * 2 // 3, 4))


def _round_up(num_columns: int, multiple: int = LEAST_WIDTH) -> int:
    return -(-num_columns // multiple) * multiple


def multiplied_by_onednn(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether oneDNN computes products with a table of this type: it does so for bfloat16 on a CPU.

    oneDNN copies a part of a larger table before it multiplies it, and it needs 0.2 ms to prepare for each new
    number of columns. So such tables are used whole.
    """
    return dtype == torch.bfloat16 and device.type == "cpu"


def _move_(parts: Tensor, sentences: Tensor, *, dim: int) -> None:
    """Move the sentences (B',), fewer than B, to the first B' places of a dimension; copy only those that move."""
    moves = (sentences != torch.arange(sentences.numel(), device=sentences.device)).nonzero().squeeze(1)
    by_sentence = parts.movedim(dim, 0)
    # An index, because `index_select` would first make all parts contiguous.
    by_sentence[moves] = by_sentence[sentences[moves]]
