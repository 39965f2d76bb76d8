"""What fits into the memory of the device: found out before the first update, not in the middle of a run."""

import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from nmt.checkpoints.model_folder import load_config
from nmt.checkpoints.run_folder import CheckpointFolder
from nmt.data.batch_iterator import BatchIterator
from nmt.data.batching import cut_batches, padded_size
from nmt.data.limits import longest
from nmt.data.order import Indices, Permutation
from nmt.distributed import World
from nmt.errors import UserError
from nmt.options import TrainConfig
from nmt.run.packing import Packing
from nmt.system.out_of_memory import is_out_of_memory
from nmt.system.slower import telling_what_is_slower
from nmt.task import Examples, Task
from nmt.trainer import Trainer
from nmt.update.objective import Objective
from nmt.update.precision import Precision
from nmt.update.probe import NEW_STATE, probe

_FIRST_TOKENS = 512  # the search for the largest batch begins here
_UPDATES_AN_EPOCH = 300  # at least, if `max-tokens` is auto
_FEWEST_TOKENS = 1024  # even for the smallest data
_SAFETY = 0.9  # of what fits: allocations break into pieces as a run goes on


def peak_memory(device: torch.device) -> int:
    """Return the most memory that this process has held so far, in bytes: of the GPU, or else of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def fits(run: Callable[[Any], None], examples: Examples[Any], batch: Indices) -> bool:
    """Run a batch forward and backward, changing nothing, and return whether there was memory for it.

    Args:
        run: Runs it, such as `Trainer.probe`.
        examples: The split.
        batch: The indices of the batch's examples.
    """
    try:
        run(examples.collate([examples[index] for index in batch.tolist()]))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        # The frames of the error still hold the tensors of the batch that failed.
        error.__traceback__ = None
    else:
        return True
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()
    return False


def _fits(trainer: Trainer, examples: Examples[Any], batch: Indices) -> bool:
    if fits(trainer.probe, examples, batch):
        return True
    if trainer.replicas.can_run_alone:
        return False
    raise UserError(
        "`max-tokens` must be so small that each batch fits into memory with `shard-weights`, but one does not. "
        "Lower it."
    )


def find_split(trainer: Trainer, examples: Examples[Any], batches: Sequence[Indices]) -> int | None:
    """Return the padded size above which batches have to be split, or None if the worst ones fit.

    The worst are the one of the largest padded size and the one with the longest example.

    Args:
        trainer: Runs them.
        examples: The training examples.
        batches: What batches will be like.

    Raises:
        UserError: There is no memory for a single example.
    """
    sizes = examples.sizes
    largest = max(batches, key=lambda batch: padded_size(sizes, batch))
    with_longest = max(batches, key=lambda batch: int(longest(sizes[batch]).max()))
    limit: int | None = None
    # If both are the same batch, it is run once: on a slow machine a run takes as long as an update.
    for worst in (largest,) if largest is with_longest else (largest, with_longest):
        batch = worst
        while not _fits(trainer, examples, batch):
            if len(batch) == 1:
                length = int(longest(sizes[batch])[0])
                raise UserError(
                    f"The training examples must fit into memory, but one of length {length} alone does not. "
                    "Make the model smaller, or leave out long examples (`max-tokens`)."
                )
            batch = batch[: len(batch) // 2]
            limit = min(limit or sys.maxsize, padded_size(sizes, batch))
    # All ranks must plan the same.
    limits = [found for found in trainer.world.gather(limit) if found is not None]
    return min(limits, default=None)


def decide_split(trainer: Trainer, batches: BatchIterator, packing: Packing | None) -> None:
    """Find out whether batches fit into memory, and run those that do not in parts.

    Args:
        trainer: Runs the worst batches.
        batches: The batches of training.
        packing: How batches are packed, if they are.
    """
    # The split of the run so far is kept. Another one would round differently when it is resumed with more memory.
    if packing is None:
        found = find_split(trainer, batches.examples, batches.first_batches)
        batches.split_above = lower(found, batches.split_above)
        return
    max_tokens, longest_one = packing.limits.max_tokens, batches.survey.longest
    assert max_tokens is not None
    example = batches.first_batches[0][:1]
    found = find_packed_split(trainer, packing.pack, example, longest=longest_one, max_tokens=max_tokens)
    batches.split_above = lower(found, batches.split_above)
    # A run that was padded so far may have been split into smaller parts.
    size = min(max_tokens, max(batches.split_above or max_tokens, longest_one))
    batches.collate_with(packing.pack(max_tokens=size))


def lower(one: int | None, other: int | None) -> int | None:
    """Return the lower of two limits, of which there may be none."""
    return min((limit for limit in (one, other) if limit is not None), default=None)


def find_packed_split(
    trainer: Trainer,
    pack: Callable[..., Examples[Any]],
    example: Indices,
    *,
    longest: int,
    max_tokens: int,
) -> int | None:
    """Return the number of tokens above which packed batches have to be split, or None if they fit as they are.

    Args:
        trainer: Runs them.
        pack: Returns the training examples, to be collated into rows for `max_tokens`.
        example: The index of any example, (1,): every row takes the same memory.
        longest: The length of the longest example, which a row must hold.
        max_tokens: The wanted number of tokens of a row.

    Raises:
        UserError: There is no memory for a row of the longest example.
    """
    tokens = max_tokens
    while not _fits(trainer, pack(max_tokens=tokens), example):
        if tokens == longest:
            raise UserError(
                f"The training examples must fit into memory, but a row of {tokens} tokens, the length of the "
                "longest one, does not. Make the model smaller, or leave out long examples (`max-tokens`)."
            )
        tokens = max(tokens // 2, longest)
    limits = trainer.world.gather(tokens)
    return None if min(limits) == max_tokens else min(limits)


def with_max_tokens(
    config: TrainConfig[Any],
    task: Task[Any],
    model: nn.Module,
    examples: Examples[Any],
    *,
    world: World,
    checkpoints: CheckpointFolder,
) -> tuple[TrainConfig[Any], list[str]]:
    """Find a number for `max-tokens` auto: that of the run so far, or one that is good to train with and fits.

    Returns:
        The configuration with this number, and lines on what was chosen, if anything was.
    """
    batching = config.batching
    if batching.max_tokens != "auto":
        return config, []
    lines: list[str] = []
    saved = world.broadcast(checkpoints.updates())
    if saved:
        max_tokens = load_config(checkpoints.at(saved[-1])).batching.max_tokens
    else:
        objective = Precision(config.optimization.precision, world.device).wrap(Objective(task, model), model)
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
                partial(probe, objective, device=world.device, num_copies=NEW_STATE),
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


def find_max_tokens(
    run: Callable[[Any], None],
    examples: Examples[Any],
    window: Indices,
    *,
    multiple: int,
    most: int,
    world: World,
) -> int:
    """Return the largest `max_tokens` for which the worst batch fits, with a margin, but no more than `most`.

    Args:
        run: Runs batches, each one and a half times as large as the one before, until one does not fit.
        examples: The training examples.
        window: A sample of them, (n,) indices.
        multiple: Like `required_batch_size_multiple`.
        most: The most that is good to train with, see `most_tokens`.
        world: The ranks; the batches must fit on each.

    Raises:
        UserError: On the CPU, which is not limited by its memory; or nothing fits.
    """
    if world.device.type == "cpu":
        raise UserError("`max-tokens` must be a number on a CPU, but is auto. Give one, such as 4096.")
    return search_max_tokens(
        lambda batch: fits(run, examples, window[batch]),
        examples.sizes[window],
        multiple=multiple,
        most=most,
        world=world,
    )


def most_tokens(num_tokens: int, *, longest_example: int, batches_an_update: int) -> int:
    """Return the largest `max_tokens` with a few hundred updates per epoch; with fewer, an epoch teaches little.

    Args:
        num_tokens: Tokens of an epoch, counting the longer side of each example.
        longest_example: A batch must have room for it.
        batches_an_update: Number of batches per update, over all ranks.
    """
    return max(_FEWEST_TOKENS, longest_example, num_tokens // (_UPDATES_AN_EPOCH * batches_an_update))


def search_max_tokens(
    does_fit: Callable[[Indices], bool], sizes: Any, *, multiple: int, most: int, world: World
) -> int:
    """The search of `find_max_tokens`, over batches of rows of `sizes`, (n, C)."""
    lengths = longest(sizes)
    found, tokens = 0, min(_FIRST_TOKENS, most)
    while True:
        batches = cut_batches(sizes[lengths <= tokens], max_tokens=tokens, multiple=multiple)
        rows = (lengths <= tokens).nonzero()[0]
        worst = max(batches, key=lambda batch: padded_size(sizes, rows[batch]), default=None)
        if worst is not None:
            is_everything = len(batches) == 1 and len(rows) == len(sizes)
            if not all(world.gather(does_fit(rows[worst]))):
                break
            found = tokens
            if is_everything:
                break
        if tokens == most:
            break
        tokens = min(tokens + tokens // 2, most)
    if not found:
        raise UserError(
            f"The training examples must fit into memory, but a batch of {tokens} tokens does not. "
            "Make the model smaller."
        )
    return most if found == most else int(found * _SAFETY)
