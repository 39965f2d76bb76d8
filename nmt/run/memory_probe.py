"""What fits into the memory of the device, found out before the first update instead of in the middle of a run."""

import resource
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from nmt.data.batching import cut_batches, padded_size
from nmt.data.limits import longest
from nmt.data.order import Indices
from nmt.distributed import World
from nmt.errors import UserError
from nmt.trainer import Trainer

if TYPE_CHECKING:
    from nmt.task import Examples

_FIRST_TOKENS = 512  # the search for the largest batch begins here
_UPDATES_AN_EPOCH = 300  # at least, where `max-tokens` is found
_FEWEST_TOKENS = 1024  # however small the data
_SAFETY = 0.9  # of what fits: allocations break into pieces as a run goes on


def peak_memory(device: torch.device) -> int:
    """Return the most memory that this process has held so far, in bytes: of the GPU, or else of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def fits(trainer: Trainer, examples: "Examples[Any]", batch: Indices) -> bool:
    """Run a batch forward and backward, changing nothing, and return whether there was memory for it."""
    try:
        trainer.probe(examples.collate([examples[index] for index in batch.tolist()]))
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        if not trainer.replicas.can_run_alone:
            raise UserError(
                "`max-tokens` must be so small that each batch fits into memory with `shard-weights`, but one "
                "does not. Lower it."
            ) from None
        # What failed is still held by the frames of the error.
        error.__traceback__ = None
    else:
        return True
    if trainer.world.device.type == "cuda":
        torch.cuda.empty_cache()
    return False


def find_split(trainer: Trainer, examples: "Examples[Any]", batches: Sequence[Indices]) -> int | None:
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
    # Where these are one batch it is not run twice: on a slow machine that takes as long as an update.
    for worst in (largest,) if largest is with_longest else (largest, with_longest):
        batch = worst
        while not fits(trainer, examples, batch):
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


def find_packed_split(
    trainer: Trainer,
    pack: Callable[..., "Examples[Any]"],
    example: Indices,
    *,
    longest: int,
    max_tokens: int,
) -> int | None:
    """Return the number of tokens above which packed batches have to be split, or None if they fit as they are.

    Args:
        trainer: Runs them.
        pack: Returns the training examples, to be collated into rows for `max_tokens`.
        example: Any one of them, (1,): each row takes as much memory.
        longest: The length of the longest example, which a row must hold.
        max_tokens: What a row is to hold.

    Raises:
        UserError: There is no memory for a row of the longest example.
    """
    tokens = max_tokens
    while not fits(trainer, pack(max_tokens=tokens), example):
        if tokens == longest:
            raise UserError(
                f"The training examples must fit into memory, but a row of {tokens} tokens, the length of the "
                "longest one, does not. Make the model smaller, or leave out long examples (`max-tokens`)."
            )
        tokens = max(tokens // 2, longest)
    limits = trainer.world.gather(tokens)
    return None if min(limits) == max_tokens else min(limits)


def find_max_tokens(
    trainer: Trainer, examples: "Examples[Any]", window: Indices, *, multiple: int, most: int, world: World
) -> int:
    """Return the largest `max_tokens` for which the worst batch fits, with a margin, but no more than `most`.

    Args:
        trainer: Runs the batches, of one and a half times the size each, until one does not fit.
        examples: The training examples.
        window: A sample of them, (n,) indices.
        multiple: As `required_batch_size_multiple`.
        most: What is good to train with, see `most_tokens`.
        world: The ranks, which must all find room.

    Raises:
        UserError: On the CPU, whose memory is not its limit; or nothing fits.
    """
    if trainer.world.device.type == "cpu":
        raise UserError("`max-tokens` must be a number on a CPU, but is auto. Give one, such as 4096.")
    return search_max_tokens(
        lambda batch: fits(trainer, examples, window[batch]),
        examples.sizes[window],
        multiple=multiple,
        most=most,
        world=world,
    )


def most_tokens(num_tokens: int, *, longest_example: int, batches_an_update: int) -> int:
    """Return the largest `max_tokens` for which an epoch has some hundred updates: fewer learn little from it.

    Args:
        num_tokens: Of an epoch, the longer side of each example.
        longest_example: Has room in any case.
        batches_an_update: Of all ranks.
    """
    return max(_FEWEST_TOKENS, longest_example, num_tokens // (_UPDATES_AN_EPOCH * batches_an_update))


def search_max_tokens(
    does_fit: Callable[[Indices], bool], sizes: Any, *, multiple: int, most: int, world: World
) -> int:
    """The search of `find_max_tokens`, over batches of rows of `sizes`, (n, C)."""
    found, tokens = 0, min(_FIRST_TOKENS, most)
    while True:
        lengths = longest(sizes)
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


def _is_out_of_memory(error: RuntimeError) -> bool:
    # The CPU's allocator has no type of its own.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
