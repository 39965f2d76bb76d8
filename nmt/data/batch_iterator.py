"""Epochs of micro-batches for one rank, with a position that can be saved and restored.

There is one global sequence of batches per epoch, the same for any number of ranks. Each update takes the
next world_size * update_freq batches of it; rank r gets every world_size-th of these, from the r-th on. So a
position in the sequence means the same to all ranks, and to a later run with another number of them.
"""

from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self
from weakref import ref

import numpy as np

from nmt.data.batch_loader import Feed, PlannedBatch, Refusal, end_workers, make_loader, read_batches
from nmt.data.batching import Cut, Window, cut_by, num_windows, plan_ordered, plan_window
from nmt.data.limits import BatchLimits, Survey, batch_limits, longest, survey
from nmt.data.options import BatchingOptions
from nmt.data.order import Indices, Order, Permutation
from nmt.errors import DamagedError, UserError, counted

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from nmt.task import Examples


class MicroBatch(NamedTuple):
    """One batch of one rank in an update."""

    batch: Any
    """What `Examples.collate` made."""

    weight: float
    """1.0; or 0.0 for a filler, a repeated batch for a rank to which none was left."""

    indices: Sequence[int] = ()
    """Of its examples in the split, to name them by."""


@dataclass(frozen=True)
class _Position:
    """A place in the sequence of batches: the next one to come is batch `cuts[-1][1]` of the last cut."""

    window: Window
    cuts: tuple[Cut, ...]
    """How this window has been cut so far, and the number of batches consumed of each cut."""
    examples_consumed: int
    """In this epoch."""


class _Update(NamedTuple):
    """The part of one rank in one update, as planned."""

    batches: list[Indices]
    weights: list[float]
    end: _Position
    """The position once this update is handed out; the same on all ranks."""


class BatchIterator:
    """Iterates over the updates of an epoch, as the micro-batches of this rank.

    Each iteration begins at the current position and ends with the epoch; then the position moves to the
    next one. The position counts what has been handed out, whatever worker processes have read ahead. The
    last update of an epoch may be smaller; a rank for which its batches do not suffice gets a filler.

    The same seed, data and options give the same sequence, bit for bit, interrupted or not, for any number
    of worker processes. If a restored run has other limits (`max_tokens`, `batch_size`,
    `required_batch_size_multiple`, `is_packed`), what is left of the open window is cut
    again; with another number of ranks or another `update_freq` the same sequence is dealt in other groups.
    Either way each example comes once per epoch. A changed `seed` or `window_size` takes effect with the next
    epoch.

    Worker processes live until `close()`, or until the iterator is garbage. They are spawned, since forking a
    process with threads or a CUDA context is unsafe. So `examples` must pickle: as paths rather than content.
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
        self._num_workers = _num_workers(options) if num_workers is None else num_workers
        self._pin_memory = pin_memory
        self.split_above: int | None = None
        """Batches of a larger size are run in parts, as micro-batches; the update stays the same. The size is that
        with padding, or where batches are packed the sum of any column."""
        self.refusal: Refusal | None = None
        """Why a batch of this rank could not be read, where there are other ranks: they are in the update by then,
        so a filler takes the batch's place, and all end after it."""
        self._filler: Any = None  # a batch that could be read

    def collate_with(self, examples: "Examples[Any]") -> None:
        """Let the same examples, of another `collate`, make the batches; before the first iteration."""
        assert self._loader is None and len(examples) == len(self._examples)
        self._examples = examples

    @property
    def examples(self) -> "Examples[Any]":
        """What batches are made of."""
        return self._examples

    @property
    def epoch(self) -> int:
        """The epoch that the position is in, from 1 on.

        It is still the old one between the last update and the end of the iteration, so that a run that is
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
        """Number of examples left out since they are beyond `max_tokens`."""
        return self.survey.num_too_long

    @cached_property
    def survey(self) -> Survey:
        """What the limits leave of the data, for which the lengths of all examples are read once."""
        return survey(self._examples.sizes, self._limits)

    @cached_property
    def updates_per_epoch(self) -> int:
        """Number of updates of the first epoch; of more than one window, an estimate from the first."""
        num_batches = round(
            len(self.first_batches) * max(1.0, len(self._examples) / self._options.window_size)
        )
        return -(-num_batches // (self._world_size * self._options.update_freq))

    @cached_property
    def first_batches(self) -> list[Indices]:
        """The batches of the first window of the first epoch, of all ranks: what batches will be like.

        A window of nothing but examples that are left out is passed over; there are none if all windows are so.
        """
        order, size = self._order(self._seed, epoch=1), self._options.window_size
        for number in range(num_windows(order.num_places, size)):
            window = Window(order, number, size)
            if batches := plan_window(self._examples.sizes, [(self._limits, 0)], window=window):
                return batches
        return []

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        """Yield this rank's micro-batches of each update, from the position to the end of the epoch.

        All ranks get lists of the same length. A new iteration ends the validity of an older one.

        Raises:
            UserError: no example is short enough.
            UnreadableExamplesError: some cannot be read; the position stays before their update.
        """
        iteration = self._iterate()
        self._iteration = ref(iteration)
        return iteration

    def _iterate(self) -> Generator[list[MicroBatch], None, None]:
        if self.num_examples == 0:
            raise UserError(
                "the training data must hold an example within `max-tokens` and the model's positions, but "
                f"of {len(self._examples):,} there is none. Raise `max-tokens`, or check the data."
            )
        planned: deque[_Update] = deque()
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
        """Return the batches and their weights, with a filler in the place of one that cannot be read.

        Raises:
            UnreadableExamplesError: It cannot be read, and no other rank waits.
            UserError: The same at the first update, for which there is no filler.
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
            iteration.close()  # it would keep the loader alive
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
        window = self._position.window
        return {
            "epoch": window.order.epoch,
            "window": window.number,
            "cuts": [[asdict(limits), num_consumed] for limits, num_consumed in self._position.cuts],
            "examples_consumed": self._position.examples_consumed,
            "seed": window.order.seed,
            "window_size": window.size,
            "dataset_size": len(self._examples),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Move to a saved position; it counts from the next iteration on.

        Raises:
            UserError: the position is inside an epoch over another number of examples.
        """
        cuts = tuple((BatchLimits.from_json(limits), num_consumed) for limits, num_consumed in state["cuts"])
        if state["window"] == 0 and not any(num_consumed for _, num_consumed in cuts):
            self._position = self._epoch_start(state["epoch"])
            return
        if state["dataset_size"] != len(self._examples):
            raise UserError(
                f"the training data must stay the same during an epoch, but epoch {state['epoch']} was begun "
                f"with {counted(state['dataset_size'], 'example')}, and now there are {len(self._examples):,}. "
                "Resume with the data directory that the run was started with."
            )
        window = Window(self._order(state["seed"], state["epoch"]), state["window"], state["window_size"])
        num_places = window.order.num_places
        if window.number >= num_windows(num_places, window.size) or state["examples_consumed"] > num_places:
            raise DamagedError(
                f"the place in the training data must lie within its {counted(len(self._examples), 'example')}, "
                "but does not. Restore the checkpoint, or begin a new run."
            )
        self._position = _Position(window, cuts, state["examples_consumed"])

    def _epoch_start(self, epoch: int) -> _Position:
        window = Window(self._order(self._seed, epoch), number=0, size=self._options.window_size)
        return _Position(window, ((self._limits, 0),), examples_consumed=0)

    def _order(self, seed: int, epoch: int) -> Order:
        """Return the order of an epoch: here alone it is decided what an epoch is."""
        return Permutation(len(self._examples), seed=seed, epoch=epoch)

    def _start_loading(self, plan: Iterator[PlannedBatch]) -> Iterator[Any]:
        """Return the collated batches of a plan, in its order."""
        if self._loader is None:
            self._loader = make_loader(
                self._examples, self._feed, num_workers=self._num_workers, pin_memory=self._pin_memory
            )
        # Workers live on from iteration to iteration, and so must their loader. It asks for the new plan.
        self._feed.plan = plan
        return read_batches(self._loader)

    def _plan_loading(self, planned: deque[_Update]) -> Iterator[PlannedBatch]:
        """Yield batch after batch, and note the updates that they make up in `planned`."""
        for update in self._plan_updates():
            planned.append(update)
            order = update.end.window.order
            for batch in update.batches:
                # An example comes once in an epoch, so the first one tells the batches apart. The number of the
                # batch would do for any order, but would seed augmentation otherwise than in runs begun so far.
                yield PlannedBatch(batch.tolist(), key=(order.seed, order.epoch, int(batch[0])))

    def _plan_updates(self) -> Iterator[_Update]:
        """Yield this rank's part of every update from the position to the end of the epoch."""
        group_size = self._world_size * self._options.update_freq
        group: list[Indices] = []
        end = self._position
        for batch, end in self._plan_batches(self._position):
            group.append(batch)
            if len(group) == group_size:
                yield self._deal(group, end)
                group = []
        if group:
            yield self._deal(group, end)

    def _deal(self, group: list[Indices], end: _Position) -> _Update:
        """Take this rank's share of the batches of an update, with fillers if other ranks get more."""
        shares = [
            [part for batch in group[rank :: self._world_size] for part in self._split(batch)]
            for rank in range(self._world_size)
        ]
        share = shares[self._rank]
        num_fillers = max(map(len, shares)) - len(share)
        weights = [1.0] * len(share) + [0.0] * num_fillers
        return _Update(share + shares[0][:1] * num_fillers, weights, end)

    def _split(self, batch: Indices) -> list[Indices]:
        """Cut a batch into equal parts that the device has memory for."""
        if self.split_above is None:
            return [batch]
        if self._limits.is_packed:
            limits = replace(self._limits, max_tokens=self.split_above)
            return [batch[part] for part in cut_by(self._examples.sizes[batch], limits)]
        most = max(1, self.split_above // int(longest(self._examples.sizes[batch]).max()))
        return np.array_split(batch, -(-len(batch) // most))

    def _plan_batches(self, position: _Position) -> Iterator[tuple[Indices, _Position]]:
        """Yield all ranks' batches from a position to the epoch's end, each with the position after it."""
        window, cuts, examples_consumed = position.window, position.cuts, position.examples_consumed
        if cuts[-1][0] != self._limits:
            cuts = (*cuts, (self._limits, 0))
        for number in range(window.number, num_windows(window.order.num_places, window.size)):
            window = replace(window, number=number)
            *earlier_cuts, (limits, num_consumed) = cuts
            for batch in plan_window(self._examples.sizes, cuts, window=window):
                num_consumed += 1
                examples_consumed += len(batch)
                end = (*earlier_cuts, (limits, num_consumed))
                yield batch, _Position(window, end, examples_consumed)
            cuts = ((self._limits, 0),)


class OrderedBatches:
    """This rank's batches of a validation: by length, each example exactly once over all ranks.

    Nothing is shuffled or left out: an example longer than `max_tokens` is a batch of its own. Ranks may get
    different numbers of batches, so nothing may be reduced over the ranks in between. Each iteration yields the
    same batches; worker processes live until `close()`.
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
        # Workers that have nothing to read would only be started.
        num_workers = min(_num_workers(options), len(self._plan))
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


def _num_workers(options: BatchingOptions) -> int:
    return 0 if options.num_workers == "auto" else options.num_workers
