"""One update, and the state that outlives it.

The update is exact: the gradient is (sum over the targets of all ranks and micro-batches) / (their number).
The number N is known before the forward pass, so each summed loss is divided by it, and the gradients of all ranks
are added up. DistributedDataParallel takes their mean over W ranks instead. There the loss is scaled by W too, and
the mean becomes the sum that is wanted: (1 / W) * sum_r grad(W / N * L_r) = (1 / N) * sum_r grad L_r.
How the ranks keep their copies of the model is up to `nmt/update/replicas.py`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nmt.checkpoints.model_folder import read_weights
from nmt.data.batch_iterator import MicroBatch
from nmt.distributed import World
from nmt.errors import DamagedError, shown
from nmt.options import OptimizationOptions
from nmt.system.cuda_graphs import Recording
from nmt.system.deferred import LateNumber
from nmt.task import Batch, Examples, Illustrations, LossOutput, Task, batch_sums
from nmt.update.cancellations import Cancellations
from nmt.update.metrics import Metrics, merge_states
from nmt.update.optim import build_optimizer, can_be_recorded, fits, step
from nmt.update.precision import Precision
from nmt.update.probe import NEW_STATE, probe
from nmt.update.replicas import Replicas, build_replicas
from nmt.update.schedule import Plateau, build_schedule, num_warmup_updates
from nmt.update.validation import validate
from nmt.update.weight_average import AveragedWeights

_RESTORE = "Restore the checkpoint, or begin a new run."
_TRAINED = "trained"  # key of the weights in training, if the checkpoint's model is their running mean


class Stepped(NamedTuple):
    """What came of the step of an update: scalars on the device."""

    norm: Tensor
    """Norm of the gradient before it is clipped."""
    is_cancelled: Tensor
    """bool: the gradient was not finite, and nothing was changed."""
    can_lower_scale: Tensor
    """bool: the loss scale alone may be the reason."""


class Trainer:
    """A model, its optimizer and its metrics. It knows a task only through the protocol."""

    def __init__(
        self,
        task: Task[Any],
        model: nn.Module,
        options: OptimizationOptions,
        *,
        world: World,
        seed: int,
        updates_per_epoch: int,
        has_one_shape: bool = False,
    ) -> None:
        """Build the optimizer.

        Args:
            task: What is learned.
            model: With the weights to begin with.
            options: Of the optimizer and its schedule.
            world: The ranks; the model is moved to its device.
            seed: Of everything random in updates.
            updates_per_epoch: Turns epochs of the schedule into updates.
            has_one_shape: Whether all batches have one shape (`StaticBatch`): updates on a GPU are then recorded.
        """
        self.task = task
        self.model = model.to(world.device)
        self.world = world
        self.seed = seed
        self.options = options
        self.schedule = build_schedule(options, updates_per_epoch=updates_per_epoch)
        self.num_warmup_updates = num_warmup_updates(options, updates_per_epoch=updates_per_epoch)
        self.plateau = Plateau()
        self.lr_scale = 1.0  # below 1 after the run has gone back to an earlier checkpoint
        self.lr = 0.0  # of the last update
        self.precision = Precision(options.precision, world.device)
        self.replicas: Replicas = build_replicas(
            task,
            self.model,
            options,
            precision=self.precision,
            world=world,
            has_one_shape=has_one_shape,
        )
        self.weights = self.replicas.weights
        self.statistics = self.weights.statistics
        self.optimizer = build_optimizer(self.weights.trained.values(), options)
        self.averaged = (
            AveragedWeights(self.weights.tensors(), options.ema_decay) if options.ema_decay else None
        )
        self.metrics = Metrics()
        self.update = 0
        self.num_wanting_stop = 0.0
        self._late_votes = LateNumber()
        self.cancellations = Cancellations(world)
        self._lr = torch.zeros((), device=world.device)
        self._is_recorded = has_one_shape and can_be_recorded(self.optimizer)
        self._forget_recording()

    def train_step(
        self, micro_batches: Sequence[MicroBatch], *, epoch: int = 1, wants_stop: bool = False
    ) -> None:
        """Make one update from this rank's share of it. Its sums go to the open scopes of `metrics`.

        Afterwards `num_wanting_stop` is the number of ranks that wanted to stop when this update began. It is the
        same on every rank. On a GPU it is read one update late, so that the host does not wait for the device:

            update                     1    2    3    4
            sum of the ranks' votes    v1   v2   v3   v4     exchanged with the number of targets
            num_wanting_stop, CPU      v1   v2   v3   v4
            num_wanting_stop, GPU      0    v1   v2   v3

        With a single rank it stays 0, since that rank knows its own wish.

        Args:
            micro_batches: The same number on every rank, each with its weight: 1, or 0 for a filler. A filler is
                run so that the ranks stay in step, but counts for nothing.
            epoch: The epoch of this update, for a learning rate that changes by epochs.
            wants_stop: Whether this rank wants the run to stop.
        """
        self.model.train()
        self._seed_generators()
        statistics = [tensor.clone() for tensor in self.statistics]
        num_targets, num_wanting_stop = self.world.sum_in_update_(self._count(micro_batches, wants_stop))
        self.replicas.start()
        outputs: list[LossOutput] = []
        for i, (batch, weight, _) in enumerate(micro_batches):
            factor = weight * self.replicas.loss_factor / num_targets
            outputs.append(self.replicas.add(batch, factor, is_last=i == len(micro_batches) - 1))
        _, is_cancelled, can_lower_scale = self._apply_gradient(epoch)
        if self.world.size > 1:
            self.num_wanting_stop = self._late_votes.exchange(num_wanting_stop)
        for tensor, before in zip(self.statistics, statistics, strict=True):
            tensor.copy_(torch.where(is_cancelled, before, tensor))
        if self.averaged is not None:
            self.averaged.update(self.update, is_cancelled=is_cancelled)
        for output, (batch, weight, _) in zip(outputs, micro_batches, strict=True):
            sums = batch_sums(output, batch)
            # A cancelled update is not counted: one loss that is NaN would make the sum of the epoch NaN.
            self.metrics.add({key: torch.where(is_cancelled, 0.0, weight * sums[key]) for key in sums})
        self.cancellations.note(
            self.update, is_cancelled, outputs, micro_batches, can_lower_scale=can_lower_scale
        )

    def probe(self, batch: Batch) -> None:
        """Run a batch forward and backward, as an update would, and change nothing.

        Meanwhile the rest of an update's memory is reserved: the optimizer's state and copies of gradients.
        """
        num_copies = self.replicas.num_copies + (0 if self.optimizer.state else NEW_STATE)
        try:
            probe(self.replicas.objective, batch, device=self.world.device, num_copies=num_copies)
        finally:
            self.replicas.clear()

    def close(self) -> None:
        """Drop what keeps the ranks' connections open; no update can follow."""
        self.replicas.close()
        self.model = nn.Identity()  # the model's hooks may keep connections open, too

    def validate(self, examples: Examples[Any], batches: Iterable[Batch]) -> dict[str, float]:
        """Return the task's metrics of a split, the same on every rank.

        Args:
            examples: The whole split.
            batches: This rank's share of its batches.
        """
        self.replicas.give_back()
        with self.evaluated_model() as model:
            return validate(self.task, model, examples, batches, world=self.world)

    @torch.no_grad()
    def illustrate(self, examples: Examples[Any]) -> Illustrations:
        """Return what the task shows of the weights that are validated; every rank must call this."""
        with self.evaluated_model() as model:
            return self.task.illustrate(model, examples, self.world)

    @property
    def is_past_warmup(self) -> bool:
        """True once an update has been made at the learning rate's peak."""
        return self.update >= max(self.num_warmup_updates, 1)

    def evaluated_weights(self) -> AbstractContextManager[None]:
        """Let the model have, within the block, the weights that are validated and saved."""
        return nullcontext() if self.averaged is None else self.averaged.in_place()

    @contextmanager
    def evaluated_model(self) -> Iterator[nn.Module]:
        """Return the model to validate, in evaluation mode, for the block. Every rank must call this."""
        with self.evaluated_weights():
            for tensor in self.statistics:  # rank 0's are saved, so these are measured
                self.world.copy_from_main_(tensor)
            with self.weights.in_one_model() as model:
                yield model.eval()

    def whole_weights(self) -> dict[str, Tensor]:
        """Return the model's weights to be saved, on rank 0 alone.

        Every rank must call this, within `evaluated_weights`.
        """
        return self._whole((name, name, tensor) for name, tensor in self.weights.tensors().items())

    def load_weights(self, folder: Path) -> None:
        """Take over the weights of a model folder.

        Raises:
            UserError: They are of another model, or the file is missing or damaged.
        """
        loaded = read_weights(self.weights.sizes(), folder)
        for name, tensor in self.weights.tensors().items():
            tensor.copy_(self.weights.part(name, loaded[name]))

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the optimizer's tensors, named after their parameters, and the rest as plain values.

        Every rank must call this, within `evaluated_weights`: the metrics of all are gathered. Rank 0 alone gets
        the tensors.
        """
        tensors = self._whole(
            (f"{name}.{key}", name, value)
            for name, parameter in self.weights.trained.items()
            for key, value in self.optimizer.state[parameter].items()
            if isinstance(value, Tensor)
        )
        num_tensors = len(tensors)
        if self.averaged is not None:
            trained = self.averaged.trained().items()
            tensors |= self._whole((f"{name}.{_TRAINED}", name, value) for name, value in trained)
        values = {
            "update": self.update,
            "num_optimizer_tensors": num_tensors,
            "plateau": asdict(self.plateau),
            "precision": self.precision.state_dict(),
            "lr": self.lr,
            "lr_scale": self.lr_scale,
            "num_cancelled_in_a_row": self.cancellations.num_in_a_row(),
            "metrics": self.world.gather(self.metrics.state_dict()),
        }
        return tensors, values

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned, after the model's weights have been loaded."""
        by_parameter: dict[str, dict[str, Tensor]] = {name: {} for name in self.weights.trained}
        trained: dict[str, Tensor] = {}
        for full_name, tensor in tensors.items():
            name, _, key = full_name.rpartition(".")
            if key == _TRAINED:
                trained[name] = tensor
            elif name in by_parameter:
                by_parameter[name][key] = tensor
            else:
                raise DamagedError(
                    f"The optimizer's state must be of this model, but has `{name}`. {_RESTORE}"
                )
        num_tensors = len(tensors) - len(trained)
        if num_tensors != values["num_optimizer_tensors"]:
            raise DamagedError(
                f"The optimizer's state must have {values['num_optimizer_tensors']} tensors, but has "
                f"{num_tensors}. {_RESTORE}"
            )
        self._check_fit(by_parameter, trained)
        # torch numbers the parameters in the order in which the optimizer was given them.
        names = {parameter: name for name, parameter in self.weights.trained.items()}
        given = [names[parameter] for group in self.optimizer.param_groups for parameter in group["params"]]
        numbered = {
            number: {key: self.weights.part(name, tensor) for key, tensor in by_parameter[name].items()}
            for number, name in enumerate(given)
        }
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": numbered, "param_groups": groups})
        self._forget_recording()
        if self.averaged is not None:
            self.averaged.restart({name: self.weights.part(name, tensor) for name, tensor in trained.items()})
        self.update, self.lr, self.lr_scale = values["update"], values["lr"], values["lr_scale"]
        self.plateau = Plateau(**values["plateau"])
        self.cancellations = Cancellations(self.world, num_in_a_row=values["num_cancelled_in_a_row"])
        self.precision.load_state_dict(values["precision"])
        states = values["metrics"]
        self._check_metrics(states)
        if len(states) == self.world.size:
            self.metrics.load_state_dict(states[self.world.rank])
        elif self.world.is_main:  # another number of ranks: rank 0 goes on with the sums of all
            self.metrics.load_state_dict(merge_states(states))

    def _check_fit(
        self, by_parameter: Mapping[str, Mapping[str, Tensor]], trained: Mapping[str, Tensor]
    ) -> None:
        """Raise `DamagedError` unless each tensor fits its parameter, since the optimizer does not check."""
        sizes = self.weights.sizes()
        for name in self.weights.trained:
            if not fits(self.optimizer, sizes[name], by_parameter[name]):
                raise DamagedError(f"The optimizer's state must fit `{name}`, but does not. {_RESTORE}")
        if self.averaged is None:
            return
        shapes = {name: tensor.shape for name, tensor in sizes.items()}
        if shapes != {name: tensor.shape for name, tensor in trained.items()}:
            raise DamagedError(f"The weights in training must be of this model, but are not. {_RESTORE}")

    def _check_metrics(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Raise `DamagedError` unless the task can form its ratios: only the task knows which sums it needs."""
        for scope in (scope for state in states for scope in state.values()):
            sums = scope["sums"]
            try:
                if sums and sums["num_targets"]:
                    self.task.summarize(sums)
            except (KeyError, ArithmeticError, ValueError) as error:
                raise DamagedError(
                    f"The sums of the checkpoint's metrics must be those of the task, but are not: "
                    f"{type(error).__name__} {shown(str(error))}. {_RESTORE}"
                ) from error

    def _apply_gradient(self, epoch: int) -> Stepped:
        """Make the step. A gradient that is not finite cancels it on the device, and the host does not wait.

        Returns:
            What came of it, the same on every rank.
        """
        self.update += 1
        factor = self.schedule(self.update, epoch) * self.plateau.factor * self.lr_scale
        self.lr = self.options.lr * factor
        self._lr.fill_(self.lr)
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr if self._is_recorded else self.lr
        self._step()
        norm, is_cancelled, _ = stepped = self._stepped
        # Every rank has the same flag. It is divided so that the sum over ranks counts the update once.
        self.metrics.add({"num_cancelled": is_cancelled / self.world.size})
        self.metrics.gauge("lr", self.lr)
        self.metrics.gauge("grad", norm)
        return stepped

    def _forget_recording(self) -> None:
        """Record the step anew, because the tensors that it reads may have been replaced."""
        device = self.world.device if self._is_recorded else torch.device("cpu")
        self._step = Recording(self._clip_and_step, device)

    @torch.no_grad()
    def _clip_and_step(self) -> None:
        """Clip, step and clear the gradients; all on the device, the same way each time."""
        gradients = self.replicas.gradients()
        self.precision.unscale_(gradients)
        norm = self.replicas.norm(gradients)
        if self.options.clip_norm:
            # Like torch.nn.utils.clip_grads_with_norm_, but that function takes parameters, not gradients.
            share = (self.options.clip_norm / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(gradients, share)
        is_cancelled = ~torch.isfinite(norm)
        self._stepped = Stepped(norm, is_cancelled, self.precision.can_lower_scale())
        self.precision.adapt_(is_cancelled)
        step(self.optimizer, is_cancelled=is_cancelled)
        self.replicas.clear()

    def _count(self, micro_batches: Sequence[MicroBatch], wants_stop: bool) -> Tensor:
        """Return (number of targets, whether to stop), to be summed over ranks at once: (2,)."""
        counts = torch.empty(2, dtype=self.world.sum_dtype, device=self.world.device)
        # A fill, unlike a copy, does not make the host wait for the device.
        counts[0].fill_(sum(weight * batch.num_targets for batch, weight, _ in micro_batches))
        counts[1].fill_(float(wants_stop))
        return counts

    def _whole(self, kept: Iterable[tuple[str, str, Tensor]]) -> dict[str, Tensor]:
        """Return whole tensors on rank 0, and nothing on the others, which must call this too.

        Args:
            kept: For each tensor its name, the name of its weight, and what this rank keeps of it.
        """
        found = {}
        for key, name, tensor in kept:  # one at a time, since a GPU may not have memory for all of them
            whole = self.weights.whole(name, tensor)
            if self.world.is_main:
                found[key] = whole.cpu()
        return found

    def _seed_generators(self) -> None:
        """Seed from (seed, update, rank), so that a resumed run draws the same numbers."""
        digest = blake2b(f"{self.seed} {self.update} {self.world.rank}".encode(), digest_size=8).digest()
        torch.manual_seed(int.from_bytes(digest, "little", signed=True))
