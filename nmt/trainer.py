"""One update, one validation pass, and the state that outlives them.

The update is exact: the gradient is (sum over the targets of all ranks and micro-batches) / (their number).
The number is known before the forward pass, so each summed loss is scaled by world_size / number, and the
mean that DistributedDataParallel takes over ranks becomes the sum that is wanted:
(1 / W) * sum_r grad(W / N * L_r) = (1 / N) * sum_r grad L_r.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nmt.data.batch_iterator import MicroBatch
from nmt.distributed import LateNumber, World
from nmt.errors import UserError
from nmt.metrics import Metrics, merge_states
from nmt.optim import build_optimizer, build_schedule
from nmt.options import OptimizationOptions
from nmt.task import Batch, Examples, LossOutput, Task

_RESTORE = "Restore the checkpoint, or begin a new run."


class Trainer:
    """A model, its optimizer and its metrics; knows no task but through the protocol."""

    def __init__(
        self, task: Task[Any], model: nn.Module, options: OptimizationOptions, *, world: World, seed: int
    ) -> None:
        self.task = task
        self.model = model.to(world.device)
        self.world = world
        self.seed = seed
        self.clip_norm = options.clip_norm
        self.base_lr = options.lr
        self.schedule = build_schedule(options, max_update=options.max_update)
        self.optimizer = build_optimizer(self.model, options)
        self.metrics = Metrics()
        self.update = 0
        self.num_wanting_stop = 0.0
        self._late_votes = LateNumber()
        objective = _Objective(task, self.model)
        self.objective: nn.Module = objective
        if world.size > 1:
            # What is saved besides parameters are buffers that change in training (batch norm's statistics): all
            # ranks follow rank 0's.
            num_parameters = len(list(self.model.named_parameters(remove_duplicate=False)))
            has_statistics = len(self.model.state_dict()) > num_parameters
            # Looking for unused parameters keeps DDP from re-ordering its buckets after the first update, by which
            # a resumed run would sum in another order than one that was never stopped. A task may have some, too.
            warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
            warnings.filterwarnings(
                "ignore", message="`broadcast_buffers` is deprecated"
            )  # from torch 2.13 on
            self.objective = DistributedDataParallel(
                objective, broadcast_buffers=has_statistics, find_unused_parameters=True
            )

    def train_step(self, micro_batches: Sequence[MicroBatch], *, wants_stop: bool = False) -> None:
        """Make one update from this rank's share of it; the open scopes of `metrics` see what it sums.

        Afterwards `num_wanting_stop` is the number of ranks that wanted to stop when it began; on a GPU when the
        update before began. It is the same on every rank. (A single rank knows by itself.)

        Args:
            micro_batches: As many on every rank, each with its weight: 1, or 0 for a filler, which is run
                so that the ranks stay in step but counts for nothing.
            wants_stop: Whether this rank wants the run to stop.
        """
        self.model.train()
        self._seed_generators()
        num_targets, num_wanting_stop = self.world.sum_(self._count(micro_batches, wants_stop))
        outputs: list[LossOutput] = []
        for i, (batch, weight) in enumerate(micro_batches):
            is_last = i == len(micro_batches) - 1
            with nullcontext() if is_last else self._without_sync():
                output = self.objective(batch.to(self.world.device))
                (output.loss * (weight * self.world.size / num_targets)).backward()
            outputs.append(output)
        is_cancelled = self._apply_gradient()
        if self.world.size > 1:
            self.num_wanting_stop = self._late_votes.exchange(num_wanting_stop)
        for output, (batch, weight) in zip(outputs, micro_batches, strict=True):
            sums = _sums(output, batch)
            # What was cancelled is not counted, or one loss that is not a number would spoil the whole epoch's.
            self.metrics.add({key: torch.where(is_cancelled, 0.0, weight * sums[key]) for key in sums})

    def close(self) -> None:
        """Let go of what keeps the ranks' connections open; no update can follow."""
        self.objective = self.model

    @torch.no_grad()
    def validate(self, examples: Examples[Any], batches: Iterable[Batch]) -> dict[str, float]:
        """Return the task's metrics of a split, the same on every rank.

        Args:
            examples: The whole split.
            batches: This rank's share of its batches.
        """
        self.model.eval()
        for buffer in self.model.buffers():  # what is measured is what is saved: rank 0's
            self.world.copy_from_main_(buffer)
        # Isolated: scopes that the caller has open are about training.
        with self.metrics.scope("valid", isolated=True):
            self.metrics.reset("valid")
            for batch in batches:
                output = self.task.compute_loss(self.model, batch.to(self.world.device))
                self.metrics.add(_sums(output, batch))
            results = self.task.summarize(self.metrics.sums("valid", self.world))
        return {**results, **self.task.evaluate(self.model, examples, self.world)}

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the optimizer's tensors, named after their parameters, and the rest as plain values.

        Every rank must call this: the metrics of all are gathered.
        """
        tensors = {
            f"{name}.{key}": value
            for name, parameter in self._optimized_parameters()
            for key, value in self.optimizer.state[parameter].items()
        }
        return tensors, {"update": self.update, "metrics": self.world.gather(self.metrics.state_dict())}

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned; the model's weights are loaded apart."""
        by_parameter: dict[str, dict[str, Tensor]] = {name: {} for name, _ in self._optimized_parameters()}
        for full_name, tensor in tensors.items():
            name, _, key = full_name.rpartition(".")
            if name not in by_parameter:
                raise UserError(f"The optimizer's state must be of this model, but has `{name}`. {_RESTORE}")
            by_parameter[name][key] = tensor
        # A parameter that has never had a gradient has no state; but some must have.
        if values["update"] and not tensors:
            raise UserError(f"The optimizer's state must be of this model, but is empty. {_RESTORE}")
        # torch numbers the parameters in the order in which the optimizer was given them: this one.
        numbered = dict(enumerate(by_parameter.values()))
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": numbered, "param_groups": groups})
        self.update = values["update"]
        states = values["metrics"]
        if len(states) == self.world.size:
            self.metrics.load_state_dict(states[self.world.rank])
        elif self.world.is_main:  # another number of ranks: the sums of all go on in one place
            self.metrics.load_state_dict(merge_states(states))

    def _apply_gradient(self) -> Tensor:
        """Clip and step; a gradient that is not finite cancels the step on the device, unread by the host.

        Returns:
            Whether the step was cancelled, a scalar bool on the device, the same on every rank.
        """
        parameters = [parameter for _, parameter in self._optimized_parameters()]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if self.clip_norm:
            nn.utils.clip_grads_with_norm_(parameters, self.clip_norm, norm)
        is_cancelled = ~torch.isfinite(norm)
        self.update += 1
        lr = self.base_lr * self.schedule(self.update)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # torch's fused optimizers skip the step, and its count, where this flag is 1.
        self.optimizer.found_inf = is_cancelled.float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        # Every rank has the same gradient here; divided so that the sum over ranks counts it once.
        self.metrics.add({"num_cancelled": is_cancelled / self.world.size})
        self.metrics.gauge("lr", lr)
        self.metrics.gauge("grad", norm)
        return is_cancelled

    def _count(self, micro_batches: Sequence[MicroBatch], wants_stop: bool) -> Tensor:
        """Return (number of targets, whether to stop), to be summed over ranks at once: (2,)."""
        counts = torch.empty(2, dtype=self.world.sum_dtype, device=self.world.device)
        # Fills, unlike copies, do not let the host wait for the device.
        counts[0].fill_(sum(weight * batch.num_targets for batch, weight in micro_batches))
        counts[1].fill_(float(wants_stop))
        return counts

    def _without_sync(self) -> Any:
        """Keep DDP from summing gradients before the last micro-batch."""
        if isinstance(self.objective, DistributedDataParallel):
            return self.objective.no_sync()
        return nullcontext()

    def _optimized_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def _seed_generators(self) -> None:
        """Seed from (seed, update, rank), so that a resumed run draws the same numbers."""
        digest = blake2b(f"{self.seed} {self.update} {self.world.rank}".encode(), digest_size=8).digest()
        torch.manual_seed(int.from_bytes(digest, "little", signed=True))


class _Objective(nn.Module):
    """The model together with the task's loss: what DDP wraps, so that the task may use the model freely."""

    def __init__(self, task: Task[Any], model: nn.Module) -> None:
        super().__init__()
        self.task = task
        self.model = model

    def forward(self, batch: Batch) -> LossOutput:
        return self.task.compute_loss(self.model, batch)


def _sums(output: LossOutput, batch: Batch) -> dict[str, Tensor | float]:
    """Return all that is additive about a batch."""
    counts = {"num_targets": batch.num_targets, "num_examples": batch.num_examples}
    return {"loss": output.loss.detach(), **output.sums, **counts}
