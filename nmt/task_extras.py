"""What a task may offer beyond what the trainer needs, and the default where it offers nothing.

A task offers one of these by having the attribute or the method. Its class does not matter.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import nn

from nmt.distributed import World
from nmt.task import CheckingTask, Examples, Task

_BLOCK = 2**20


@dataclass(frozen=True)
class Words:
    """The task's words for what it counts, in lines for people. Records have the same names for all tasks."""

    target: str = "target"
    """One of the things that the loss is a mean over."""
    examples: str = "examples"

    @property
    def example(self) -> str:
        """One of the examples."""
        return self.examples.removesuffix("s")

    @property
    def targets(self) -> str:
        """Several of the things that the loss is a mean over."""
        return f"{self.target}s"

    @property
    def a_target(self) -> str:
        """One target with its article, as in "work a target"."""
        return f"{'an' if self.target[0] in 'aeiou' else 'a'} {self.target}"


@runtime_checkable
class HasWords(Protocol):
    """A task that has words of its own."""

    words: Words


@runtime_checkable
class HasRemarks(Protocol):
    """A task that has something to say after a validation."""

    def remarks(
        self, model: nn.Module, examples: Any, results: Mapping[str, float], world: World, /
    ) -> Sequence[str]:
        """Return lines for people, such as some samples; every rank calls this, and rank 0's are shown."""


@runtime_checkable
class HasNextCommand(Protocol):
    """A task whose models have a command of their own."""

    def next_command(self, model: Path, /) -> str:
        """Return the command that a user runs with the best model."""


@runtime_checkable
class ComparesAssets(Protocol):
    """A task whose assets may differ in something that its models do not see."""

    def is_same_asset(self, before: Path, now: Path, /) -> bool:
        """Return whether two files that `save_assets` wrote mean the same."""


@runtime_checkable
class HasFingerprint(Protocol):
    """Examples that can be told from others by their content."""

    def fingerprint(self) -> str:
        """Return a text that is the same for the same examples in the same order, and for no others."""


@runtime_checkable
class HasNotes(Protocol):
    """Examples of which a user should know something before the run begins."""

    def notes(self) -> Sequence[str]:
        """Return lines for people."""


@runtime_checkable
class TakesWholeFolders(Protocol):
    """Examples that are all files of some folders: a file that is written there is data the next time."""

    def folders(self) -> Sequence[Path]:
        """Return the folders; all that is in them counts as data."""


def words_of(task: Task[Any]) -> Words:
    """Return the words of a task, or those that fit any."""
    return task.words if isinstance(task, HasWords) else Words()


def remarks_of(
    task: Task[Any], model: nn.Module, examples: Examples[Any], results: Mapping[str, float], world: World
) -> Sequence[str]:
    """Return what a task says after a validation; every rank must call this."""
    return task.remarks(model, examples, results, world) if isinstance(task, HasRemarks) else ()


def next_command_of(task: Task[Any], model: Path) -> str:
    """Return the command that a user runs with a model folder."""
    return task.next_command(model) if isinstance(task, HasNextCommand) else f"nmt-validate {model}"


def is_same_asset(task: Task[Any], before: Path, now: Path) -> bool:
    """Return whether two files that a task wrote mean the same: their bytes are equal, if it says nothing."""
    if isinstance(task, ComparesAssets):
        return task.is_same_asset(before, now)
    return before.read_bytes() == now.read_bytes()


def fingerprint_of(examples: Examples[Any]) -> str:
    """Return what tells examples from others: their fingerprint, or else their number and lengths."""
    if isinstance(examples, HasFingerprint):
        return examples.fingerprint()
    digest = blake2b(str(examples.sizes.shape).encode(), digest_size=16)
    for start in range(0, len(examples), _BLOCK):
        digest.update(np.ascontiguousarray(examples.sizes[start : start + _BLOCK], dtype="<i4").data)
    return digest.hexdigest()


def notes_of(examples: Examples[Any]) -> Sequence[str]:
    """Return what a user should know of examples before the run begins."""
    return examples.notes() if isinstance(examples, HasNotes) else ()


def folders_of(examples: Examples[Any]) -> Sequence[Path]:
    """Return the folders that nothing else may be written to."""
    return examples.folders() if isinstance(examples, TakesWholeFolders) else ()


def check_model(task: Task[Any], model: nn.Module, world: World) -> None:
    """Let a task look at a model, and leave the model as it was."""
    if isinstance(task, CheckingTask):
        was_training = model.training
        model.eval()
        task.check_model(model, world)
        model.train(was_training)
