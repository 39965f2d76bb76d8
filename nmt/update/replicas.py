"""How copies of a model are kept on the ranks, and how the gradient of an update comes together from them.

`Whole` keeps a whole copy on each rank, `Sharded` (`nmt/update/sharded.py`) a part. `Recorded`
(`nmt/update/recorded.py`) is for batches of one shape. The trainer knows only the protocol.
"""

import warnings
from contextlib import nullcontext
from typing import Any, Protocol

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
    return Whole(objective, model, precision, world)


class Whole:
    """A whole copy on each rank. Gradients lie where `backward` puts them.

    Where there are several ranks, DistributedDataParallel takes their mean during the backward pass.
    """

    can_run_alone = True

    def __init__(self, objective: nn.Module, model: nn.Module, precision: Precision, world: World) -> None:
        self.loss_factor = float(world.size)
        self.num_copies = 0 if world.size == 1 else 1  # DDP's buckets
        self.objective = objective
        self.weights = WholeWeights(model)
        self._precision = precision
        self._world = world
        self._run: Any = objective
        if world.size > 1:
            self._run = _in_ddp(objective, has_statistics=bool(self.weights.statistics))

    def start(self) -> None:
        """Nothing is to be done: the parameters themselves are used."""

    def add(self, batch: Batch, factor: Tensor, *, is_last: bool) -> LossOutput:
        """Run forward and backward; DDP sums over ranks in the last backward pass alone."""
        with nullcontext() if is_last or self._world.size == 1 else self._run.no_sync():
            output: LossOutput = self._run(batch.to(self._world.device))
            loss = output.loss * self._precision.scale(factor)
            if is_last:
                self._world.backward(loss)
            else:
                loss.backward()
        return output

    def gradients(self) -> list[Tensor]:
        """Return the gradient of each parameter that has one."""
        return [p.grad for p in self.weights.trained.values() if p.grad is not None]

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """Return the norm of all of them together."""
        return nn.utils.get_total_norm(gradients)

    def clear(self) -> None:
        """Free the gradients."""
        for parameter in self.weights.trained.values():
            parameter.grad = None

    def give_back(self) -> None:
        """Nothing is to be done: what was used is free for all."""

    def close(self) -> None:
        """Let go of DDP, which keeps the process group."""
        self._run = nn.Identity()


def _in_ddp(objective: nn.Module, *, has_statistics: bool) -> DistributedDataParallel:
    # Looking for unused parameters keeps DDP from re-ordering its buckets after the first update. Otherwise a
    # resumed run would sum in another order than one that was never stopped. Some tasks have such parameters.
    warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")  # from torch 2.13 on
    return DistributedDataParallel(objective, broadcast_buffers=has_statistics, find_unused_parameters=True)
