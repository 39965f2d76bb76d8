"""What the decoder reads besides its input: the memory of the source, and the state of the target prefix.

Shapes: B sentences, K beam size, R = B*K rows, S source length, T target length, H heads, E head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Memory:
    """The encoded source, projected to keys and values once for each decoder layer.

    All rows of a sentence (its beams) attend to the same memory, so it is never repeated for them.

    Attributes:
        keys: one (B, H, S, E) tensor for each decoder layer.
        values: the same for values.
        padding_mask: (B, S) bool, True at padding.
    """

    keys: list[Tensor]
    values: list[Tensor]
    padding_mask: Tensor

    def keep(self, sentences: Tensor) -> Memory:
        """Return the memory of the sentences (B',) that go on; the other sentences are not needed any more."""
        return self.select(sentences)

    def select(self, sentences: Tensor) -> Memory:
        """Return the memory of some sentences, given their (B',) int64 indices."""
        return Memory(
            keys=[keys[sentences] for keys in self.keys],
            values=[values[sentences] for values in self.values],
            padding_mask=self.padding_mask[sentences],
        )


@dataclass
class LayerState:
    """The self-attention keys and values of one decoder layer, in buffers that are larger than needed so far.

    Attributes:
        keys: (R, H, capacity, E), filled in the first `length` positions; None before the first position.
        values: the same for values.
        length: number of target positions held.
    """

    keys: Tensor | None = None
    values: Tensor | None = None
    length: int = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store new positions, and return all positions so far.

        Args:
            keys: (R, H, T, E), the keys of the new positions.
            values: the same for values.

        Returns:
            Keys and values of all positions so far, (R, H, length, E) each.
        """
        new_length = self.length + keys.size(2)
        self.keys = _write(self.keys, keys, self.length)
        self.values = _write(self.values, values, self.length)
        self.length = new_length
        return self.keys[:, :, :new_length], self.values[:, :, :new_length]

    def reorder_(self, rows: Tensor) -> None:
        """Let new row i continue old row `rows[i]`."""
        if self.keys is not None and self.values is not None:
            self.keys = self.keys.index_select(0, rows)
            self.values = self.values.index_select(0, rows)


@dataclass
class DecoderState:
    """What the decoder remembers of the target prefixes of R rows: one `LayerState` for each layer."""

    layers: list[LayerState] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Number of target positions that have been decoded."""
        return self.layers[0].length

    def reorder_(self, rows: Tensor) -> None:
        """Let new row i continue old row `rows[i]`; `rows` is (R',) int64, and R' may differ from R."""
        for layer in self.layers:
            layer.reorder_(rows)


def _write(buffer: Tensor | None, new: Tensor, start: int) -> Tensor:
    """Write `new` (R, H, T, E) at position `start` of the buffer; double the buffer when it is too small."""
    rows, heads, num_new, head_size = new.shape
    end = start + num_new
    if buffer is None or buffer.size(2) < end:
        capacity = max(16, end, 2 * start)
        grown = torch.empty((rows, heads, capacity, head_size), dtype=new.dtype, device=new.device)
        if buffer is not None:
            grown[:, :, :start] = buffer[:, :, :start]
        buffer = grown
    buffer[:, :, start:end] = new
    return buffer
