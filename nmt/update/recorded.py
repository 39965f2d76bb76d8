"""Replicas whose updates are recorded: for batches of one shape, each rank has all gradients in one tensor."""

from typing import Any

import torch
from torch import Tensor, nn

from nmt.checkpoints.weights import weights
from nmt.distributed import World
from nmt.system.cuda_graphs import Recording
from nmt.task import LossOutput, StaticBatch, Task
from nmt.update.compilation import compile_layers
from nmt.update.kept_weights import WholeWeights
from nmt.update.precision import Precision


class Recorded:
    """The gradients of batches of one shape, side by side in one tensor.

    A micro-batch is one recording (`nmt/system/cuda_graphs.py`): the same kernels on the same memory each time.

        model (float32) --start--> copy (bf16) --+
                                                 +--> forward and backward --> added to _flat --> sum of all ranks
        batch -----------add-----> _batch -------+    (recorded, then replayed)                  (after the last
                                                                                                  micro-batch)
        _flat                  [ gradient of weight 1 | of weight 2 | of weight 3 | ... ]
        parameter.grad           a view                 a view        a view

    The copy is made once an update. In float32 there is none: the model itself computes.
    """

    can_run_alone = True
    loss_factor = 1.0
    num_copies = 2  # the gradients of a micro-batch one by one, and side by side

    def __init__(
        self,
        objective: nn.Module,
        task: Task[Any],
        model: nn.Module,
        precision: Precision,
        world: World,
        *,
        is_compiled: bool,
    ) -> None:
        """Let the gradients of `model`, which is on the world's device, be parts of one tensor of zeros.

        Args:
            objective: Returns the loss of a batch without being recorded.
            task: Computes the loss of a `StaticBatch` without looking at its counts, and without what Python
                decides anew from batch to batch.
            model: The model in training.
            precision: The type to compute in.
            world: The ranks.
            is_compiled: Whether torch compiles the model's layers.
        """
        self.objective = objective
        self.weights = WholeWeights(model)
        self._task = task
        self._precision = precision
        self._world = world
        self._parameters: list[Tensor] = list(self.weights.trained.values())
        (dtype,) = {parameter.dtype for parameter in self._parameters}
        num_numbers = sum(parameter.numel() for parameter in self._parameters)
        for parameter in self._parameters:
            world.copy_from_main_(parameter.detach())
        self._flat = torch.zeros(num_numbers, dtype=dtype, device=world.device)
        self._computing = precision.copy_of(model)
        self._computed: list[Tensor] = [p for p in self._computing.parameters() if p.requires_grad]
        self._copies = [] if self._computing is model else _values(self._computing)
        self._originals = _values(model)
        if is_compiled:
            compile_layers(self._computing)
        self._factor = torch.zeros((), dtype=world.sum_dtype, device=world.device)
        self._batch: Any = None  # made by the first micro-batch
        self._sum_names: list[str] = []
        self._sums = self._factor  # until the first micro-batch makes its own
        # Activation checkpointing computes layers again in the backward pass, with the same random numbers. For
        # that the host sets the generator back, which a recording may forbid.
        is_recorded = not any(getattr(x, "activation_checkpointing", False) for x in model.modules())
        self._recording = Recording(self._compute, world.device if is_recorded else torch.device("cpu"))
        self.clear()

    @torch.no_grad()
    def start(self) -> None:
        """Copy the weights into the computing model, untrained ones too, since they may just have been loaded."""
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

    def gradients(self) -> list[Tensor]:
        """Return the one tensor."""
        return [self._flat]

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """Return the norm of the one tensor."""
        return nn.utils.get_total_norm(gradients)

    @torch.no_grad()
    def clear(self) -> None:
        """Fill the tensor with zeros, and make each parameter's gradient a view of it again if it is not."""
        self._flat.zero_()
        parts = self._flat.split([parameter.numel() for parameter in self._parameters])
        for parameter, part in zip(self._parameters, parts, strict=True):
            if parameter.grad is None or parameter.grad.data_ptr() != part.data_ptr():
                parameter.grad = part.view_as(parameter)

    def give_back(self) -> None:
        """Forget a recording that holds more than half of the GPU's memory."""
        if self._recording.num_bytes > _most_recorded_bytes(self._world.device):
            self._sums = self._factor  # the sums lie in the recording's memory
            self._recording.forget()
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Nothing is open."""

    def _compute(self) -> None:
        """Add a micro-batch's gradient. This is what is recorded."""
        output = self._task.compute_loss(self._computing, self._batch)
        scaled = output.loss * self._precision.scale(self._factor)
        gradients = torch.autograd.grad(scaled, self._computed, materialize_grads=True)
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
