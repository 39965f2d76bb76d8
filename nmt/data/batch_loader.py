"""Reading planned batches: in this process, or ahead of it by worker processes.

Everything random in reading, such as augmentation, is seeded batch by batch. So the same plan gives the same
batches for any number of worker processes, interrupted or not.
"""

import atexit
import multiprocessing
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import ref

import numpy as np
import torch
from torch.utils.data import DataLoader

from nmt.data.options import BatchingOptions
from nmt.errors import UnreadableExamplesError, UserError
from nmt.system.signals import shielded_from_signals

if TYPE_CHECKING:
    from nmt.task import Examples

_LOST_WORKER = (
    "The processes that read batches (`num-workers`) must live as long as the training, but one has ended: the "
    "system may have killed it for want of memory, or it says why above. The same command goes on from the last "
    "checkpoint; `num-workers: 0` reads in the training process."
)


class PlannedBatch(NamedTuple):
    """A batch that is still to be read."""

    indices: list[int]
    """The indices of its examples, in order."""
    key: tuple[int, ...]
    """The seed of its random choices."""


class Feed:
    """The batch sampler of a loader. It passes on the plan that is set when an iteration begins.

    The loader draws from it in this process, and only when it has room for one more batch.
    """

    def __init__(self) -> None:
        self.plan: Iterator[PlannedBatch] = iter(())

    def __iter__(self) -> Iterator[PlannedBatch]:
        return self.plan


def make_loader(
    examples: "Examples[Any]", feed: Feed, *, num_workers: int, pin_memory: bool
) -> DataLoader[Any]:
    """Return a loader of the batches that a feed plans, in its order.

    Args:
        examples: The split; it must pickle if there are worker processes.
        feed: Where the plan is set.
        num_workers: Processes that read ahead; they live as long as the loader. 0: this process reads.
        pin_memory: Return the batches in page-locked memory.
    """
    loader: DataLoader[Any] = DataLoader(
        _Reader(examples),  # type: ignore[arg-type]  # any object with `__getitems__` will do
        batch_sampler=feed,  # type: ignore[arg-type]  # and whatever `__getitems__` takes for a batch
        collate_fn=_already_collated,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        # Forking a process with threads or a CUDA context is unsafe.
        multiprocessing_context="spawn" if num_workers > 0 else None,
        # Without a generator of its own, each iteration would draw a seed from this process's global generator.
        generator=torch.Generator().manual_seed(0),
    )
    if num_workers > 0:
        # Before multiprocessing's own exit: that sends a signal, from which workers are shielded, and waits.
        atexit.register(_end_workers_of, ref(loader))
    return loader


def worker_processes(options: BatchingOptions) -> int:
    """Return how many processes the options ask for; 0 for auto, since the device is not known here."""
    return 0 if options.num_workers == "auto" else options.num_workers


def end_workers(loader: "DataLoader[Any]") -> None:
    """End the worker processes of a loader, and the thread that pins their batches.

    They would end with the loader's iterator too, but an exception's frames, for example, may keep that alive.
    """
    iterator, loader._iterator = loader._iterator, None
    if iterator is not None:
        iterator._shutdown_workers()  # type: ignore[attr-defined]  # only iterators with workers are kept


def _end_workers_of(loader: "ref[DataLoader[Any]]") -> None:
    found = loader()
    if found is not None:
        end_workers(found)


def read_batches(loader: "DataLoader[Any]") -> Iterator[Any]:
    """Yield the batches of a loader, or a `Refusal` for one that cannot be read.

    When a worker process has ended, refusals follow without end.
    """
    with shielded_from_signals() if loader.num_workers else nullcontext():  # the first time starts workers
        batches = iter(loader)
    try:
        yield from batches
        return
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):  # an error within a worker has its own type and traceback
            raise
    while True:
        yield Refusal(_LOST_WORKER)


def refuse_import_by_worker() -> None:
    """Refuse to go on in a worker process that is importing the script that started it.

    Raises:
        UserError: This is such a process: the script would start all over in each worker.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # like Python's own check
        raise UserError(
            'The script must begin its training under `if __name__ == "__main__":`, but began it when it was '
            "imported by a process that reads batches. Put the call there, or take `num_workers=0`."
        )


@contextmanager
def seeded(key: Sequence[int]) -> Iterator[None]:
    """Seed the generators of torch (for the CPU), NumPy and Python within the block; then restore them."""
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    seed = int.from_bytes(blake2b(repr(tuple(key)).encode(), digest_size=8).digest(), "little")
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])


@dataclass(frozen=True)
class _Reader:
    """Reads and collates whole batches; the loader calls it in its workers."""

    examples: "Examples[Any]"

    def __getitems__(self, planned: PlannedBatch) -> Any:
        try:
            with seeded(planned.key):
                return self.examples.collate([self.examples[index] for index in planned.indices])
        except UserError as error:
            return Refusal(str(error))


@dataclass(frozen=True)
class Refusal:
    """Takes the place of a batch whose examples the user must correct, such as a damaged file.

    An error raised in a worker would arrive with a traceback as its text.
    """

    text: str

    def error(self) -> UnreadableExamplesError:
        """Return what to raise instead."""
        return UnreadableExamplesError(self.text)


def _already_collated(batch: Any) -> Any:
    return batch
