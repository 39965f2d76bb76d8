"""One pass over a split: a task measures a model, and every example counts once over all ranks."""

from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nmt.checkpoints.model_folder import build_model
from nmt.data.ordered_batches import OrderedBatches
from nmt.distributed import World, join_world
from nmt.errors import UnreadableExamplesError
from nmt.options import TrainConfig
from nmt.task import Batch, Examples, Task, batch_sums
from nmt.task_extras import notes_of
from nmt.update.metrics import Metrics
from nmt.update.summary import summarize


@torch.no_grad()
def validate(
    task: Task[Any], model: nn.Module, examples: Examples[Any], batches: Iterable[Batch], *, world: World
) -> dict[str, float]:
    """Return the task's metrics of a split, the same on every rank; the model is put into evaluation mode.

    Raises:
        UnreadableExamplesError: A rank cannot read some examples. It is raised on every rank.

    Args:
        task: Computes the loss and what else is measured.
        model: On the device of the world.
        examples: The whole split.
        batches: This rank's share of its batches, such as `OrderedBatches`.
        world: The ranks that share the work.
    """
    model.eval()
    metrics = Metrics()
    refusal = None
    with metrics.scope("valid"):
        try:
            for batch in batches:
                metrics.add(batch_sums(task.compute_loss(model, batch.to(world.device)), batch))
        except UnreadableExamplesError as error:
            refusal = str(error)
    for text in world.gather(refusal):
        if text is not None:
            raise UnreadableExamplesError(text)
    results = summarize(task, metrics.sums("valid", world))
    return {**results, **task.evaluate(model, examples, world)}


def validate_model(
    folder: Path, config: TrainConfig[Any], *, split: str, say: Callable[[str], object]
) -> dict[str, float] | None:
    """Measure the model of a folder; under torchrun every rank calls this.

    Args:
        folder: The model folder.
        config: What it was trained with, perhaps with other data or batches.
        split: "train", "valid" or "test".
        say: Called on rank 0 with each line about the examples that a user should know of.

    Returns:
        The task's metrics on rank 0, None on the others.

    Raises:
        UserError: Folder, configuration and data do not fit together.
    """
    with join_world(config.device) as world:
        task: Task[Any] = config.task_options.build(folder)
        examples = task.open_split(split)
        if world.is_main:
            for note in notes_of(examples):
                say(note)
        model = build_model(task, folder)
        batches = OrderedBatches(examples, config.batching, rank=world.rank, world_size=world.size)
        with closing(batches):
            results = validate(task, model.to(world.device), examples, batches, world=world)
        return results if world.is_main else None
