"""Memory that stays in place: tensors of many sizes, of each one at a time, are cut out of the same storage.

What is recorded on a GPU (`nmt/system/cuda_graphs.py`) finds its tensors at the addresses that they had.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


class Reserve:
    """Storage by name, which grows to the largest tensor that was asked for under the name."""

    def __init__(self, device: torch.device, on_move: Callable[[], None]) -> None:
        """Begin with nothing.

        Args:
            device: Where the storage is.
            on_move: Called before storage is replaced: whoever knows the old addresses must forget them.
        """
        self.device = device
        self._on_move = on_move
        self._storages: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a tensor, whose values are whatever the last one of the name has left, and zeros at first.

        Tensors that were taken under the name before lie in the same place, or keep theirs if it was too small.
        """
        num_needed = math.prod(shape)
        storage = self._storages.get(name)
        if storage is None or storage.numel() < num_needed:
            if storage is not None and storage.numel() > 0:
                self._on_move()
                del self._storages[name], storage  # before the larger one is asked for
            storage = torch.zeros(num_needed, dtype=dtype, device=self.device)
            self._storages[name] = storage
        assert storage.dtype == dtype, f"{name} is {storage.dtype}"
        return storage[:num_needed].view(shape)

    def clear(self) -> None:
        """Give all storage back."""
        self._on_move()
        self._storages.clear()
