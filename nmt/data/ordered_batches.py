"""The batches of a validation: each example once, by length."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from nmt.data.batch_loader import (
    Feed,
    PlannedBatch,
    Refusal,
    end_workers,
    make_loader,
    read_batches,
    worker_processes,
)
from nmt.data.batching import plan_ordered
from nmt.data.limits import batch_limits
from nmt.data.options import BatchingOptions

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from nmt.task import Examples


class OrderedBatches:
    """This rank's batches of a validation: by length, each example exactly once over all ranks.

    Nothing is shuffled or left out: an example longer than `max_tokens` is a batch of its own. Ranks may get
    different numbers of batches, so the ranks must not exchange anything between batches. Each iteration yields
    the same batches; worker processes live until `close()`.
    """

    def __init__(
        self,
        examples: "Examples[Any]",
        options: BatchingOptions,
        *,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
    ) -> None:
        """Plan the batches; `options` limits them and says how many processes read them."""
        self._plan = [
            PlannedBatch(batch.tolist(), key=(int(batch[0]),))
            for batch in plan_ordered(examples.sizes, batch_limits(options), rank=rank, world_size=world_size)
        ]
        self._feed = Feed()
        # No more workers than batches: the others would have nothing to read.
        num_workers = min(worker_processes(options), len(self._plan))
        self._loader: DataLoader[Any] | None = make_loader(
            examples, self._feed, num_workers=num_workers, pin_memory=pin_memory
        )

    def __iter__(self) -> Iterator[Any]:
        """Yield what `Examples.collate` makes of each batch.

        Raises:
            UnreadableExamplesError: Some examples cannot be read.
        """
        assert self._loader is not None, "closed"
        self._feed.plan = iter(self._plan)
        for batch in read_batches(self._loader):
            if isinstance(batch, Refusal):
                raise batch.error()
            yield batch

    def close(self) -> None:
        """End the worker processes."""
        if self._loader is not None:
            end_workers(self._loader)
        self._loader = None
