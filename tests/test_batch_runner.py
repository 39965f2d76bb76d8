"""Batches in several threads: all results, the errors of each, and the threads of PyTorch as they were."""

import sys
import threading
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nmt.errors import UserError
from nmt.translation.batch_runner import Batching, BatchRunner


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=60),
    num_at_once=st.integers(1, 4),
    room=st.integers(30, 200),
)
def test_every_sentence_has_its_result_once_however_many_run_at_once_and_whatever_fits(
    lengths: list[int], num_at_once: int, room: int
) -> None:
    def run(batch: list[int], _: bool) -> list[int]:
        if len(batch) * max(lengths[i] for i in batch) > room:
            raise torch.OutOfMemoryError("no room")
        return [10 * i for i in batch]

    runner = BatchRunner(Batching(max_tokens=120), num_at_once=num_at_once)
    found = [
        pair
        for batch, results in runner.run(np.array(lengths)[:, None], run)
        for pair in zip(batch, results, strict=True)
    ]
    assert sorted(found) == [(i, 10 * i) for i in range(len(lengths))]


def test_batches_run_in_as_many_threads_of_one_core_each_as_there_are_cores() -> None:
    num_threads = torch.get_num_threads()
    together = threading.Barrier(3, timeout=20)  # broken, and so an error, unless three are in it at once

    def run(batch: list[int], _: bool) -> list[int]:
        together.wait()
        return [torch.get_num_threads()] * len(batch)

    runner = BatchRunner(Batching(max_tokens=10), num_at_once=3)
    found = [x for _, results in runner.run(np.full((6, 1), 10), run) for x in results]
    assert found == [1] * 6
    assert torch.get_num_threads() == num_threads


def test_an_error_in_a_thread_is_raised_where_the_results_are_read() -> None:
    def fail(batch: list[int], _: bool) -> list[int]:
        raise ValueError("this is no sentence")

    runner = BatchRunner(Batching(max_tokens=10), num_at_once=2)
    with pytest.raises(ValueError, match="this is no sentence"):
        list(runner.run(np.full((4, 1), 10), fail))


def test_no_room_for_one_sentence_is_said_with_its_length() -> None:
    def fail(batch: list[int], _: bool) -> list[int]:
        raise torch.OutOfMemoryError("no room")

    runner = BatchRunner(Batching(max_tokens=40), num_at_once=2)
    with pytest.raises(UserError, match="one of 9 pieces"):
        list(runner.run(np.full((8, 1), 9), fail))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=60),
    num_at_once=st.integers(1, 4),
    late=st.sets(st.integers(0, 59)),
    room=st.integers(30, 200),
)
def test_what_batches_give_up_is_run_at_the_end_where_nothing_is_given_up(
    lengths: list[int], num_at_once: int, late: set[int], room: int
) -> None:
    calls: list[tuple[list[int], bool]] = []

    def run(batch: list[int], may_drop: bool) -> list[int | None]:
        calls.append((batch, may_drop))
        if len(batch) * max(lengths[i] for i in batch) > room:
            raise torch.OutOfMemoryError("no room")
        return [None if may_drop and i in late else 10 * i for i in batch]

    runner = BatchRunner(Batching(max_tokens=120), num_at_once=num_at_once)
    found = [
        pair
        for batch, results in runner.run(np.array(lengths)[:, None], run)
        for pair in zip(batch, results, strict=True)
    ]
    assert sorted(found) == [(i, 10 * i) for i in range(len(lengths))]
    if len(calls) == 1:  # what would stragglers be joined with?
        assert not calls[0][1]


def test_sentences_that_were_given_up_are_shared_by_the_cores() -> None:
    def run(batch: list[int], may_drop: bool) -> list[int | None]:
        if not may_drop:
            last.append(sorted(batch))
            started.wait()  # broken, and so an error, unless two are in it at once
        return [None if may_drop and i % 10 == 0 else i for i in batch]

    last: list[list[int]] = []
    started = threading.Barrier(2, timeout=20)
    runner = BatchRunner(Batching(max_tokens=400, batch_size=40), num_at_once=2)
    found = [x for _, results in runner.run(np.full((80, 1), 10), run) for x in results]
    assert sorted(found) == list(range(80))
    assert sorted(i for batch in last for i in batch) == list(range(0, 80, 10))


def test_the_longest_few_are_run_with_what_was_given_up() -> None:
    """Forty sentences of 10 pieces make five batches; two are longer, and one of 10 is a straggler."""
    calls: list[tuple[list[int], bool]] = []

    def run(batch: list[int], may_drop: bool) -> list[int | None]:
        calls.append((sorted(batch), may_drop))
        return [None if may_drop and i == 39 else i for i in batch]

    runner = BatchRunner(Batching(max_tokens=100), num_at_once=1)
    found = [x for _, results in runner.run(np.array([10] * 40 + [20, 20])[:, None], run) for x in results]
    assert sorted(found) == list(range(42))
    assert [(len(batch), may_drop) for batch, may_drop in calls] == [(8, True)] * 5 + [(3, False)]
    assert calls[-1][0] == [39, 40, 41]


def test_the_longest_few_are_begun_while_there_is_work_for_another_core() -> None:
    others = threading.Event()

    def run(batch: list[int], may_drop: bool) -> list[int | None]:
        if 40 in batch:
            assert not may_drop
            assert others.wait(timeout=20), "nothing else ran beside the longest"
        elif not may_drop:
            others.set()
        return list(batch)

    runner = BatchRunner(Batching(max_tokens=100), num_at_once=2)
    found = [x for _, results in runner.run(np.array([10] * 40 + [20, 20])[:, None], run) for x in results]
    assert sorted(found) == list(range(42))


@pytest.mark.parametrize("fails", [False, True])
def test_threads_wait_briefly_for_the_lock_of_python_and_only_while_there_are_several(fails: bool) -> None:
    before = sys.getswitchinterval()

    def run(batch: list[int], may_drop: bool) -> list[float]:
        if fails:
            raise ValueError
        return [sys.getswitchinterval()] * len(batch)

    for num_at_once in (1, 2):
        runner = BatchRunner(Batching(batch_size=2), num_at_once=num_at_once)
        found: list[float] = []
        with pytest.raises(ValueError) if fails else nullcontext():
            found = [x for _, results in runner.run(np.full((4, 1), 10), run) for x in results]
        assert all((x < before / 10) == (num_at_once == 2) for x in found)
        assert len(found) == 4 or fails
        assert sys.getswitchinterval() == before
