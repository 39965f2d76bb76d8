"""Values that the device computes and the host reads some time later, so that it need not wait.

    train_step 1    train_step 2                  train_step 3
    queue copy 1    read copy 1, queue copy 2     read copy 2, queue copy 3

When the host reads a copy, the device has had a whole update's time to make it.
"""

from typing import Any

import torch
from torch import Tensor


class Late:
    """A tensor on its way to the host; on the CPU it is there already."""

    def __init__(self, tensor: Tensor) -> None:
        """Start the copy. On the CPU there is none: the tensor must not change afterwards."""
        self._tensor, self._copied = tensor, None
        if tensor.is_cuda:
            # Pinned memory: a copy to any other memory would wait for the device after all.
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> Any:
        """Return the values like `Tensor.tolist`; wait for the device if the copy is not there yet."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._tensor.tolist()


class LateNumber:
    """A number of each update. It is read when the next update hands in its own, so that the host need not wait.

    On a CPU there is nothing to wait for, so it is read at once.
    """

    def __init__(self) -> None:
        """Begin with nothing to read."""
        self._waiting: Late | None = None

    def exchange(self, number: Tensor) -> float:
        """Hand in a scalar and return the one before it, 0 at first; if it is not on a GPU, return it itself."""
        if not number.is_cuda:
            return number.item()
        before, self._waiting = self._waiting, Late(number)
        return 0.0 if before is None else before.read()
