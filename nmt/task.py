"""What the trainer asks of a task, and how a task is found by its name.

A task is any object with the methods of `Task`. It is made by its options: the entry point of the group
`nmt.tasks` names an options dataclass (see `nmt/config/`) with a method `build`. Nothing here imports torch,
since the command line looks up the options.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, is_dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, TypeVar, cast, get_origin, runtime_checkable

from nmt.config.values import shorten, suggest
from nmt.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

    from nmt.distributed import World

ENTRY_POINT_GROUP = "nmt.tasks"


class Batch(Protocol):
    """What a collater makes on the CPU, and what a task computes its loss from."""

    @property
    def num_examples(self) -> int:
        """Number of examples."""

    @property
    def num_targets(self) -> int:
        """The denominator of the gradient: target tokens without padding, or examples."""

    def to(self, device: torch.device, /) -> Self:
        """Return the batch on a device."""


class StaticBatch(Batch, Protocol):
    """A batch whose tensors have the same shapes in all batches of a run, such as a packed one.

    Its updates are recorded and replayed on a GPU. So the loss may depend on the tensors alone: numbers on the
    host, such as `num_targets`, stay those of the batch that was recorded.
    """

    def clone(self) -> Self:
        """Return a copy on its device."""

    def copy_(self, other: Self, /) -> None:
        """Copy the tensors of another batch into this one; from pinned memory without waiting."""


B = TypeVar("B", bound=Batch)
B_co = TypeVar("B_co", bound=Batch, covariant=True)


class AllSizes(Protocol):
    """The lengths of all examples of a split, (N, C): an array, or an object that reads them when asked.

    The lengths of a training split are never read all at once: `sizes[places]` are those of a window or a block.
    So a corpus may have more lengths than a process should hold in memory.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, C)."""

    def __len__(self) -> int:
        """Return N."""

    def __getitem__(self, places: Any, /) -> np.ndarray:
        """Return the lengths of some examples: (n, C) integers. `places` are a slice, or (n,) indices."""


class Examples(Protocol[B_co]):
    """The examples of one split."""

    @property
    def sizes(self) -> AllSizes:
        """(N, C) int32: the lengths that batches are sorted and cut by; (N, 1) ones where all are equal."""

    def __len__(self) -> int:
        """Return the number of examples N."""

    def __getitem__(self, index: int, /) -> Any:
        """Return one example, in the form that `collate` takes.

        What is random here or in `collate`, such as augmentation, may be drawn from the global
        generators of torch, NumPy and Python. They are seeded for each batch of an epoch, so that the numbers do
        not depend on worker processes or on where a run was resumed.
        """

    def collate(self, items: list[Any], /) -> B_co:
        """Make a batch, on the CPU."""


@dataclass(frozen=True)
class LossOutput:
    """The loss of a batch, and what is logged about it."""

    loss: Tensor
    """Scalar: the sum over the targets of the batch."""
    sums: dict[str, Tensor]
    """Additive quantities only, such as "nll" or "correct": scalars, or numbers. One that `summarize` does not
    look at is reported as a mean over the targets."""


@dataclass(frozen=True)
class Illustrations:
    """What a task shows of a model besides numbers, each under its name."""

    texts: Mapping[str, str] = field(default_factory=dict)
    """Markdown."""
    images: Mapping[str, np.ndarray] = field(default_factory=dict)
    """(H, W, 3) uint8."""


def batch_sums(output: LossOutput, batch: Batch) -> dict[str, Tensor | float]:
    """Return all that is additive about a batch: its loss, what the task sums, and its counts."""
    counts = {"num_targets": batch.num_targets, "num_examples": batch.num_examples}
    return {"loss": output.loss.detach(), **output.sums, **counts}


class Task(Protocol[B]):
    """What is learned: the data, the model, the loss and the metrics."""

    @property
    def metrics(self) -> Mapping[str, Literal["min", "max"]]:
        """The metrics that `--best-checkpoint-metric` may name, and which way is better."""

    def build_model(self) -> nn.Module:
        """Make a model with fresh parameters."""

    def open_split(self, split: str, /) -> Examples[B]:
        """Open the examples of "train", "valid" or "test"."""

    def compute_loss(self, model: nn.Module, batch: B, /) -> LossOutput:
        """Compute the summed loss of a batch that is on the device of the model."""

    def summarize(self, sums: Mapping[str, float], /) -> dict[str, float]:
        """Form ratios, such as loss per target, of sums over many batches and all ranks."""

    def evaluate(self, model: nn.Module, examples: Examples[B], world: World, /) -> dict[str, float]:
        """Compute metrics that are not ratios of sums, such as BLEU: the same on every rank; may be empty."""

    def illustrate(self, model: nn.Module, examples: Examples[B], world: World, /) -> Illustrations:
        """Show what the model makes of some examples, the same ones each time.

        Every rank calls it after a validation, with the model in evaluation mode, if something shows it
        (TensorBoard); what rank 0 returns is shown.
        """

    def save_assets(self, folder: Path, /) -> None:
        """Write what the model needs besides its parameters, such as vocabularies."""


@runtime_checkable
class PackingTask(Protocol):
    """A task that can pack its training examples into batches of one shape."""

    def why_padded(self, model: nn.Module, /) -> str | None:
        """Return None if the loss of packed batches is sure to be that of padded ones, with this model too.

        Otherwise return why it is not, as a clause: "the loss is one of the task's own".
        """

    def pack(self, examples: Any, /, *, max_tokens: int, max_sentences: int) -> Examples[StaticBatch]:
        """Return the examples of a split so that `collate` packs them; called if they can be packed.

        Args:
            examples: From `open_split`.
            max_tokens: Most tokens of a batch in any column of `sizes`.
            max_sentences: Most examples of a batch.
        """


@runtime_checkable
class LooksOver(Protocol):
    """An optional part of a task: a look at its data before a run begins or goes on."""

    def look_over(self, train: Examples[Any], valid: Examples[Any], world: World, /) -> list[str]:
        """Return lines for the log: what is left out, and what else a user should know of the data.

        Every rank calls it; the lines of rank 0 are shown.

        Raises:
            UserError: The data would end the run later.
        """


@runtime_checkable
class CheckingTask(Protocol):
    """A task that looks at a model before its first update."""

    def check_model(self, model: nn.Module, world: World, /) -> None:
        """Look at a model in evaluation mode, and say on rank 0 what a user should know; every rank calls this."""


class TaskOptions(Protocol):
    """The options of a task: a frozen dataclass that makes the task.

    A class variable `train_defaults: ClassVar[Mapping[str, Any]]` may give options of training (`nmt.options`)
    the defaults that suit the task, by field name: `{"batch_size": 64, "lr_scheduler": "cosine"}`.

    Model folders are published, so they name no path of the machine. In their configuration a field of type
    `Path`, and text that is an absolute path, hold a remark instead (`config/untold.py`). Declare paths as `Path`.
    If there are assets, `build` reads no such path: `save_assets` writes what the model needs from there.
    """

    def build(self, assets: Path | None) -> Task[Any]:
        """Make the task.

        Args:
            assets: the folder that `save_assets` of an earlier run wrote, to take vocabularies from; None
                to take them from the training data.
        """


@runtime_checkable
class NamesItsData(Protocol):
    """Options of a task that say which of their paths are read to measure a finished model."""

    def data_options(self, split: str, /) -> Collection[str]:
        """Return the fields that name what is read to measure a model on a split."""


def load_task(name: str) -> type[TaskOptions]:
    """Return the options dataclass of a task, by its entry point in the group `nmt.tasks`.

    Raises:
        UserError: if no installed package offers a task of this name.
    """
    found = entry_points(group=ENTRY_POINT_GROUP)
    if not isinstance(name, str):
        raise UserError(
            f"`task` must be the name of a task, as text, but is {shorten(name)}. The tasks are "
            f"{', '.join(sorted(found.names))}."
        )
    if name not in found.names:
        known = ", ".join(sorted(found.names)) or "(none is installed)"
        near = suggest(name, found.names)
        raise UserError(
            f"`task` must be the name of a task, but is {shorten(name)}. The tasks are {known}.{near} A task of "
            f"your own is an installed package with an entry point in the group {ENTRY_POINT_GROUP}."
        )
    place = found[name].value
    try:
        options = found[name].load()
    except Exception as error:  # the import of another package's module may raise anything
        raise UserError(
            f"The task `{name}` must be importable from `{place}`, but is not: {type(error).__name__}: {error}. "
            "Mend its package, or install it again."
        ) from error
    cls = get_origin(options) or options  # it may be a generic one, filled in
    if not (isinstance(cls, type) and is_dataclass(cls) and callable(getattr(cls, "build", None))):
        raise UserError(
            f"The task `{name}` must be a dataclass of options with a method `build`, but `{place}` is not. "
            "Mend the entry point of its package."
        )
    return cast(type[TaskOptions], options)


def task_names() -> set[str]:
    """Return the names of the tasks that are installed."""
    return set(entry_points(group=ENTRY_POINT_GROUP).names)
