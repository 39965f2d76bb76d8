"""Whether training batches are packed, and why not."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from nmt.data.limits import BatchLimits, are_all_equal
from nmt.data.packing import packed_limits
from nmt.errors import UserError
from nmt.options import TrainConfig
from nmt.task import Examples, PackingTask, Task


class Packing(NamedTuple):
    """How training batches are packed."""

    limits: BatchLimits
    """What a batch may hold."""
    pack: Callable[..., Examples[Any]]
    """Returns the training examples, to be collated into rows for `max_tokens`."""


def packing(
    config: TrainConfig[Any],
    task: Task[Any],
    model: nn.Module,
    examples: Examples[Any],
    device: torch.device,
) -> Packing | None:
    """Return how training batches are packed, or None if they are padded.

    Raises:
        UserError: They must be packed, but cannot.
    """
    batching = config.batching
    if not _wants_packing(config, device):
        return None
    if (reason := _why_padded(config, task, model)) is not None:
        if batching.packing == "on":
            raise UserError(
                "`packing` must be auto or off where the task, its loss or its model takes no packed batches, but "
                f"is on, and {reason}. Leave it out."
            )
        return None
    assert isinstance(task, PackingTask)
    limits = packed_limits(batching, examples.sizes)
    assert limits.max_sentences is not None
    return Packing(limits, partial(task.pack, examples, max_sentences=limits.max_sentences))


def notes_on_padding(
    config: TrainConfig[Any],
    task: Task[Any],
    model: nn.Module,
    examples: Examples[Any],
    device: torch.device,
) -> list[str]:
    """Return a line that says why batches are padded, if a user would expect packed ones; otherwise no line.

    Examples of one length, such as images, need no padding.
    """
    if not _wants_packing(config, device) or are_all_equal(examples.sizes):
        return []
    reason = _why_padded(config, task, model)
    if reason is None:
        return []
    return [f"batches are padded, which is slower on a GPU than packed ones: {reason}"]


def _wants_packing(config: TrainConfig[Any], device: torch.device) -> bool:
    wanted = config.batching.packing
    return wanted == "on" or (wanted == "auto" and device.type == "cuda")


def _why_padded(config: TrainConfig[Any], task: Task[Any], model: nn.Module) -> str | None:
    """Return why batches cannot be packed, or None if they can."""
    if config.optimization.shard_weights:
        return "weights are sharded"
    if config.batching.max_tokens is None:
        return "`max-tokens`, the size of packed rows, is not set"
    if not isinstance(task, PackingTask):
        return f"the task {config.task} packs no batches"
    return task.why_padded(model)
