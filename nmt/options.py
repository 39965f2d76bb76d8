"""The options of a training run, whatever its task. Imports no torch.

A field with `metadata={"fixed": True}` may not change when a run is resumed.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Literal, TypeVar

from nmt.data.options import BatchingOptions
from nmt.errors import UserError


@dataclass(frozen=True)
class OptimizationOptions:
    """The optimizer, its learning rate, and when to stop."""

    optimizer: Literal["adam", "adamw"] = field(default="adam", metadata={"fixed": True})
    """adam couples weight decay with the gradient; adamw does not."""
    lr: float = 5e-4
    """Peak learning rate."""
    lr_scheduler: Literal["inverse_sqrt", "cosine", "constant"] = "inverse_sqrt"
    """What the learning rate does after the warm-up."""
    warmup_updates: int = 4000
    """Updates over which the learning rate rises linearly to its peak; 0 for none."""
    adam_betas: tuple[float, float] = (0.9, 0.98)
    """Decay of the running means of the gradient and of its square."""
    adam_eps: float = 1e-8
    """Added to the root of the mean square."""
    weight_decay: float = 0.0
    """Weight decay."""
    clip_norm: float = 0.0
    """Scale gradients down to this global norm; 0 for no clipping."""
    max_epoch: int | None = None
    """Stop after this many epochs."""
    max_update: int | None = None
    """Stop after this many updates."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """What updates compute in; weights stay in float32. auto: bf16 on a GPU that has it, else fp32."""
    patience: int | None = None
    """Stop after this many validations in a row without a better `best-checkpoint-metric`."""

    def check(self) -> None:
        """Raise `UserError` for values that make no sense alone or together."""
        if not 0 < self.lr < math.inf:
            raise UserError(f"`lr` must be above 0 and finite, but is {self.lr}.")
        for name in ("warmup_updates", "weight_decay", "clip_norm", "adam_eps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(
                    f"`{_flag(name)}` must be finite and not negative, but is {getattr(self, name)}."
                )
        for name in ("max_epoch", "max_update", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"`{_flag(name)}` must be at least 1, but is {value}.")
        if not all(0.0 <= beta < 1.0 for beta in self.adam_betas):
            raise UserError(f"`adam-betas` must be at least 0 and below 1, but are {self.adam_betas}.")
        if self.lr_scheduler == "cosine" and self.max_update is None:
            raise UserError("`lr-scheduler` cosine must know its end, but `max-update` is not set. Set it.")


@dataclass(frozen=True)
class CheckpointOptions:
    """When to validate and save, and what to keep."""

    validate_interval: int = 1
    """Validate after every so many epochs."""
    validate_interval_updates: int | None = None
    """Validate after every so many updates too."""
    save_interval_updates: int | None = None
    """Save after every so many updates too; a validation always saves."""
    keep_last: int = 5
    """Keep this many of the newest checkpoints."""
    keep_best: int = 1
    """Keep this many of the best checkpoints."""
    best_checkpoint_metric: str = field(default="loss", metadata={"fixed": True})
    """The validation metric that decides which checkpoint is best."""

    def check(self) -> None:
        """Raise `UserError` for intervals and numbers below 1."""
        for name in ("validate_interval", "validate_interval_updates", "save_interval_updates"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"`{_flag(name)}` must be at least 1, but is {value}.")
        for name in ("keep_last", "keep_best"):
            if getattr(self, name) < 1:
                raise UserError(f"`{_flag(name)}` must be at least 1, but is {getattr(self, name)}.")


TaskOptionsT = TypeVar("TaskOptionsT")


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
    seed: int = field(default=1, metadata={"fixed": True})
    """Seed of everything random: initial weights, dropout, the order of the examples."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda or mps."""
    log_interval: int = 100
    """Report after every so many updates."""

    def check(self) -> None:
        """Raise `UserError` for values that make no sense."""
        if self.log_interval < 1:
            raise UserError(f"`log-interval` must be at least 1, but is {self.log_interval}.")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"`seed` must be at least 0 and below 2**63, but is {self.seed}.")


def _flag(name: str) -> str:
    return name.replace("_", "-")
