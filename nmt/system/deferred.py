"""What the device computes and the host wants to know some time later, without waiting in between."""

from typing import Any

import torch
from torch import Tensor


class Late:
    """A tensor on its way to the host; on the CPU it is there already."""

    def __init__(self, tensor: Tensor) -> None:
        """Start the copy. On the CPU there is none: the tensor must not change afterwards."""
        self._tensor, self._copied = tensor, None
        if tensor.is_cuda:
            # Pinned, or the copy would wait for the device after all.
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> Any:
        """Return the values, as `Tensor.tolist` does, waiting for the device if it has not got there."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._tensor.tolist()


class LateNumber:
    """A number of each update, read when the next one comes: the host need not wait for it.

    Where there is nothing to wait for, it is read at once.
    """

    def __init__(self) -> None:
        """Begin with nothing to read."""
        self._waiting: Late | None = None

    def exchange(self, number: Tensor) -> float:
        """Hand in a scalar, and return the one before it (where it is not on a GPU: this one), or 0."""
        if not number.is_cuda:
            return number.item()
        before, self._waiting = self._waiting, Late(number)
        return 0.0 if before is None else before.read()
