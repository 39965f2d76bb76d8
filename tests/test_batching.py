"""Tests of the epoch's order and of cutting it into batches."""

import itertools
import math
import tracemalloc
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmt.data.batching import (
    Window,
    cut_batches,
    num_windows,
    plan_ordered,
    plan_window,
    window_examples,
)
from nmt.data.limits import BatchLimits, are_all_equal, survey, too_long
from nmt.data.options import BatchingOptions
from nmt.data.order import Permutation, keyed_permutation
from nmt.errors import UserError

keys = st.tuples(st.integers(0, 2**70), st.integers(0, 1000))


@st.composite
def size_arrays(draw, max_count=150, longest=12):
    columns = draw(st.integers(1, 3))
    rows = draw(st.lists(st.tuples(*[st.integers(1, longest)] * columns), max_size=max_count))
    return np.array(rows, dtype=np.int32).reshape(-1, columns)


def some_window(num_places, *, seed=1, epoch=1, number=0, size):
    return Window(Permutation(num_places, seed, epoch), number, size)


def cut_slowly(sizes, *, max_tokens, max_sentences, multiple):
    """The rule of `cut_batches`, example by example."""
    left = sorted(
        range(len(sizes)), key=lambda i: (sizes[i][0], sizes[i][-1] if sizes[i][0] % 2 else -sizes[i][-1])
    )
    batches = []
    while left:
        batch = []
        while left:
            longer = [*batch, left[0]]
            padded = len(longer) * max(max(sizes[i]) for i in longer)
            fits = (max_tokens is None or padded <= max_tokens) and (
                max_sentences is None or len(longer) <= max_sentences
            )
            if batch and not fits:
                break
            batch.append(left.pop(0))
        while left and len(batch) > multiple and len(batch) % multiple:
            left.insert(0, batch.pop())
        batches.append(batch)
    return batches


@settings(deadline=None)
@given(size=st.integers(1, 3000), key=keys)
def test_keyed_permutation_is_a_bijection_for_any_size_and_key(size, key):
    images = keyed_permutation(np.arange(size), size=size, key=key)
    assert np.array_equal(np.sort(images), np.arange(size))


@settings(deadline=None)
@given(size=st.integers(1, 2**30), key=keys, data=st.data())
def test_keyed_permutation_can_be_evaluated_anywhere(size, key, data):
    indices = np.array(
        data.draw(st.lists(st.integers(0, size - 1), max_size=20, unique=True)), dtype=np.int64
    )
    images = keyed_permutation(indices, size=size, key=key)
    assert len(np.unique(images)) == len(indices)
    assert ((images >= 0) & (images < size)).all()
    one_by_one = [keyed_permutation(indices[i : i + 1], size=size, key=key)[0] for i in range(len(indices))]
    assert images.tolist() == one_by_one


def test_keyed_permutation_of_nothing_is_empty():
    assert keyed_permutation(np.arange(0), size=0, key=(1,)).tolist() == []


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_all_permutations_of_few_elements_are_equally_frequent(size):
    counts = dict.fromkeys(itertools.permutations(range(size)), 0)
    num_keys = 60 * len(counts)
    for key in range(num_keys):
        counts[tuple(keyed_permutation(np.arange(size), size=size, key=(5, key)).tolist())] += 1
    chi_square = sum((count - 60) ** 2 / 60 for count in counts.values())
    degrees = len(counts) - 1
    assert chi_square < degrees + 5 * math.sqrt(2 * degrees)


def test_neighbours_are_scattered_over_a_large_range():
    size = 1_000_003
    images = keyed_permutation(np.arange(size), size=size, key=(1, 1))
    # Of a random permutation: serial correlation 0 +- 1/sqrt(n); displacement n/3 on average.
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 5 / math.sqrt(size)
    assert abs(np.abs(images - np.arange(size)).mean() / size - 1 / 3) < 0.002
    steps = np.bincount((images[1:] - images[:-1]) % size * 100 // size, minlength=100)
    assert ((steps - size / 100) ** 2 / (size / 100)).sum() < 99 + 5 * math.sqrt(2 * 99)
    other = keyed_permutation(np.arange(size), size=size, key=(1, 2))
    assert (images == other).sum() < 20  # 1 expected


@settings(deadline=None)
@given(
    sizes=size_arrays(),
    max_tokens=st.none() | st.integers(12, 200),
    max_sentences=st.none() | st.integers(1, 30),
    multiple=st.integers(1, 9),
)
def test_cut_batches_equals_the_slow_reference(sizes, max_tokens, max_sentences, multiple):
    limits = {"max_tokens": max_tokens, "max_sentences": max_sentences, "multiple": multiple}
    batches = [batch.tolist() for batch in cut_batches(sizes, **limits)]
    assert batches == cut_slowly(sizes.tolist(), **limits)


@pytest.mark.parametrize("longest", [2**15 - 1, 2**15, 2**31 - 1])
def test_sorting_by_length_is_right_for_the_longest_examples(longest):
    """In fewer bits they would be negative."""
    rows = [(longest, 1), (1, longest), (longest, longest), (longest - 1, 3), (longest - 1, longest), (1, 5)]
    sizes = np.array(rows * 2, dtype=np.int32)
    by_length = [batch.tolist() for batch in cut_batches(sizes, max_tokens=None, max_sentences=1)]
    assert by_length == cut_slowly(sizes.tolist(), max_tokens=None, max_sentences=1, multiple=8)


@settings(deadline=None)
@given(sizes=size_arrays(), max_tokens=st.integers(12, 200), multiple=st.integers(1, 9))
def test_batches_hold_each_example_once_within_max_tokens_in_multiples(sizes, max_tokens, multiple):
    batches = cut_batches(sizes, max_tokens=max_tokens, multiple=multiple)
    assert sorted(itertools.chain.from_iterable(batches)) == list(range(len(sizes)))
    assert all(len(batch) * sizes[batch].max() <= max_tokens for batch in batches)
    assert all(len(batch) < multiple or len(batch) % multiple == 0 for batch in batches[:-1])


@given(count=st.integers(0, 60), most=st.integers(1, 8), least=st.integers(1, 4))
def test_a_last_batch_of_too_few_goes_with_the_one_before_it(count, most, least):
    sizes = np.ones((count, 1), dtype=np.int32)
    batches = cut_batches(sizes, max_tokens=None, max_sentences=most, multiple=1, least=least)
    expected = [min(most, count - start) for start in range(0, count, most)]
    if len(expected) > 1 and expected[-1] < least <= most:
        expected[-2:] = [sum(expected[-2:])]
    assert list(map(len, batches)) == expected
    assert np.concatenate([[], *batches]).tolist() == list(range(count))


def test_one_that_is_left_of_an_epoch_makes_no_batch_where_two_must():
    """As where the limits have changed within it."""
    sizes, window = np.ones((9, 1), dtype=np.int32), some_window(9, size=100)
    four, three = BatchLimits(None, 4, 1, least=2), BatchLimits(None, 3, 1, least=2)
    assert sorted(map(len, plan_window(sizes, [(four, 0)], window=window))) == [4, 5]
    left = plan_window(sizes, [(BatchLimits(None, 8, 1), 1), (three, 0)], window=window)
    assert list(map(len, left)) == []  # 8 + 1
    assert list(map(len, plan_window(sizes[:1], [(four, 0)], window=some_window(1, size=100)))) == [
        1
    ]  # there is nothing else


def test_cut_batches_puts_an_overlong_example_into_a_batch_of_its_own():
    sizes = np.array([[3, 3], [9, 2], [2, 3]])
    batches = cut_batches(sizes, max_tokens=6, multiple=1)
    assert [batch.tolist() for batch in batches] == [[2, 0], [1]]


@settings(deadline=None)
@given(
    sizes=size_arrays(),
    window_size=st.integers(1, 60),
    max_tokens=st.integers(5, 100),
)
def test_windows_hold_every_example_that_fits_exactly_once(sizes, window_size, max_tokens):
    limits = BatchLimits(max_tokens)
    planned = []
    for number in range(num_windows(len(sizes), window_size)):
        window = some_window(len(sizes), number=number, size=window_size)
        batches = plan_window(sizes, [(limits, 0)], window=window)
        assert all(len(batch) * sizes[batch].max() <= max_tokens for batch in batches)
        planned += [int(i) for batch in batches for i in batch]
        assert set(planned[-sum(map(len, batches)) :] if batches else []) <= set(
            window_examples(window).tolist()
        )
    fitting = np.flatnonzero(~too_long(sizes, limits))
    assert sorted(planned) == fitting.tolist()
    found = survey(sizes, limits, block=7)
    assert found.num_too_long == len(sizes) - len(fitting)
    assert found.longest == sizes[fitting].max(initial=0)
    assert found.sums == sizes[fitting].sum(axis=0).tolist()


def test_examples_and_batches_are_in_another_order_in_each_epoch_and_window():
    sizes = np.ones((200, 1), dtype=np.int32)  # all equal, so that sorting leaves the order of the epoch
    example_orders, batch_orders = set(), set()
    for seed, epoch, number in itertools.product((1, 2), (1, 2), (0, 1)):
        window = some_window(200, seed=seed, epoch=epoch, number=number, size=100)
        examples = window_examples(window).tolist()
        batches = plan_window(sizes, [(BatchLimits(5, multiple=1), 0)], window=window)
        example_orders.add(tuple(examples))
        batch_orders.add(tuple(examples.index(batch[0]) for batch in batches))
    assert len(example_orders) == len(batch_orders) == 8


@dataclass(frozen=True)
class Given:
    """An order that stands in a list."""

    examples: tuple[int, ...]
    seed: int = 1
    epoch: int = 1

    @property
    def num_places(self):
        return len(self.examples)

    def examples_at(self, places):
        return np.array(self.examples, dtype=np.int64)[places]


@settings(deadline=None)
@given(sizes=size_arrays(max_count=20), window_size=st.integers(1, 30), data=st.data())
def test_an_order_may_bring_an_example_several_times_or_not_at_all(sizes, window_size, data):
    """Each of its places comes once, also where a window is cut anew after some batches."""
    places = st.lists(st.integers(0, len(sizes) - 1), max_size=60) if len(sizes) else st.just([])
    order = Given(tuple(data.draw(places)))
    first, second = BatchLimits(15, multiple=1), BatchLimits(24, multiple=1)
    planned = []
    for number in range(num_windows(order.num_places, window_size)):
        window = Window(order, number, window_size)
        batches = plan_window(sizes, [(first, 0)], window=window)
        num_consumed = data.draw(st.integers(0, len(batches)))
        rest = plan_window(sizes, [(first, num_consumed), (second, 0)], window=window)
        planned += [int(i) for batch in batches[:num_consumed] + rest for i in batch]
    assert sorted(planned) == sorted(order.examples)


class Computed:
    """The lengths of very many examples, computed where they are asked for."""

    shape = (10**12, 2)

    def __init__(self):
        self.num_read = 0

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, places):
        assert isinstance(places, np.ndarray), "a whole range would be read"
        self.num_read += len(places)
        return np.stack([1 + places % 40, 1 + places % 37], axis=1).astype(np.int32)


def test_a_window_reads_the_lengths_of_its_own_examples_alone():
    sizes = Computed()
    window = some_window(len(sizes), number=9, size=1000)
    batches = plan_window(sizes, [(BatchLimits(200), 3), (BatchLimits(100), 0)], window=window)
    assert sizes.num_read == 1000 + sum(
        map(len, batches)
    )  # for the second cut, those that the first has left


@given(sizes=size_arrays(longest=2))
def test_lengths_are_compared_with_those_of_the_first(sizes):
    assert are_all_equal(sizes) == (len({tuple(row) for row in sizes.tolist()}) <= 1)


def test_short_and_long_batches_are_mixed():
    sizes = np.repeat(np.arange(1, 41, dtype=np.int32), 50)[:, None]
    batches = plan_window(sizes, [(BatchLimits(200), 0)], window=some_window(2000, size=2000))
    lengths = np.array([sizes[batch].max() for batch in batches])
    # Of a random order: serial correlation 0 +- 1/sqrt(number of batches).
    assert abs(np.corrcoef(lengths[:-1], lengths[1:])[0, 1]) < 4 / math.sqrt(len(lengths))


@settings(deadline=None)
@given(sizes=size_arrays(), world_size=st.integers(1, 4), max_tokens=st.integers(5, 50))
def test_ordered_plans_share_all_examples_among_the_ranks(sizes, world_size, max_tokens):
    limits = BatchLimits(max_tokens)
    plans = [plan_ordered(sizes, limits, rank=rank, world_size=world_size) for rank in range(world_size)]
    planned = [int(i) for plan in plans for batch in plan for i in batch]
    assert sorted(planned) == list(range(len(sizes)))
    for plan in plans:
        lengths = [int(sizes[batch, 0].max()) for batch in plan]
        assert lengths == sorted(lengths)


def test_planning_takes_memory_by_the_window_and_not_by_the_data_set():
    sizes = np.broadcast_to(np.array([[20, 25]], dtype=np.int32), (50_000_000, 2))  # takes 8 bytes
    window = some_window(len(sizes), number=30, size=2**16)
    tracemalloc.start()
    try:
        batches = plan_window(sizes, [(BatchLimits(4096), 0)], window=window)
        assert survey(sizes[:5_000_000], BatchLimits(4096)) == (0, 25, [100_000_000, 125_000_000])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(map(len, batches)) == 2**16
    assert peak < 30e6


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (BatchingOptions(max_tokens=None), "batch-size"),
        (BatchingOptions(max_tokens=0), "max-tokens"),
        (BatchingOptions(batch_size=0), "batch-size"),
        (BatchingOptions(update_freq=0), "update-freq"),
        (BatchingOptions(required_batch_size_multiple=0), "required-batch-size-multiple"),
        (BatchingOptions(num_workers=-1), "num-workers"),
        (BatchingOptions(window_size=0), "window-size"),
    ],
)
def test_options_out_of_range_are_named(options, name):
    with pytest.raises(UserError, match=f"`{name}`"):
        options.check()
