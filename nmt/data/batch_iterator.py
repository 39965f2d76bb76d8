"""Epochs of micro-batches for one rank, with a position that can be saved and restored.

Nothing is pushed: each of these pulls from the one below it. The DataLoader pulls when it has room for one more.

    the training loop       an update: its micro-batches, collated
      BatchIterator         takes the note of the update, and as many batches as it says; then moves the position
        DataLoader          collated batches, read here or ahead by worker processes    (batch_loader.py)
          _plan_loading     the indices of one batch after another; leaves a note of each update
            plan_updates    this rank's part of each update                             (update_plan.py)
              plan_batches  all ranks' batches, each with the position after it
                plan_window the batches of a window, cut from the order of the epoch    (batching.py, order.py)

So everything below the DataLoader is ahead of what has been handed out. The notes that wait in between are in
`planned`. The position (position.py) is that of the last update that was handed out:

    planned           1 2 3 4 5 6 7
    read and waiting      3 4 5 6         by worker processes
    handed out        1 2                 the position is here
"""

from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self
from weakref import ref

from nmt.data.batch_loader import (
    Feed,
    PlannedBatch,
    Refusal,
    end_workers,
    make_loader,
    read_batches,
    worker_processes,
)
from nmt.data.batching import Window, num_windows, plan_window
from nmt.data.limits import BatchLimits, Survey, batch_limits, survey
from nmt.data.options import BatchingOptions
from nmt.data.order import Indices, Order, Permutation
from nmt.data.position import Position, is_start_of_epoch
from nmt.data.update_plan import Dealing, PlannedUpdate, plan_updates
from nmt.errors import UserError

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from nmt.task import Examples


class MicroBatch(NamedTuple):
    """One batch of one rank in an update."""

    batch: Any
    """What `Examples.collate` made."""

    weight: float
    """1.0, or 0.0 for a filler: a repeated batch for a rank for which no batch was left."""

    indices: Sequence[int] = ()
    """The indices of its examples in the split, to name them in messages."""


class BatchIterator:
    """Iterates over the updates of an epoch, as the micro-batches of this rank.

    Each iteration begins at the current position and ends with the epoch; then the position moves to the
    next epoch. The position counts what has been handed out, not what worker processes have read ahead. The last
    update of an epoch may be smaller; a rank for which too few batches are left gets a filler.

    The same seed, data and options give the same sequence, bit for bit, interrupted or not, for any number
    of worker processes. If a restored run has other limits (`max_tokens`, `batch_size`,
    `required_batch_size_multiple`, `is_packed`), the rest of the open window is cut again. With another number of
    ranks or another `update_freq` the same sequence is dealt in other groups. Either way each example comes once
    per epoch. A changed `seed` or `window_size` takes effect with the next epoch.

    Worker processes live until `close()`, or until the iterator is garbage. They are spawned, since forking a
    process with threads or a CUDA context is unsafe. So `examples` must pickle, as paths rather than content.
    """

    def __init__(
        self,
        examples: "Examples[Any]",
        options: BatchingOptions,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int | None = None,
        pin_memory: bool = False,
        limits: BatchLimits | None = None,
    ) -> None:
        """Start at the first epoch.

        Args:
            examples: the split to iterate over.
            options: limits of a batch, batches per update, worker processes.
            seed: non-negative; decides the order of all epochs.
            rank: of this process, in range(world_size).
            world_size: number of processes that share each update.
            num_workers: worker processes of this rank, `options.num_workers` unless given.
            pin_memory: hand out batches in page-locked memory, for copies to a CUDA device.
            limits: what a batch may hold, instead of what the options say.
        """
        assert 0 <= rank < world_size, (rank, world_size)
        if seed < 0:
            raise UserError(f"`seed` must be at least 0, but is {seed}. Give another number.")
        options.check()
        self._examples = examples
        self._options = options
        self._limits = limits or batch_limits(options)
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._position = self._epoch_start(1)
        self._iteration: ref[Generator[list[MicroBatch], None, None]] | None = None
        self._feed = Feed()
        self._loader: DataLoader[Any] | None = None
        self._num_workers = worker_processes(options) if num_workers is None else num_workers
        self._pin_memory = pin_memory
        self.split_above: int | None = None
        """Batches of a larger size are run in parts, as micro-batches; the update stays the same. The size counts
        padding. For packed batches it is the largest sum of a column."""
        self.refusal: Refusal | None = None
        """Why a batch of this rank could not be read, if there are other ranks. They are already in the update, so
        a filler takes the batch's place, and all ranks end after the update."""
        self._filler: Any = None  # a batch that could be read

    def collate_with(self, examples: "Examples[Any]") -> None:
        """Take the same examples with another `collate`; call this before the first iteration."""
        assert self._loader is None and len(examples) == len(self._examples)
        self._examples = examples

    @property
    def examples(self) -> "Examples[Any]":
        """The split that batches are made of."""
        return self._examples

    @property
    def epoch(self) -> int:
        """The epoch that the position is in, from 1 on.

        Between the last update and the end of the iteration it is still the old epoch, so that a run that is
        resumed there ends that epoch like any other.
        """
        return self._position.window.order.epoch

    @property
    def examples_consumed(self) -> int:
        """Number of examples of this epoch handed out so far, over all ranks."""
        return self._position.examples_consumed

    @property
    def limits(self) -> BatchLimits:
        """What a batch may hold; longer examples are left out."""
        return self._limits

    @property
    def num_examples(self) -> int:
        """Number of examples of an epoch under the current limits, over all ranks."""
        return len(self._examples) - self.num_too_long

    @property
    def num_too_long(self) -> int:
        """Number of examples left out because they are longer than `max_tokens`."""
        return self.survey.num_too_long

    @cached_property
    def survey(self) -> Survey:
        """What remains of the data under the limits. The lengths of all examples are read once for it."""
        return survey(self._examples.sizes, self._limits)

    @cached_property
    def updates_per_epoch(self) -> int:
        """Number of updates of the first epoch; with several windows, an estimate from the first window."""
        num_batches = round(
            len(self.first_batches) * max(1.0, len(self._examples) / self._options.window_size)
        )
        return -(-num_batches // (self._world_size * self._options.update_freq))

    @cached_property
    def first_batches(self) -> list[Indices]:
        """The batches of the first window of the first epoch, of all ranks: a sample of what batches will be like.

        A window whose examples are all left out is skipped. The list is empty if all windows are like that.
        """
        order, size = self._order(self._seed, epoch=1), self._options.window_size
        for number in range(num_windows(order.num_places, size)):
            window = Window(order, number, size)
            if batches := plan_window(self._examples.sizes, [(self._limits, 0)], window=window):
                return batches
        return []

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        """Yield this rank's micro-batches of each update, from the position to the end of the epoch.

        All ranks get lists of the same length. A new iteration makes an older one invalid.

        Raises:
            UserError: no example is short enough.
            UnreadableExamplesError: some examples cannot be read; the position stays before their update.
        """
        iteration = self._iterate()
        self._iteration = ref(iteration)
        return iteration

    def _iterate(self) -> Generator[list[MicroBatch], None, None]:
        if self.num_examples == 0:
            raise UserError(
                "the training data must hold an example within `max-tokens`, but of "
                f"{len(self._examples):,} there is none. Raise `max-tokens`, or check the data."
            )
        planned: deque[PlannedUpdate] = deque()
        plan = self._plan_loading(planned)
        loaded = self._start_loading(plan)
        for first in loaded:
            assert self._feed.plan is plan, "a newer iteration over this BatchIterator has taken over"
            update = planned.popleft()
            batches = [first] + [next(loaded) for _ in update.batches[1:]]
            batches, weights = self._with_fillers(batches, update.weights)
            self._position = update.end
            indices = [batch.tolist() for batch in update.batches]
            yield list(map(MicroBatch, batches, weights, indices))
        self._position = self._epoch_start(self.epoch + 1)

    def _with_fillers(self, batches: list[Any], weights: list[float]) -> tuple[list[Any], list[float]]:
        """Return the batches and their weights, with a filler in place of a batch that cannot be read.

        Raises:
            UnreadableExamplesError: A batch cannot be read, and there is no other rank that would wait.
            UserError: There are other ranks, but no filler, because this is the first update.
        """
        for place, batch in enumerate(batches):
            if not isinstance(batch, Refusal):
                self._filler = batch
            elif self._world_size == 1:
                raise batch.error()
            elif self._filler is None:
                raise UserError(batch.text)  # the first update of this process: nothing is lost
            else:
                self.refusal = batch
                batches[place], weights[place] = self._filler, 0.0
        return batches, weights

    def close(self) -> None:
        """End the worker processes. A later iteration starts new ones."""
        iteration = self._iteration() if self._iteration is not None else None
        if iteration is not None:
            iteration.close()  # an open iteration would keep the loader alive
        self._feed.plan = iter(())
        if self._loader is not None:
            end_workers(self._loader)
        self._loader = None

    def __enter__(self) -> Self:
        """Return the iterator, to be closed at the end of the `with` block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the iterator."""
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the position, the same on all ranks, in JSON types."""
        return self._position.to_state(dataset_size=len(self._examples))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Move to a saved position. The next iteration begins there.

        Raises:
            UserError: the position is inside an epoch over another number of examples.
        """
        if is_start_of_epoch(state):
            self._position = self._epoch_start(state["epoch"])
        else:
            order = self._order(state["seed"], state["epoch"])
            self._position = Position.from_state(state, order, dataset_size=len(self._examples))

    def _epoch_start(self, epoch: int) -> Position:
        window = Window(self._order(self._seed, epoch), number=0, size=self._options.window_size)
        return Position(window, ((self._limits, 0),), examples_consumed=0)

    def _order(self, seed: int, epoch: int) -> Order:
        """Return the order of an epoch. Only this place decides what an epoch is."""
        return Permutation(len(self._examples), seed=seed, epoch=epoch)

    def _start_loading(self, plan: Iterator[PlannedBatch]) -> Iterator[Any]:
        """Return the collated batches of a plan, in its order."""
        if self._loader is None:
            self._loader = make_loader(
                self._examples, self._feed, num_workers=self._num_workers, pin_memory=self._pin_memory
            )
        # Workers live on from iteration to iteration, so their loader must, too. It asks for the new plan.
        self._feed.plan = plan
        return read_batches(self._loader)

    def _plan_loading(self, planned: deque[PlannedUpdate]) -> Iterator[PlannedBatch]:
        """Yield batch after batch, and note the updates that they make up in `planned`."""
        dealing = Dealing(
            limits=self._limits,
            rank=self._rank,
            world_size=self._world_size,
            update_freq=self._options.update_freq,
            split_above=self.split_above,
        )
        for update in plan_updates(self._examples.sizes, self._position, dealing):
            planned.append(update)
            order = update.end.window.order
            for batch in update.batches:
                # An example comes once in an epoch, so the first example identifies its batch. The number of the
                # batch would fit any order, but runs that have begun already would be seeded differently.
                yield PlannedBatch(batch.tolist(), key=(order.seed, order.epoch, int(batch[0])))
