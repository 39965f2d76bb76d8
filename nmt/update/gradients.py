"""How the gradient of an update comes together from its micro-batches and ranks.

`ReducedGradients` is for any batch: DistributedDataParallel takes the mean over ranks during the backward pass.
`FlatGradients` is for batches of one shape: all gradients lie in one tensor, and a micro-batch is one recording.
"""

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nmt.checkpoints.weights import weights
from nmt.distributed import World
from nmt.system.cuda_graphs import Recording
from nmt.task import Batch, LossOutput, StaticBatch, Task
from nmt.update.compilation import compile_layers
from nmt.update.precision import Precision


class Gradients(Protocol):
    """Sums the gradients of the micro-batches of an update, each of a loss times a factor."""

    loss_factor: float
    """What undoes, in the factor of each loss, that a mean is taken over ranks: their number, or 1."""
    num_copies: int
    """How many tensors as large as all parameters there are besides, at most, while a gradient is summed."""

    def start(self) -> None:
        """Take in the weights as they are now; before the first micro-batch of an update."""

    def add(self, batch: Any, factor: Tensor, *, is_last: bool) -> LossOutput:
        """Add the gradient of a micro-batch, on its device or on the CPU.

        Args:
            batch: The micro-batch.
            factor: Scalar on the device.
            is_last: Whether it is the last one of this rank; then the sum over ranks is formed too.

        Returns:
            The loss without the factor.
        """

    def tensors(self) -> list[Tensor]:
        """Return the gradients, the same on all ranks after the last micro-batch."""

    def clear(self) -> None:
        """Begin anew."""

    def give_back(self) -> None:
        """Give memory back that nothing else can use, if it is much, before work of another kind."""

    def close(self) -> None:
        """Let go of what keeps the ranks' connections open."""


class ReducedGradients:
    """Gradients in the parameters, where `backward` puts them."""

    def __init__(
        self,
        objective: nn.Module,
        parameters: Sequence[nn.Parameter],
        precision: Precision,
        world: World,
        *,
        has_statistics: bool,
    ) -> None:
        """Wrap what is called with a batch for several ranks.

        Args:
            objective: Returns the loss of a batch, in the precision's type.
            parameters: Those that are trained.
            precision: Scales the loss.
            world: The ranks.
            has_statistics: Whether buffers of the objective, such as batch norm's, are to be rank 0's.
        """
        self.loss_factor = float(world.size)
        self.num_copies = 1 if world.size > 1 else 0  # DDP's buckets
        self._objective: nn.Module = objective
        self._parameters = parameters
        self._precision = precision
        self._device, self._world = world.device, world
        if world.size > 1:
            # Looking for unused parameters keeps DDP from re-ordering its buckets after the first update, by which
            # a resumed run would sum in another order than one that was never stopped. A task may have some, too.
            warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
            warnings.filterwarnings(
                "ignore", message="`broadcast_buffers` is deprecated"
            )  # from torch 2.13 on
            self._objective = DistributedDataParallel(
                objective, broadcast_buffers=has_statistics, find_unused_parameters=True
            )

    def start(self) -> None:
        """Nothing is to be done: the parameters themselves are used."""

    def add(self, batch: Batch, factor: Tensor, *, is_last: bool) -> LossOutput:
        """Run forward and backward; DDP sums over ranks in the last backward pass alone."""
        objective = self._objective
        waits = isinstance(objective, DistributedDataParallel) and not is_last
        with cast(DistributedDataParallel, objective).no_sync() if waits else nullcontext():
            output: LossOutput = objective(batch.to(self._device))
            loss = output.loss * self._precision.scale(factor)
            if is_last and self._world.size > 1:
                self._world.backward(loss)
            else:
                loss.backward()
        return output

    def tensors(self) -> list[Tensor]:
        """Return the gradient of each parameter that has one."""
        return [parameter.grad for parameter in self._parameters if parameter.grad is not None]

    def clear(self) -> None:
        """Free the gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    def give_back(self) -> None:
        """Nothing is to be done: what was used is free for all."""

    def close(self) -> None:
        """Let go of DDP, which keeps the process group."""
        self._objective = nn.Identity()


class FlatGradients:
    """The gradients of batches of one shape, side by side in one tensor.

    A micro-batch is one recording (`nmt/system/cuda_graphs.py`): the same kernels on the same memory each time.
    The weights are turned to the precision's type once an update, into a model that is a copy of the one in
    training. Ranks add up their tensors after the last micro-batch.
    """

    loss_factor = 1.0
    num_copies = 2  # the gradients of a micro-batch one by one, and side by side

    def __init__(
        self, task: Task[Any], model: nn.Module, precision: Precision, world: World, *, is_compiled: bool
    ) -> None:
        """Let the gradients of `model`, which is on the world's device, be parts of one tensor of zeros.

        Args:
            task: Computes the loss of a `StaticBatch` without looking at its counts, and without what Python
                decides anew from batch to batch.
            model: The model in training.
            precision: The type to compute in.
            world: The ranks.
            is_compiled: Whether torch compiles the model's layers.
        """
        self._task = task
        self._precision = precision
        self._world = world
        self._parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        (dtype,) = {parameter.dtype for parameter in self._parameters}
        num_numbers = sum(parameter.numel() for parameter in self._parameters)
        for parameter in self._parameters:
            world.copy_from_main_(parameter.detach())
        self._flat = torch.zeros(num_numbers, dtype=dtype, device=world.device)
        self._computing = precision.copy_of(model)
        self._weights: list[Tensor] = [p for p in self._computing.parameters() if p.requires_grad]
        self._copies = [] if self._computing is model else _values(self._computing)
        self._originals = _values(model)
        if is_compiled:
            compile_layers(self._computing)
        self._factor = torch.zeros((), dtype=world.sum_dtype, device=world.device)
        self._batch: Any = None  # made by the first micro-batch
        self._sum_names: list[str] = []
        self._sums = self._factor  # likewise
        # What is computed again in the backward pass draws its random numbers again: the host turns the generator
        # back, which a recording may forbid.
        is_recorded = not any(getattr(x, "activation_checkpointing", False) for x in model.modules())
        self._recording = Recording(self._compute, world.device if is_recorded else torch.device("cpu"))
        self.clear()

    @torch.no_grad()
    def start(self) -> None:
        """Turn the weights to the type that is computed in, those that are not trained too: they may be loaded."""
        self._computing.train()
        if self._copies:
            torch._foreach_copy_(self._copies, self._originals)

    def add(self, batch: StaticBatch, factor: Tensor, *, is_last: bool) -> LossOutput:
        """Run forward and backward by the recording."""
        if self._batch is None:
            self._batch = batch.to(self._world.device).clone()
        self._batch.copy_(batch)
        self._factor.copy_(factor)
        self._recording()
        if is_last:
            self._world.sum_in_update_(self._flat)
        loss, *sums = self._sums.clone().unbind()  # the next micro-batch overwrites them
        return LossOutput(loss, dict(zip(self._sum_names, sums, strict=True)))

    def tensors(self) -> list[Tensor]:
        """Return the one tensor."""
        return [self._flat]

    @torch.no_grad()
    def clear(self) -> None:
        """Fill with zeros; the parameters' gradients are views of the tensor, if they have been anything else."""
        self._flat.zero_()
        parts = self._flat.split([parameter.numel() for parameter in self._parameters])
        for parameter, part in zip(self._parameters, parts, strict=True):
            if parameter.grad is None or parameter.grad.data_ptr() != part.data_ptr():
                parameter.grad = part.view_as(parameter)

    def give_back(self) -> None:
        """Forget a recording that holds more than half of the GPU's memory."""
        if self._recording.num_bytes > _most_recorded_bytes(self._world.device):
            self._sums = self._factor  # they lie in that memory
            self._recording.forget()
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Nothing is open."""

    def _compute(self) -> None:
        """Add a micro-batch's gradient; what is recorded."""
        output = self._task.compute_loss(self._computing, self._batch)
        scaled = output.loss * self._precision.scale(self._factor)
        gradients = torch.autograd.grad(scaled, self._weights, materialize_grads=True)
        self._flat.add_(torch.cat([gradient.reshape(-1) for gradient in gradients]))
        self._sum_names = list(output.sums)
        values = [output.loss.detach(), *output.sums.values()]
        self._sums = torch.stack([_scalar(value, like=self._factor) for value in values])


def _most_recorded_bytes(device: torch.device) -> int:
    """Return how much memory a recording of updates may keep during a validation."""
    return torch.cuda.get_device_properties(device).total_memory // 2 if device.type == "cuda" else 0


def _values(model: nn.Module) -> list[Tensor]:
    """Return the parameters of a model, and the buffers that are saved with it, tied ones once."""
    return list(weights(model).values())


def _scalar(value: Tensor | float, *, like: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.reshape(()).to(like.dtype)
    return torch.full_like(like, value)
