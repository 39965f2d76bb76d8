"""What the decoder of `inference.py` knows besides its input: the memory, and the past of each hypothesis.

The past stays where it was written. The K hypotheses of a sentence share one table of keys and values, to which
each step adds K columns, and a mask says which columns are a hypothesis's own past. Where hypotheses branch and
die, rows of the mask are copied instead of keys and values. Columns from which no hypothesis descends are dropped
when the table is full.

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
    """The encoded source as all decoder layers attend to it.

    Attributes:
        parts: (L, 2, B, H, S, E), the keys and the values for each layer.
        padding: (B, S), -inf at padding and else 0, to be added to scores; of their type, which is float32 where
            parts are bfloat16 on a CPU.
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
        """Return the memory of the sentences (B',), which may come several times."""
        return InferenceMemory(self.parts[:, :, sentences], self.padding[sentences])

    def keep(self, sentences: Tensor) -> InferenceMemory:
        """Return the memory of the sentences (B',), fewer than B, in place of this one, which is lost."""
        _move_(self.parts, sentences, dim=2)
        return InferenceMemory(self.parts[:, :, : sentences.numel()], self.padding[sentences])


class Past(NamedTuple):
    """What one decoder layer attends to of the hypotheses, and where its newest columns lie."""

    room: Tensor  # (2, B, H, K, E)
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
        # Of each layer keys and values, (2, B' >= B, H, capacity, E): apart, to be replaced one by one.
        self._tables: list[Tensor] = []
        # Tables that are used whole, as they are returned, and their halves; none once they have changed.
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []
        self._is_used_whole = False  # whether all columns of the tables are returned, filled or not
        self._mask = torch.empty(0)  # (B, K, capacity): 0 where a column belongs to the hypothesis, else -inf

    def reorder_(self, rows: Tensor) -> None:
        """Let new row i go on from old row `rows[i]`, (R',) int64; the rows of a sentence stay together."""
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
        """Let K hypotheses go on from the single one that there is for each sentence."""
        self._mask = self._mask.expand(-1, beam_size, -1).contiguous()

    def add_columns(
        self, memory: InferenceMemory, beam_size: int, *, later: int
    ) -> tuple[list[Past], Tensor | None]:
        """Make columns for a new position, and return all.

        Args:
            memory: Of the sentences; the past has its sizes and its type.
            beam_size: K.
            later: K of the steps to come; at the first one it is 1.

        Returns:
            The past of each layer, whose newest columns are to be filled; and the mask (B, 1, K, N), None where
            every row sees every column.
        """
        if self.length == 0:
            num_layers, *sizes, source_length, head_size = memory.parts.shape
            self._is_used_whole = multiplied_by_onednn(memory.parts.dtype, memory.parts.device)
            filled = max(LEAST_WIDTH, _round_up(beam_size))
            capacity = filled if self._is_used_whole else max(filled, _first_capacity(source_length, later))
            self._tables = [memory.parts.new_empty((*sizes, capacity, head_size)) for _ in range(num_layers)]
            for table in self._tables:
                # What is read before it is filled is masked, but 0 times infinity is not a number.
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
        """Drop the columns that belong to no hypothesis.

        What is masked takes part in attention all the same, so tables of several hypotheses have little room, and
        get narrower too; the wider ones, float32's, a little more, since to copy them takes longer. With one
        hypothesis nothing dies, and room for half as much keeps the number of copies small.
        """
        self._seen = []  # or it would hold the tables that are replaced
        mask = self._mask[:, :, : self.num_columns]
        is_alive = (mask == 0).any(dim=1)  # (B, N)
        width = int(is_alive.sum(dim=1).max())
        # The columns alive come first, in their order. A sentence that has fewer keeps some that are masked.
        order = is_alive.byte().argsort(dim=1, descending=True, stable=True)  # (B, N)
        old_capacity = self._mask.size(2)
        eighths = 9 if self._is_used_whole else 10 if beam_size > 1 else 12
        capacity = _round_up((width + beam_size) * eighths // 8)
        # Whatever column fills the room is masked.
        columns = F.pad(order, (0, max(0, capacity - order.size(1))))[:, :capacity]  # (B, capacity)
        _, num_stored, num_heads, _, head_size = self._tables[0].shape
        blocks = torch.arange(2 * num_stored * num_heads, device=mask.device)
        blocks = blocks.view(2, num_stored, num_heads, 1)[:, : mask.size(0)]
        # (2, B, H, capacity) rows of E numbers: to copy rows is many times as fast as to gather in a dimension.
        rows = blocks * old_capacity + columns[:, None]
        spare = self._tables[0].new_empty(0, head_size)
        for layer, old in enumerate(self._tables):
            # What one layer leaves is where the next one goes: fresh memory takes as long as the copy.
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
    """Return for how many columns there is room at first: most translations are hardly longer than their source.

    Little more than is needed, because fresh memory costs more time than what is written into it. A third of the
    hypotheses' columns or more can be dropped by then.
    """
    return max(LEAST_WIDTH, _round_up(source_length * (beam_size + 1) * 2 // 3, 4))


def _round_up(num_columns: int, multiple: int = LEAST_WIDTH) -> int:
    return -(-num_columns // multiple) * multiple


def multiplied_by_onednn(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether products with a table of a type are oneDNN's: those of bfloat16 on a CPU.

    It copies what is part of a larger table before it multiplies it, and takes 0.2 ms to prepare for each new
    number of columns.
    """
    return dtype == torch.bfloat16 and device.type == "cpu"


def _move_(parts: Tensor, sentences: Tensor, *, dim: int) -> None:
    """Let the sentences (B',), fewer than B, take the first B' places of a dimension; copy those that move."""
    moves = (sentences != torch.arange(sentences.numel(), device=sentences.device)).nonzero().squeeze(1)
    by_sentence = parts.movedim(dim, 0)
    # An index, since `index_select` would first make all parts contiguous.
    by_sentence[moves] = by_sentence[sentences[moves]]
