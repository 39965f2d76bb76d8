"""Memory that stays in place: tensors of different sizes are cut out of the same storage, one after the other.

A recording of a GPU (`nmt/system/cuda_graphs.py`) needs its tensors at the addresses that they had.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


class Reserve:
    """Storages by name. A storage grows to the largest tensor that was asked for under its name."""

    def __init__(self, device: torch.device, on_move: Callable[[], None]) -> None:
        """Begin with nothing.

        Args:
            device: Where the storage is.
            on_move: Called before a storage is replaced. It must forget all old addresses.
        """
        self.device = device
        self._on_move = on_move
        self._storages: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a tensor of this name. It holds zeros at first, later what the last tensor of the name has left.

        Earlier tensors of the same name lie in the same memory. If that memory was too small, they keep it.
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
