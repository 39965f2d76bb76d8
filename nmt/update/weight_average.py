"""The exponential moving average of a model's weights (`--ema-decay`)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class AveragedWeights:
    """The running mean of weights (Polyak averaging with a decay): of whole weights, or of a rank's part of them.

    After update n the mean moves towards the weights by 1 - min(decay, (1 + n) / (10 + n)): the weights of the
    first updates are forgotten sooner, as in TensorFlow's ExponentialMovingAverage. Integers, such as batch
    norm's counters, are copied.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        """Start from the weights as they are; they are changed in place."""
        self._weights = weights
        self._decay = decay
        self._mean = {name: tensor.clone() for name, tensor in self._weights.items()}

    @torch.no_grad()
    def update(self, num_updates: int, *, is_cancelled: Tensor) -> None:
        """Take in the weights after an update.

        Args:
            num_updates: The number of updates so far, this one included.
            is_cancelled: Scalar bool on the device: the update was not made, so the mean stays.
        """
        share = 1.0 - min(self._decay, (1 + num_updates) / (10 + num_updates))
        share_if_made = torch.where(is_cancelled, 0.0, share)
        for name, tensor in self._weights.items():
            if tensor.is_floating_point():
                self._mean[name].lerp_(tensor, share_if_made.to(tensor.dtype))
            else:
                self._mean[name].copy_(tensor)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model have the mean for its weights within the block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def trained(self) -> dict[str, Tensor]:
        """Return the weights that are being trained, by name; call it while the mean is in place."""
        return dict(self._mean)

    @torch.no_grad()
    def restart(self, trained: Mapping[str, Tensor]) -> None:
        """Take the model's weights as the mean, and give the model the weights in training."""
        for name, tensor in self._weights.items():
            self._mean[name].copy_(tensor)
            tensor.copy_(trained[name])

    @torch.no_grad()
    def _swap(self) -> None:
        for name, tensor in self._weights.items():
            other = self._mean[name].clone()
            self._mean[name].copy_(tensor)
            tensor.copy_(other)
