"""The options of a training run, whatever its task. Imports no torch.

A field with `metadata={"fixed": True}` may not change when a run is resumed.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeAlias, TypeVar

from nmt.config.fields import key_of
from nmt.config.mapping import from_mapping
from nmt.config.ranges import ANY, check_limits, check_ranges, limits
from nmt.data.options import BatchingOptions
from nmt.errors import UserError
from nmt.task import load_task

_LEAST = 1e-30  # still above 0 in float32


@dataclass(frozen=True)
class OptimizationOptions:
    """The optimizer, its learning rate, and when to stop."""

    optimizer: Literal["adam", "adamw", "sgd", "adafactor"] = field(default="adam", metadata={"fixed": True})
    """adam couples weight decay with the gradient; adamw does not. adafactor keeps little beside the weights."""
    lr: float = field(default=5e-4, metadata=limits(above=0.0))
    """Peak learning rate."""
    lr_scheduler: Literal["inverse_sqrt", "cosine", "polynomial", "milestones", "plateau", "constant"] = (
        "inverse_sqrt"
    )
    """What the learning rate does after the warm-up."""
    lr_unit: Literal["update", "epoch"] = "update"
    """Whether the learning rate changes from update to update or from epoch to epoch; a warm-up always does
    from update to update."""
    warmup_updates: int | None = field(default=None, metadata=limits(least=0.0))
    """Updates over which the learning rate rises linearly to its peak; 4000 unless warmup-epochs is given."""
    warmup_epochs: float | None = field(default=None, metadata=limits(least=0.0))
    """The same in epochs."""
    end_learning_rate: float = field(default=0.0, metadata=limits(least=0.0))
    """Where cosine and polynomial end."""
    power: float = field(default=1.0, metadata=limits(above=0.0))
    """Exponent of polynomial; 1 is a straight line."""
    lr_milestones: tuple[int, ...] = ()
    """milestones: after each of these updates or epochs the learning rate is multiplied by lr-shrink."""
    lr_shrink: float = field(default=0.1, metadata=limits(above=0, below=1))
    """Factor of milestones and plateau."""
    lr_patience: int = field(default=0, metadata=limits(least=0.0))
    """plateau: multiply by lr-shrink after more than this many validations in a row without a better one."""
    lr_threshold: float = field(default=1e-4, metadata=limits(least=0.0))
    """plateau: a validation is better if it is so by this share of the best one."""
    momentum: float = field(default=0.9, metadata=limits(least=0, below=1))
    """Momentum of sgd."""
    nesterov: bool = False
    """Nesterov's momentum for sgd."""
    adam_betas: tuple[float, float] = field(default=(0.9, 0.98), metadata=limits(least=0, below=1))
    """Decay of the running means of the gradient and of its square (adam, adamw)."""
    adam_eps: float = field(default=1e-8, metadata=limits(least=0.0))
    """Added to the root of the mean square (adam, adamw)."""
    weight_decay: float = field(default=0.0, metadata=limits(least=0.0))
    """Weight decay."""
    decay_matrices_only: bool = False
    """No weight decay on norms and biases, or any other parameter of one dimension."""
    clip_norm: float = field(default=0.0, metadata=limits(least=0.0))
    """Scale gradients down to this global norm; 0 for no clipping."""
    ema_decay: float = field(default=0.0, metadata=limits(least=0, below=1, fixed=True))
    """Keep a running mean of the weights, of this decay an update, such as 0.999: it is what is validated, and
    the model of each checkpoint. 0 for none."""
    max_bad_updates: int = field(default=20, metadata=limits(least=1))
    """After this many updates in a row without a finite gradient, go back to the last checkpoint and go on with
    half the learning rate. Overflows of fp16 that a lower loss scale may mend do not count."""
    max_epoch: int | None = field(default=None, metadata=limits(least=1))
    """Stop after this many epochs."""
    max_update: int | None = field(default=None, metadata=limits(least=1))
    """Stop after this many updates."""
    stop_time_hours: float | None = field(default=None, metadata=limits(above=0.0))
    """Stop after so many hours of training, validation and checkpoints, those before a resume included."""
    stop_min_lr: float | None = field(default=None, metadata=limits(least=0.0))
    """Stop when the learning rate has fallen to this."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """What updates compute in; weights stay in float32. auto: bf16 on a GPU that has it, else fp32."""
    shard_weights: bool = False
    """Let each of several ranks keep a part of every weight, its gradient and the optimizer's state (FSDP): for
    models that do not fit into the memory of one. See docs/training.md."""
    compile: bool = False
    """Compile the model for its updates (torch.compile): a minute or more before the first one, on a GPU shorter
    ones thereafter. See docs/training.md for where it pays."""
    patience: int | None = field(default=None, metadata=limits(least=1))
    """Stop after this many validations in a row without a better `patience-metric`."""
    patience_metric: str | None = field(default=None, metadata={"fixed": True})
    """The validation metric that patience follows; `best-checkpoint-metric` unless given."""
    plateau_metric: str | None = field(default=None, metadata={"fixed": True})
    """The validation metric that a plateau follows; `best-checkpoint-metric` unless given."""

    def check(self) -> None:
        """Raise `UserError` for values that make no sense alone or together."""
        check_limits(self)
        # A smaller number is 0 in float32. A gradient that was always 0, as of an unseen word, then gives 0 / 0.
        check_ranges(self, {"adam_eps": (_LEAST, 1e30), "lr": (_LEAST, 1e30)})
        if self.clip_norm:  # 0 turns clipping off
            check_ranges(self, {"clip_norm": (_LEAST, 1e30)})
        if self.end_learning_rate > self.lr:
            raise UserError(
                f"`end-learning-rate` must be at most `lr` ({self.lr}), but is {self.end_learning_rate}."
            )
        self._check_choices_are_taken()
        if self.warmup_updates and self.warmup_epochs:
            raise UserError(
                f"`warmup-updates` ({self.warmup_updates}) or `warmup-epochs` ({self.warmup_epochs}) must be "
                "left out. Give one of them."
            )
        if (
            self.lr_scheduler in ("cosine", "polynomial")
            and self.max_update is None
            and self.max_epoch is None
        ):
            raise UserError(
                f"`lr-scheduler` {self.lr_scheduler} must know its end, but neither `max-update` nor "
                "`max-epoch` is set. Set one."
            )
        if self.lr_scheduler == "milestones":
            if not self.lr_milestones:
                raise UserError("`lr-milestones` must be given with `lr-scheduler` milestones. Give some.")
            if list(self.lr_milestones) != sorted({m for m in self.lr_milestones if m > 0}):
                raise UserError(f"`lr-milestones` must rise from above 0, but are {self.lr_milestones}.")
        if self.stop_min_lr is not None and self.stop_min_lr >= self.lr:
            raise UserError(f"`stop-min-lr` must be below `lr` ({self.lr}), but is {self.stop_min_lr}.")
        if self.patience_metric is not None and self.patience is None:
            raise UserError("`patience-metric` must go with `patience`, but that is not given. Give it too.")
        if self.shard_weights and (self.compile or self.optimizer == "adafactor"):
            other = "`compile`" if self.compile else "`optimizer` adafactor, which needs whole matrices,"
            raise UserError(f"`shard-weights` must be off with {other} but is on. Leave one of them out.")
        if self.nesterov and self.momentum == 0:
            raise UserError("`nesterov` must have a `momentum` above 0, but it is 0.")

    def _check_choices_are_taken(self) -> None:
        """Refuse an option that only another optimizer or schedule would read."""
        defaults = {option.name: option.default for option in dataclasses.fields(self)}
        for choice, names_by_value in _READ_BY.items():
            taken = getattr(self, choice)
            for name, values in names_by_value.items():
                if getattr(self, name) != defaults[name] and taken not in values:
                    raise UserError(
                        f"`{key_of(name)}` must go with `{key_of(choice)}` {' or '.join(values)}, but that is "
                        f"{taken}. Leave one of them out."
                    )


# Options that are used only with some values of another option.
_READ_BY: dict[str, dict[str, tuple[str, ...]]] = {
    "optimizer": {
        "momentum": ("sgd",),
        "nesterov": ("sgd",),
        "adam_betas": ("adam", "adamw"),
        "adam_eps": ("adam", "adamw"),
    },
    "lr_scheduler": {
        "lr_unit": ("inverse_sqrt", "cosine", "polynomial", "milestones"),
        "end_learning_rate": ("cosine", "polynomial"),
        "power": ("polynomial",),
        "lr_milestones": ("milestones",),
        "lr_shrink": ("milestones", "plateau"),
        "lr_patience": ("plateau",),
        "lr_threshold": ("plateau",),
        "plateau_metric": ("plateau",),
        "stop_min_lr": ("inverse_sqrt", "cosine", "polynomial", "milestones", "plateau"),
    },
}


@dataclass(frozen=True)
class CheckpointOptions:
    """When to validate and save, and what to keep."""

    validate_interval: int = field(default=1, metadata=limits(least=1))
    """Validate after every so many epochs."""
    validate_interval_updates: int | None = field(default=None, metadata=limits(least=1))
    """Validate after every so many updates too."""
    save_interval_updates: int | None = field(default=None, metadata=limits(least=1))
    """Save after every so many updates too; a validation always saves."""
    keep_last: int = field(default=5, metadata=limits(least=1))
    """Keep this many of the newest checkpoints."""
    keep_best: int = field(default=1, metadata=limits(least=1))
    """Keep this many of the best checkpoints."""
    keep_every_updates: int | None = field(default=None, metadata=limits(least=1))
    """Keep what was saved at every multiple of this many updates for good, and save there."""
    keep_every_epochs: int | None = field(default=None, metadata=limits(least=1))
    """Keep what was saved at the end of every so many epochs for good, and save there."""
    keep_from_epoch: int = field(default=1, metadata=limits(least=1))
    """The first epoch of which anything is kept for good."""
    best_checkpoint_metric: str = field(default="loss", metadata={"fixed": True})
    """The validation metric that decides which checkpoint is best."""
    keep_best_metrics: tuple[str, ...] = ()
    """More metrics of which the best checkpoints are kept, `keep-best` of each, with a link `best-METRIC`."""

    def check(self) -> None:
        """Raise `UserError` for an option that nothing would read."""
        if self.keep_from_epoch > 1 and self.keep_every_updates is None and self.keep_every_epochs is None:
            raise UserError(
                "`keep-from-epoch` must go with `keep-every-updates` or `keep-every-epochs`, but neither is "
                "given. Give one or leave it out."
            )


TaskOptionsT = TypeVar("TaskOptionsT")

OptionScalar: TypeAlias = str | int | float | bool | Path | None
OptionValue: TypeAlias = OptionScalar | Sequence[OptionScalar]
"""The types in which an option may be given, for any task."""


@dataclass(frozen=True)
class TrainConfig(Generic[TaskOptionsT]):
    """Everything that determines a training run."""

    task_options: TaskOptionsT
    """The task's own options."""
    save_dir: Path
    """The folder of the run: checkpoints, logs, configuration."""
    task: str = field(default="translation", metadata={"fixed": True})
    """What is learned: the name of a task."""
    batching: BatchingOptions = field(default_factory=BatchingOptions)
    optimization: OptimizationOptions = field(default_factory=OptimizationOptions)
    checkpoints: CheckpointOptions = field(default_factory=CheckpointOptions)
    seed: int = field(default=1, metadata={"fixed": True, "range": ANY})
    """Seed of everything random: initial weights, dropout, the order of the examples."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda or mps."""
    deterministic: bool = False
    """Take only algorithms that give the same bits every time (on a GPU slower; the CPU's do anyway)."""
    rank_timeout: float = 30.0
    """Minutes that a rank waits for the others before it takes one for lost."""
    accept_changed_data: bool = False
    """Go on although the training data have changed within an epoch: it begins anew with what is there now."""
    log_interval: int = field(default=100, metadata=limits(least=1))
    """Report after every so many updates."""
    dry_run: bool = False
    """Print what the run is going to be (model, data, work, memory, time) and stop; nothing is written."""
    tensorboard: bool = False
    """Write all reports, and examples after each validation, into `save-dir`/tensorboard too."""

    def check(self) -> None:
        """Raise `UserError` for values that make no sense."""
        check_ranges(self, {"rank_timeout": (0.001, 1_000_000)})
        if self.optimization.shard_weights and self.batching.packing == "on":
            raise UserError(
                "`packing` must be auto or off with `shard-weights`, but is on. Leave it out: batches are padded."
            )
        if self.optimization.shard_weights and self.batching.max_tokens == "auto":
            raise UserError(
                "`max-tokens` must be a number with `shard-weights`, where no rank can try alone what fits, but "
                "is auto. Give one, such as 4096."
            )
        if not 0 <= self.seed < 2**63:
            raise UserError(f"`seed` must be at least 0 and below 2**63, but is {self.seed}.")


def train_config(*, task: str = "translation", **options: OptionValue) -> TrainConfig[Any]:
    """Make the configuration of a training run from the options of nmt-train, under their names as flags.

    >>> config = train_config(data="DATA", save_dir="RUN", arch="transformer_tiny", max_update=1000)
    >>> config.optimization.max_update, config.task_options.model.encoder_layers
    (1000, 4)
    >>> train_config(data="DATA", save_dir="RUN", max_updates=1000)
    Traceback (most recent call last):
    nmt.errors.UserError: train_config: `max_updates` is not a known key. Here it is `max-update`.

    Which options there are depends on the task, and tasks are plugins, so no signature can list them. They are
    those of `nmt-train --task NAME --help`, with underscores: the fields of `BatchingOptions`,
    `OptimizationOptions`, `CheckpointOptions`, `TrainConfig` and of the task's own options (`TranslationOptions`,
    `TransformerOptions`).

    Args:
        task: what is learned: the name of a task, which decides what options there are.
        options: values of the fields' types, lists for tuples, or text as in a YAML file; paths may be text. None
            where a field may be None.

    Raises:
        UserError: for an unknown option or task, a value of another type, and values that make no sense together.
    """
    task_options = load_task(task)
    return from_mapping(
        TrainConfig[task_options],  # type: ignore[valid-type]
        {"task": task, **options},
        where="train_config",
        how_to_give="Give {name}=VALUE.",
        prog="nmt-train",
    )
