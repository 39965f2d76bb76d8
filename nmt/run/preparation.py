"""What is checked and found out before a run begins or goes on."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from nmt.checkpoints.model_folder import load_config
from nmt.checkpoints.run_folder import CheckpointFolder
from nmt.config.mapping import changed_fixed_options
from nmt.data.batch_iterator import BatchIterator
from nmt.data.limits import BatchLimits, are_all_equal, longest
from nmt.data.order import Permutation
from nmt.data.packing import packed_limits
from nmt.distributed import World, single
from nmt.errors import UserError, by_number, counted
from nmt.options import TrainConfig
from nmt.run.memory_probe import find_max_tokens, most_tokens
from nmt.system.slower import telling_what_is_slower
from nmt.task import CheckingTask, Examples, PackingTask, Task
from nmt.task_extras import is_same_asset
from nmt.trainer import Trainer


def refuse_other_run(task: Task[Any], config: TrainConfig[Any], folder: Path) -> None:
    """Raise `UserError` if a checkpoint is of another model, task or vocabulary than the configuration."""
    for name, before, now in changed_fixed_options(load_config(folder), config):
        raise UserError(
            f"`{name}` may not change when a run is resumed: it was {before} in `{folder}`, but is {now}. "
            "Set it back or name another `save-dir`."
        )
    with TemporaryDirectory() as temporary:
        task.save_assets(Path(temporary))
        for path in sorted(Path(temporary).rglob("*")):
            before_path = folder / path.relative_to(temporary)
            if path.is_file() and not (before_path.is_file() and is_same_asset(task, before_path, path)):
                raise UserError(
                    f"`{path.name}` of the data must be the one that the run began with, but differs from "
                    f"`{before_path}`. Use the same data or name another `save-dir`."
                )


def check_model(task: Task[Any], model: nn.Module, world: World) -> None:
    """Let a task look at a model, which stays as it is."""
    if isinstance(task, CheckingTask):
        was_training = model.training
        model.eval()
        task.check_model(model, world)
        model.train(was_training)


def left_out(batches: BatchIterator, config: TrainConfig[Any]) -> list[str]:
    """Return a line on how many examples are left out because of their length; none if there are none.

    Raises:
        UserError: All of them are too long.
    """
    num_left_out, num_left = batches.num_too_long, batches.num_examples
    if num_left == 0:
        raise UserError(
            f"`max-tokens` must be at least the length of some examples, but is "
            f"{config.batching.max_tokens} and all ({num_left_out:,}) are longer. Raise it."
        )
    if not num_left_out:
        return []
    share = num_left_out / (num_left_out + num_left)
    warning = "warning: " if share > 0.01 else ""
    return [
        f"{warning}left out: {num_left_out:,} of {counted(num_left_out + num_left, 'training example')} "
        f"({share:.2%}) {by_number(num_left_out, 'is', 'are')} longer than max-tokens"
    ]


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
    """Return how training batches are packed, or None if they are to be padded.

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
    """Return a line that says why batches are padded where packed ones were to be expected; none elsewhere.

    Examples of one length need no padding, such as images.
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


def with_max_tokens(
    config: TrainConfig[Any],
    task: Task[Any],
    model: nn.Module,
    examples: Examples[Any],
    *,
    world: World,
    checkpoints: CheckpointFolder,
) -> tuple[TrainConfig[Any], list[str]]:
    """Find a number for `max-tokens` auto: that of the run so far, or what is good to train with and fits.

    Returns:
        The configuration with it, and lines on what was chosen, if something was.
    """
    batching = config.batching
    if batching.max_tokens != "auto":
        return config, []
    lines: list[str] = []
    saved = world.broadcast(checkpoints.updates())
    if saved:
        max_tokens = load_config(checkpoints.at(saved[-1])).batching.max_tokens
    else:
        # Alone, since a second wrapper for several ranks around one model would stay.
        trainer = Trainer(
            task,
            model,
            config.optimization,
            world=single(world.device),
            seed=config.seed,
            updates_per_epoch=1,
        )
        order = Permutation(len(examples), seed=config.seed, epoch=1)
        sample = np.sort(order.examples_at(np.arange(min(len(examples), batching.window_size))))
        lengths = longest(examples.sizes[sample])
        most = most_tokens(
            round(float(lengths.mean()) * len(examples)),
            longest_example=int(lengths.max()),
            batches_an_update=world.size * batching.update_freq,
        )
        with telling_what_is_slower(lines):
            max_tokens = find_max_tokens(
                trainer,
                examples,
                sample,
                multiple=batching.required_batch_size_multiple,
                most=most,
                world=world,
            )
        why = (
            "for some 300 updates an epoch at least" if max_tokens == most else "what the memory has room for"
        )
        lines.append(f"max-tokens auto: {max_tokens:,}, {why}")
    return replace(config, batching=replace(batching, max_tokens=max_tokens)), lines
