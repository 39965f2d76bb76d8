"""Tests of epochs of batches: dealt to ranks, interrupted, resumed, read by worker processes."""

import json
import multiprocessing
import os
import random
import signal
import tracemalloc
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nmt.data.batch_iterator import BatchIterator
from nmt.data.batching import Window, window_examples
from nmt.data.options import BatchingOptions
from nmt.data.order import Permutation
from nmt.data.ordered_batches import OrderedBatches
from nmt.data.packing import packed_limits
from nmt.data.parallel_dataset import ParallelDataset
from nmt.errors import UnreadableExamplesError, UserError

# This machine may have fewer cores than the tests have workers.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

OPTIONS = BatchingOptions(max_tokens=60, required_batch_size_multiple=2, window_size=40)


class Lengths:
    """Examples of given lengths; an item is its index, a batch the tuple of its items."""

    def __init__(self, sizes):
        self.sizes = sizes

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        return index

    def collate(self, items):
        return tuple(items)


def some_lengths(count, *, seed=0, longest=12):
    return Lengths(np.random.default_rng(seed).integers(1, longest + 1, (count, 2), dtype=np.int32))


def through_json(state):
    return json.loads(json.dumps(state))


def run_ranks(examples, options, *, world_size, state=None, updates=None, seed=1):
    """Run all ranks of a job side by side for some updates, or to the end of the epoch.

    Returns:
        the micro-batches of every update, of all ranks in a row, and the saved state.
    """
    ranks = [
        BatchIterator(examples, options, seed=seed, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    if state is not None:
        for rank in ranks:
            rank.load_state_dict(through_json(state))
    done = []
    if updates != 0:
        for number, parts in enumerate(zip(*ranks, strict=True), 1):
            assert len({len(part) for part in parts}) == 1, "ranks must run the same number of micro-batches"
            done.append([micro_batch for part in parts for micro_batch in part])
            if number == updates:
                break
    states = [rank.state_dict() for rank in ranks]
    assert all(state == states[0] for state in states)
    return done, states[0]


def real_batches(updates):
    return [micro_batch.batch for update in updates for micro_batch in update if micro_batch.weight]


def indices(updates):
    return [index for batch in real_batches(updates) for index in batch]


@settings(deadline=None)
@given(
    count=st.integers(1, 120),
    world_size=st.integers(1, 4),
    update_freq=st.integers(1, 3),
    window_size=st.integers(1, 150),
)
def test_every_example_comes_once_per_epoch_over_all_ranks(count, world_size, update_freq, window_size):
    options = replace(OPTIONS, update_freq=update_freq, window_size=window_size)
    updates, state = run_ranks(some_lengths(count), options, world_size=world_size)
    assert sorted(indices(updates)) == list(range(count))
    assert state["epoch"] == 2
    for update in updates[:-1]:
        assert [micro_batch.weight for micro_batch in update] == [1.0] * (world_size * update_freq)
    fillers = [micro_batch for micro_batch in updates[-1] if not micro_batch.weight]
    assert len(fillers) < world_size
    assert all(filler.batch in real_batches(updates[-1:]) for filler in fillers)


@settings(deadline=None)
@given(world_size=st.integers(2, 5), update_freq=st.integers(1, 3))
def test_all_ranks_together_see_the_sequence_that_one_rank_sees(world_size, update_freq):
    examples = some_lengths(150)
    alone, _ = run_ranks(examples, OPTIONS, world_size=1)
    options = replace(OPTIONS, update_freq=update_freq)
    together, _ = run_ranks(examples, options, world_size=world_size)
    dealt = []
    for update in together:
        per_rank = len(update) // world_size
        # from rank after rank to batch after batch
        dealt += [[update[rank * per_rank + i] for rank in range(world_size)] for i in range(per_rank)]
    assert real_batches(dealt) == real_batches(alone)


def test_epochs_and_seeds_differ_and_repeat():
    examples = some_lengths(100)
    first, state = run_ranks(examples, OPTIONS, world_size=1)
    second, _ = run_ranks(examples, OPTIONS, world_size=1, state=state)
    other_seed, _ = run_ranks(examples, OPTIONS, world_size=1, seed=2)
    again, _ = run_ranks(examples, OPTIONS, world_size=1)
    assert first == again
    assert len({str(updates) for updates in (first, second, other_seed)}) == 3
    assert sorted(indices(second)) == list(range(100))


def test_one_iterator_goes_from_epoch_to_epoch():
    batches = BatchIterator(some_lengths(100), OPTIONS, seed=1)
    epochs = []
    for epoch in (1, 2, 3):
        assert batches.epoch == epoch
        assert batches.examples_consumed == 0
        epochs.append(sorted(indices(batches)))
    assert epochs == [list(range(100))] * 3


def test_resuming_at_any_update_equals_no_interruption():
    examples = some_lengths(130)
    options = replace(OPTIONS, update_freq=2)
    uninterrupted, end = run_ranks(examples, options, world_size=2)
    for stop in range(len(uninterrupted) + 1):
        before, state = run_ranks(examples, options, world_size=2, updates=stop)
        after, resumed_end = run_ranks(examples, options, world_size=2, state=state)
        assert before + after == uninterrupted
        assert resumed_end == end


def test_a_position_of_an_older_release_is_taken():
    """They wrote `max_positions`, which was never set, and not all that there is now."""
    examples = some_lengths(130)
    uninterrupted, _ = run_ranks(examples, OPTIONS, world_size=1)
    before, state = run_ranks(examples, OPTIONS, world_size=1, updates=4)
    (limits, num_consumed) = state["cuts"][-1]
    old = {name: limits[name] for name in ("max_tokens", "max_sentences", "multiple")}
    old_state = state | {"cuts": [[old | {"max_positions": None}, num_consumed]]}
    after, _ = run_ranks(examples, OPTIONS, world_size=1, state=old_state)
    assert before + after == uninterrupted


def test_a_run_stopped_after_the_last_update_still_ends_that_epoch():
    examples = some_lengths(50)
    updates, _ = run_ranks(examples, OPTIONS, world_size=1)
    _, state = run_ranks(examples, OPTIONS, world_size=1, updates=len(updates))
    assert state["epoch"] == 1
    rest, state = run_ranks(examples, OPTIONS, world_size=1, state=state)
    assert (rest, state["epoch"]) == ([], 2)


job_legs = st.lists(
    st.tuples(
        st.fixed_dictionaries(
            {
                "max_tokens": st.none() | st.integers(12, 100),
                "batch_size": st.integers(1, 12),
                "required_batch_size_multiple": st.integers(1, 8),
                "update_freq": st.integers(1, 2),
                "window_size": st.integers(20, 200),
            }
        ),
        st.integers(1, 3),  # ranks
        st.integers(0, 6),  # updates
        st.integers(1, 3),  # seed
    ),
    max_size=6,
)


@settings(deadline=None)
@given(count=st.integers(1, 150), legs=job_legs)
def test_every_example_comes_once_per_epoch_however_often_options_and_ranks_change(count, legs):
    examples = some_lengths(count)
    state, done = None, []
    for changes, world_size, num_updates, seed in [*legs, ({}, 2, None, 1)]:
        options = replace(OPTIONS, **changes)
        updates, state = run_ranks(
            examples, options, world_size=world_size, state=state, updates=num_updates, seed=seed
        )
        if state["epoch"] == 2 and num_updates is not None:
            return  # the epoch ended early; other tests look at that
        done += indices(updates)
        for batch in real_batches(updates):
            assert len(batch) <= (options.batch_size or count)
            assert len(batch) * examples.sizes[list(batch)].max() <= (options.max_tokens or np.inf)
        assert num_updates is None or state["examples_consumed"] == len(done)
    assert sorted(done) == list(range(count))


@pytest.mark.parametrize(("batch_size", "lengths"), [(1, [1] * 9), (2, [2, 2, 2, 3]), (4, [4, 5]), (8, [9])])
def test_the_last_batch_has_at_least_as_many_as_it_must_where_that_can_be(batch_size, lengths):
    examples = Lengths(np.ones((9, 1), dtype=np.int32))
    options = BatchingOptions(None, batch_size=batch_size, required_batch_size_multiple=1, min_batch_size=2)
    iterator = BatchIterator(examples, options, seed=1)
    batches = [batch.indices for (batch,) in iterator]
    assert sorted(map(len, batches)) == lengths and sorted(n for batch in batches for n in batch) == list(
        range(9)
    )


def test_only_another_cut_changes_the_sequence_of_a_resumed_run():
    examples = some_lengths(130)
    uninterrupted, _ = run_ranks(examples, OPTIONS, world_size=1)
    before, state = run_ranks(examples, OPTIONS, world_size=1, updates=3)
    other_ranks, _ = run_ranks(examples, replace(OPTIONS, update_freq=3), world_size=1, state=state)
    assert real_batches(before + other_ranks) == real_batches(uninterrupted)
    other_cut, _ = run_ranks(examples, replace(OPTIONS, max_tokens=40), world_size=1, state=state)
    assert sorted(indices(before + other_cut)) == list(range(130))
    assert real_batches(before + other_cut) != real_batches(uninterrupted)


def test_another_seed_and_window_size_count_from_the_next_epoch():
    examples = some_lengths(130)
    uninterrupted, _ = run_ranks(examples, OPTIONS, world_size=1)
    before, state = run_ranks(examples, OPTIONS, world_size=1, updates=3)
    options = replace(OPTIONS, window_size=55)
    after, state = run_ranks(examples, options, world_size=1, state=state, seed=7)
    assert before + after == uninterrupted
    assert (state["seed"], state["window_size"]) == (7, 55)


def test_examples_that_are_too_long_are_left_out_and_counted_until_the_limit_is_raised():
    examples = Lengths(np.array([[3, 3], [3, 30], [3, 3], [70, 3], [3, 3], [8, 8]], dtype=np.int32))
    batches = BatchIterator(examples, replace(OPTIONS, max_tokens=29), seed=1)
    assert (batches.num_too_long, batches.num_examples) == (2, 4)
    assert sorted(indices(batches)) == [0, 2, 4, 5]
    _, state = run_ranks(examples, replace(OPTIONS, max_tokens=29), world_size=1, updates=1)
    consumed = state["examples_consumed"]
    rest, _ = run_ranks(examples, replace(OPTIONS, max_tokens=70), world_size=1, state=state)
    assert len(indices(rest)) == 6 - consumed


def test_data_without_a_fitting_example_are_refused():
    for examples in (Lengths(np.full((3, 2), 100, dtype=np.int32)), some_lengths(0)):
        with pytest.raises(UserError, match="max-tokens"):
            next(iter(BatchIterator(examples, OPTIONS, seed=1)))


def test_other_data_are_refused_within_an_epoch_and_taken_between_epochs():
    _, inside = run_ranks(some_lengths(130), OPTIONS, world_size=1, updates=2)
    with pytest.raises(UserError, match="130 examples, and now there are 131"):
        run_ranks(some_lengths(131), OPTIONS, world_size=1, state=inside)
    _, between = run_ranks(some_lengths(130), OPTIONS, world_size=1)
    updates, _ = run_ranks(some_lengths(131), OPTIONS, world_size=1, state=between)
    assert sorted(indices(updates)) == list(range(131))


def test_a_negative_seed_is_refused():
    with pytest.raises(UserError, match="`seed`"):
        BatchIterator(some_lengths(3), OPTIONS, seed=-1)


def test_the_end_of_an_older_iteration_by_a_newer_one_is_not_silent():
    batches = BatchIterator(some_lengths(100), OPTIONS, seed=1)
    older = iter(batches)
    next(older)
    next(iter(batches))
    with pytest.raises(AssertionError, match="newer iteration"):
        next(older)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_worker_processes_change_neither_batches_nor_position(num_workers):
    examples = some_lengths(150)
    plain = BatchIterator(examples, OPTIONS, seed=1)
    expected = [list(plain) for _ in range(2)]
    with BatchIterator(examples, OPTIONS, seed=1, num_workers=num_workers) as batches:
        first_updates = []
        for update in batches:
            first_updates.append(update)
            if len(first_updates) == 3:
                break
        workers = set(multiprocessing.active_children())
        assert len(workers) == num_workers
        _, state = run_ranks(examples, OPTIONS, world_size=1, updates=3)
        assert batches.state_dict() == state, "what has been read ahead does not count"
        assert first_updates + list(batches) == expected[0]
        assert list(batches) == expected[1]
        assert set(multiprocessing.active_children()) == workers, "workers live on"
    assert not multiprocessing.active_children()


def test_closing_in_the_middle_ends_the_workers_and_a_later_iteration_goes_on():
    examples = some_lengths(150)
    expected = list(BatchIterator(examples, OPTIONS, seed=1))
    batches = BatchIterator(examples, replace(OPTIONS, num_workers=2), seed=1)
    iteration = iter(batches)
    first = next(iteration)
    batches.close()
    batches.close()
    assert not multiprocessing.active_children()
    assert [first, *batches] == expected
    batches.close()
    assert not multiprocessing.active_children()


def test_iterating_leaves_the_global_random_generator_alone():
    torch = pytest.importorskip("torch")
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    list(BatchIterator(some_lengths(30), OPTIONS, seed=1))
    assert torch.equal(torch.rand(3), expected)


class Repeated:
    """A side of very many equal sentences, which takes next to no memory."""

    def __init__(self, count, size):
        self.sizes = np.broadcast_to(np.array([size], dtype=np.int32), (count,))  # takes 4 bytes

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        return np.full(self.sizes[index], 7)


def many_pairs(count, positions=None):
    return ParallelDataset(Repeated(count, 20), Repeated(count, 25), positions=positions)


def test_memory_and_a_seek_cost_a_window_and_not_the_data_set():
    options = replace(OPTIONS, max_tokens=4096, window_size=2**15)
    next(iter(BatchIterator(many_pairs(100), options, seed=1)))  # what PyTorch loads the first time
    examples, cut = many_pairs(20_000_000), many_pairs(20_000_000, positions=(30, 24))
    tracemalloc.start()
    try:
        assert examples.longest == (20, 25) and cut.num_cut == 20_000_000
        assert packed_limits(options, examples.sizes).max_sentences == 1.25 * 4096 // 25 + 8
        batches = BatchIterator(examples, options, seed=1)
        assert batches.num_examples == 20_000_000 and batches.updates_per_epoch > 100_000
        next(iter(batches))
        state = batches.state_dict() | {"window": 500}
        batches.load_state_dict(state)
        next(iter(batches))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert batches.state_dict()["window"] == 500
    assert peak < 40e6  # bytes; a number per example would be 160e6


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ordered_batches_hold_every_example_once_over_all_ranks(world_size):
    sizes = np.array([[100, 100], *some_lengths(77).sizes.tolist()], dtype=np.int32)  # one is too long
    seen = Counter()
    for rank in range(world_size):
        longest = 0
        for batch in OrderedBatches(Lengths(sizes), OPTIONS, rank=rank, world_size=world_size):
            seen.update(batch)
            assert sizes[list(batch), 0].min() >= longest
            longest = sizes[list(batch), 0].max()
    assert seen == Counter(range(78))


def test_ordered_batches_can_be_read_by_workers():
    examples = some_lengths(77)
    in_this_process = OrderedBatches(examples, OPTIONS)
    by_workers = OrderedBatches(examples, replace(OPTIONS, num_workers=2))
    for _ in range(2):  # each validation begins anew
        assert list(by_workers) == list(in_this_process)
    assert multiprocessing.active_children()
    by_workers.close()
    assert not multiprocessing.active_children()
    assert not multiprocessing.active_children()


class Noisy(Lengths):
    """Examples that draw from all three global generators."""

    def __getitem__(self, index):
        return index, torch.rand(()).item(), np.random.random(), random.random()


class KilledWhileReading(Lengths):
    """Examples of which one ends the process that reads it, as a system without memory does."""

    def __getitem__(self, index):
        if index == 17:
            os.kill(os.getpid(), signal.SIGKILL)
        return index


def test_a_worker_that_is_killed_is_a_refusal_and_the_position_stays_before_it():
    examples = KilledWhileReading(some_lengths(60).sizes)
    seen = []
    with BatchIterator(examples, replace(OPTIONS, num_workers=1, update_freq=2), seed=1) as batches:
        with pytest.raises(UnreadableExamplesError, match="one has ended"):
            for update in batches:
                seen += [batch.indices for batch in update]
        assert all(17 not in indices for indices in seen)
        state = batches.state_dict()
    with BatchIterator(some_lengths(60), replace(OPTIONS, update_freq=2), seed=1) as resumed:
        resumed.load_state_dict(through_json(state))
        rest = [index for update in resumed for batch in update for index in batch.indices]
    assert sorted(rest + [index for indices in seen for index in indices]) == list(range(60))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_random_examples_depend_on_neither_workers_nor_interruption(num_workers):
    examples = Noisy(some_lengths(40).sizes)

    def epoch(iterator):
        return [micro_batch.batch for update in iterator for micro_batch in update]

    with BatchIterator(examples, OPTIONS, seed=3) as alone:
        whole, second = epoch(alone), epoch(alone)
    with BatchIterator(examples, OPTIONS, seed=3, num_workers=num_workers) as iterator:
        start = [
            micro_batch.batch for _, update in zip(range(2), iterator, strict=False) for micro_batch in update
        ]
        state = iterator.state_dict()
    torch.manual_seed(99)
    with BatchIterator(examples, OPTIONS, seed=3, num_workers=num_workers) as resumed:
        resumed.load_state_dict(through_json(state))
        assert start + epoch(resumed) == whole
    # Another epoch draws other numbers for the same example.
    assert {item for batch in whole for item in batch}.isdisjoint(item for batch in second for item in batch)


def test_reading_leaves_the_global_generators_alone():
    torch.manual_seed(1)
    np.random.seed(2)
    random.seed(3)
    before = [torch.rand(()).item(), np.random.random(), random.random()]
    torch.manual_seed(1)
    np.random.seed(2)
    random.seed(3)
    for _ in BatchIterator(Noisy(some_lengths(20).sizes), OPTIONS, seed=3):
        pass
    assert [torch.rand(()).item(), np.random.random(), random.random()] == before


def test_micro_batches_name_their_examples():
    for update in BatchIterator(some_lengths(40), OPTIONS, seed=3):
        for micro_batch in update:
            assert tuple(micro_batch.indices) == micro_batch.batch


def test_the_updates_of_an_epoch_are_counted_beforehand():
    examples = some_lengths(200)
    for options in (OPTIONS, replace(OPTIONS, update_freq=3), replace(OPTIONS, window_size=1000)):
        iterator = BatchIterator(examples, options, seed=3, world_size=2)
        num_updates = sum(1 for _ in iterator)
        # Of five windows of the same size the first is a good estimate; of one it is the truth.
        tolerance = 0 if options.window_size >= 200 else 2
        assert abs(iterator.updates_per_epoch - num_updates) <= tolerance


def test_what_batches_will_be_like_is_told_by_the_first_window_that_has_any():
    """The first window of the epoch may hold nothing but examples that are left out."""
    size = OPTIONS.window_size
    examples = some_lengths(3 * size)
    windows = [
        window_examples(Window(Permutation(len(examples), seed=1, epoch=1), number, size))
        for number in range(3)
    ]
    too_long = OPTIONS.max_tokens + 1
    examples.sizes[windows[0]] = too_long
    batches = BatchIterator(examples, OPTIONS, seed=1).first_batches
    assert sorted(np.concatenate(batches)) == sorted(windows[1])
    examples.sizes[:] = too_long
    assert BatchIterator(examples, OPTIONS, seed=1).first_batches == []
