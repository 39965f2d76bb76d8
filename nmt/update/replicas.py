"""How copies of a model are kept on the ranks, and how the gradient of an update comes together from them.

`Alone` is one rank, `Ddp` keeps a whole copy on each of several. `Sharded` (`nmt/update/sharded.py`) keeps a part
on each. `Recorded` (`nmt/update/recorded.py`) is for batches of one shape, on any number of ranks. The trainer
knows only the protocol.
"""

import warnings
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nmt.distributed import World
from nmt.options import OptimizationOptions
from nmt.task import Batch, LossOutput, Task
from nmt.update.kept_weights import KeptWeights, WholeWeights
from nmt.update.objective import Objective
from nmt.update.precision import Precision
from nmt.update.recorded import Recorded
from nmt.update.sharded import Sharded


class Replicas(Protocol):
    """Sums the gradients of the micro-batches of an update, each of a loss times a factor, over all ranks."""

    objective: nn.Module
    """Called with a batch on the device it returns the `LossOutput`, in the precision's type."""
    can_run_alone: bool
    """Whether the objective runs without the other ranks, so that it may fail on one rank alone."""
    loss_factor: float
    """Factor of each loss that makes a mean over ranks a sum: the number of ranks; 1 where sums are formed."""
    num_copies: int
    """At most this many more tensors as large as all parameters exist while a gradient is summed."""

    @property
    def weights(self) -> KeptWeights:
        """Where the weights lie."""

    def start(self) -> None:
        """Take in the weights as they are now; before the first micro-batch of an update."""

    def add(self, batch: Any, factor: Tensor, *, is_last: bool) -> LossOutput:
        """Add the gradient of a micro-batch, on its device or on the CPU.

        Args:
            batch: The micro-batch.
            factor: Scalar on the device.
            is_last: Whether it is this rank's last one. Once that is added, the sum over ranks is formed too.

        Returns:
            The loss without the factor.
        """

    def gradients(self) -> list[Tensor]:
        """Return what this rank keeps of the sum, after the last micro-batch; its optimizer sees it too."""

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """Return the norm of the whole gradient, a scalar that is the same on every rank."""

    def clear(self) -> None:
        """Begin anew."""

    def give_back(self) -> None:
        """Before other work, free memory that only updates can use, if it is much."""

    def close(self) -> None:
        """Let go of what keeps the ranks' connections open."""


def build_replicas(
    task: Task[Any],
    model: nn.Module,
    options: OptimizationOptions,
    *,
    precision: Precision,
    world: World,
    has_one_shape: bool,
) -> Replicas:
    """Return the replicas that the options ask for.

    Args:
        task: Computes the loss.
        model: On the world's device, with the weights to begin with.
        options: Of the updates.
        precision: The type to compute in.
        world: The ranks.
        has_one_shape: Whether all batches have one shape (`StaticBatch`).
    """
    if options.shard_weights and world.size > 1:
        return Sharded(task, model, precision, world)
    objective = precision.wrap(Objective(task, model), model)
    if has_one_shape:
        return Recorded(objective, task, model, precision, world, is_compiled=options.compile)
    if world.size > 1:
        return Ddp(objective, model, precision, world)
    return Alone(objective, model, precision, world.device)


class Alone:
    """A single rank: gradients lie where `backward` puts them."""

    can_run_alone = True
    loss_factor = 1.0
    num_copies = 0

    def __init__(
        self, objective: nn.Module, model: nn.Module, precision: Precision, device: torch.device
    ) -> None:
        self.objective = objective
        self.weights = WholeWeights(model)
        self._precision = precision
        self._device = device

    def start(self) -> None:
        """Nothing is to be done: the parameters themselves are used."""

    def add(self, batch: Batch, factor: Tensor, *, is_last: bool) -> LossOutput:
        """Run forward and backward."""
        output: LossOutput = self.objective(batch.to(self._device))
        (output.loss * self._precision.scale(factor)).backward()
        return output

    def gradients(self) -> list[Tensor]:
        """Return the gradient of each parameter that has one."""
        return _gradients(self.weights)

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """Return the norm of all of them together."""
        return nn.utils.get_total_norm(gradients)

    def clear(self) -> None:
        """Free the gradients."""
        _clear(self.weights)

    def give_back(self) -> None:
        """Nothing is to be done: what was used is free for all."""

    def close(self) -> None:
        """Nothing is open."""


class Ddp:
    """A whole copy on each of several ranks: DistributedDataParallel takes the mean during the backward pass."""

    can_run_alone = True
    num_copies = 1  # DDP's buckets

    def __init__(self, objective: nn.Module, model: nn.Module, precision: Precision, world: World) -> None:
        self.loss_factor = float(world.size)
        self.objective = objective
        self.weights = WholeWeights(model)
        self._precision = precision
        self._world = world
        # Looking for unused parameters keeps DDP from re-ordering its buckets after the first update. Otherwise a
        # resumed run would sum in another order than one that was never stopped. Some tasks have such parameters.
        warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")  # from torch 2.13 on
        self._ddp: DistributedDataParallel | None = DistributedDataParallel(
            objective, broadcast_buffers=bool(self.weights.statistics), find_unused_parameters=True
        )

    def start(self) -> None:
        """Nothing is to be done: the parameters themselves are used."""

    def add(self, batch: Batch, factor: Tensor, *, is_last: bool) -> LossOutput:
        """Run forward and backward; DDP sums over ranks in the last backward pass alone."""
        assert self._ddp is not None, "no update can follow `close`"
        with nullcontext() if is_last else self._ddp.no_sync():
            output: LossOutput = self._ddp(batch.to(self._world.device))
            loss = output.loss * self._precision.scale(factor)
            if is_last:
                self._world.backward(loss)
            else:
                loss.backward()
        return output

    def gradients(self) -> list[Tensor]:
        """Return the gradient of each parameter that has one."""
        return _gradients(self.weights)

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """Return the norm of all of them together."""
        return nn.utils.get_total_norm(gradients)

    def clear(self) -> None:
        """Free the gradients."""
        _clear(self.weights)

    def give_back(self) -> None:
        """Nothing is to be done: what was used is free for all."""

    def close(self) -> None:
        """Let go of DDP, which keeps the process group."""
        self._ddp = None


def _gradients(kept: WholeWeights) -> list[Tensor]:
    return [parameter.grad for parameter in kept.trained.values() if parameter.grad is not None]


def _clear(kept: WholeWeights) -> None:
    for parameter in kept.trained.values():
        parameter.grad = None
