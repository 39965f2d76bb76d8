"""Where the weights of a model lie: whole on each rank, or in parts."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import Tensor, nn

from nmt.checkpoints.weights import weights


class KeptWeights(Protocol):
    """The weights of a model as this rank keeps them. What is saved and loaded is always whole."""

    trained: Mapping[str, nn.Parameter]
    """What this rank's optimizer steps, by the names of the model's parameters."""
    statistics: list[Tensor]
    """What is saved besides parameters: buffers that change in training, such as batch norm's. Always whole."""

    def tensors(self) -> dict[str, Tensor]:
        """Return what this rank keeps of parameters and statistics, by name."""

    def sizes(self) -> dict[str, Tensor]:
        """Return tensors of the shapes and types of the whole weights, perhaps without content."""

    def whole(self, name: str, kept: Tensor) -> Tensor:
        """Return a whole tensor; every rank must call this.

        Args:
            name: Of a weight.
            kept: What this rank keeps of the weight itself, or of a state of the optimizer that belongs to it.
        """

    def part(self, name: str, whole: Tensor) -> Tensor:
        """Return what this rank keeps of a whole tensor: the opposite of `whole`."""

    def in_one_model(self) -> AbstractContextManager[nn.Module]:
        """Return a model with all weights, for use within the block; every rank must call this."""


class WholeWeights:
    """Each rank keeps everything: the model is as it is."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.trained: Mapping[str, nn.Parameter] = {
            name: p for name, p in model.named_parameters() if p.requires_grad
        }
        parameters = dict(model.named_parameters())
        self.statistics = [value for name, value in weights(model).items() if name not in parameters]

    def tensors(self) -> dict[str, Tensor]:
        """Return all weights."""
        return weights(self._model)

    def sizes(self) -> dict[str, Tensor]:
        """Return the weights themselves."""
        return weights(self._model)

    def whole(self, name: str, kept: Tensor) -> Tensor:
        """Return what is kept."""
        return kept

    def part(self, name: str, whole: Tensor) -> Tensor:
        """Return the whole."""
        return whole

    def in_one_model(self) -> AbstractContextManager[nn.Module]:
        """Return the model."""
        return nullcontext(self._model)
