"""An engine that several threads use at once: what each gets, who shares batches, and the process afterwards."""

import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_translation_model import MAX_POSITIONS, WORDS, write_tiny_model

from nmt.data.batching import cut_batches
from nmt.errors import UserError
from nmt.generation.beam_search import Hypothesis
from nmt.generation.generator import Generator
from nmt.generation.options import DecodingOptions
from nmt.system.core_threads import num_cores, one_core
from nmt.translation.batch_queue import BatchQueue, Job, Limits, Ticket
from nmt.translation.batch_runner import Batching, BatchRunner
from nmt.translation.engine import Engine
from nmt.translation.request import Request
from nmt.translation.translator import Translator

SECONDS = 60  # until a test that waits in vain gives up


def lines_of(seed: int, count: int) -> list[str]:
    random = Random(seed)
    return [" ".join(random.choices(WORDS, k=random.randint(0, 9))) for _ in range(count)]


@pytest.fixture(scope="module")
def exact(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Translator:
    """In float64, where neighbours change no translation, ties included."""
    loaded = Translator.load(write_tiny_model(tmp_path_factory.mktemp("exact") / "model"))
    return Translator([model.double() for model in loaded.models], loaded.task, device="cpu")


@pytest.fixture
def two_cores() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def threads_of_a_new_thread() -> int:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


# One caller ------------------------------------------------------------------------------------------------


def batches_in_turn(lengths: list[int], late: set[int], most: int) -> list[tuple[list[int], bool]]:
    """Return which batches one core runs, and whether each may give something up: plainly, one after the other.

    The longest come first. Those that are few and long, and what was given up, are run together at the end.
    """
    column = np.array(lengths)[:, None]

    def cut(places: list[int]) -> list[list[int]]:
        batches = cut_batches(column[places], max_tokens=most)
        ordered = sorted(batches, key=lambda x: -max(lengths[places[i]] for i in x))
        return [[places[i] for i in x] for x in ordered]

    waiting = deque(cut(list(range(len(lengths)))))
    may_drop, at_end, run = len(waiting) > 1, [], []
    if may_drop:
        first, second = (len(x) * max(lengths[i] for i in x) for x in list(waiting)[:2])
        if 2 * first <= second:
            at_end = waiting.popleft()
    while waiting:
        batch = waiting.popleft()
        run.append((sorted(batch), may_drop))
        at_end += [i for i in batch if may_drop and i in late]
    return run + [(sorted(batch), False) for batch in cut(at_end)] if at_end else run


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=60),
    late=st.sets(st.integers(0, 59)),
    most=st.integers(20, 200),
)
def test_one_caller_has_the_batches_that_one_core_runs_in_turn(
    lengths: list[int], late: set[int], most: int
) -> None:
    found: list[tuple[list[int], bool]] = []

    def run(batch: list[int], may_drop: bool) -> list[int | None]:
        found.append((sorted(batch), may_drop))
        return [None if may_drop and i in late else i for i in batch]

    list(BatchRunner(Batching(max_tokens=most)).run(np.array(lengths)[:, None], run))
    assert found == batches_in_turn(lengths, late, most)


def test_a_translator_runs_a_buffer_in_the_batches_of_its_lengths(
    translator: Translator, monkeypatch: pytest.MonkeyPatch, two_cores: None
) -> None:
    shapes: list[tuple[int, ...]] = []
    generate = Generator.generate

    def note(generator: Generator, source: torch.Tensor, *args: Any, **options: Any) -> Any:
        shapes.append(tuple(source.shape))
        return generate(generator, source, *args, **{**options, "may_drop_stragglers": False})

    monkeypatch.setattr(Generator, "generate", note)
    lines = [line for line in lines_of(1, 90) if line]
    translator.translate(lines, beam=2)
    assert len(shapes) == 1  # all fit into one batch
    shapes.clear()
    list(translator.translate_lines(lines, DecodingOptions(beam=2), batching=Batching(max_tokens=90)))
    lengths = [len(ids) + 1 for ids in translator.source_segmenter.encode(lines)]
    expected = batches_in_turn(lengths, set(), 90)
    assert sorted(shapes) == sorted((len(x), max(lengths[i] for i in x)) for x, _ in expected)


def test_what_is_alone_is_run_by_the_thread_that_waits_and_by_all_cores(two_cores: None) -> None:
    def run(batch: list[int], _: bool) -> list[tuple[str, int]]:
        return [(threading.current_thread().name, torch.get_num_threads())] * len(batch)

    for num_at_once in (1, 4):
        runner = BatchRunner(Batching(max_tokens=100), num_at_once=num_at_once)
        found = [x for _, results in runner.run(np.full((4, 1), 10), run) for x in results]
        assert found == [(threading.current_thread().name, 2)] * 4


# Several callers -------------------------------------------------------------------------------------------

OPTIONS = [
    DecodingOptions(beam=1),
    DecodingOptions(beam=3, nbest=2),
    DecodingOptions(beam=3, nbest=2, no_repeat_ngram_size=1),
    DecodingOptions(beam=2, sampling=True, seed=3),
    DecodingOptions(mbr="chrf", beam=3),
]


def test_sixteen_threads_with_mixed_options_get_what_each_gets_alone(
    exact: Translator, two_cores: None
) -> None:
    jobs = [(lines_of(seed, 1 + 3 * (seed % 5)), OPTIONS[seed % len(OPTIONS)]) for seed in range(16)]
    batching = Batching(max_tokens=60)

    def translate(lines: list[str], options: DecodingOptions) -> list[list[str]]:
        return [x.texts for x in exact.translate_lines(lines, options, batching=batching)]

    expected = [translate(*job) for job in jobs]
    together = threading.Barrier(16, timeout=SECONDS)

    def ask(seed: int) -> list[list[list[str]]]:
        together.wait()
        if seed % 2:
            return [translate(*jobs[seed]) for _ in range(2)]
        futures = [exact.submit(*jobs[seed], batching=batching) for _ in range(2)]
        return [[x.result(SECONDS).texts for x in own] for own in futures]

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(ask, range(16)))
    assert found == [[own, own] for own in expected]


class Gate:
    """Holds the first batch of a generator back, until all have asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        self.has_begun, self.is_open = threading.Event(), threading.Event()
        generate = Generator.generate

        def wait_first(generator: Generator, source: torch.Tensor, *args: Any, **options: Any) -> Any:
            self.sizes.append(source.size(0))
            self.has_begun.set()
            assert self.is_open.wait(SECONDS)
            return generate(generator, source, *args, **options)

        monkeypatch.setattr(Generator, "generate", wait_first)


def test_who_asks_for_the_same_at_once_shares_batches(
    exact: Translator, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [line or "the dog" for line in lines_of(5, 16)]
    expected = [exact.translate([line], beam=2)[0] for line in lines]
    gate = Gate(monkeypatch)
    options = DecodingOptions(beam=2)
    futures = exact.submit(lines[:1], options)
    assert gate.has_begun.wait(SECONDS)
    for line in lines[1:]:
        futures += exact.submit([line], options)
    gate.is_open.set()
    assert [x.result(SECONDS).text for x in futures] == expected
    assert gate.sizes == [1, 15]


def test_a_request_may_be_taken_back_before_it_begins(
    exact: Translator, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    options = DecodingOptions(beam=2)
    first = exact.submit(["the dog"], options)
    assert gate.has_begun.wait(SECONDS)
    second, third = exact.submit(["the cat", "the bird"], options)
    assert second.cancel()
    gate.is_open.set()
    assert third.result(SECONDS).source == "the bird" and first[0].result().source == "the dog"
    assert gate.sizes == [1, 1]


def test_an_error_of_one_line_is_that_lines(exact: Translator, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["the dog", "the cat sees", "", "a tree", "the old house sings"]
    expected = exact.translate(lines, beam=2)
    bad = int(exact.source_segmenter.encode(["tree"])[0][-1])
    generate = Generator.generate

    def fail(generator: Generator, source: torch.Tensor, *args: Any, **options: Any) -> Any:
        if (source == bad).any():
            raise ValueError("this is no sentence")
        return generate(generator, source, *args, **options)

    monkeypatch.setattr(Generator, "generate", fail)
    futures = exact.submit([*lines, "the " * 99], DecodingOptions(beam=2), too_long="error")
    wait(futures, SECONDS)
    with pytest.raises(ValueError, match="this is no sentence"):
        futures[3].result()
    with pytest.raises(UserError, match=f"Line 6 must have at most {MAX_POSITIONS - 1} pieces"):
        futures[5].result()
    assert [futures[i].result().text for i in (0, 1, 2, 4)] == [expected[i] for i in (0, 1, 2, 4)]
    with pytest.raises(ValueError, match="this is no sentence"):
        exact.translate(lines, beam=2)
    assert exact.translate(lines[:3], beam=2) == expected[:3]


def test_an_error_of_one_caller_is_not_that_of_another(
    exact: Translator, monkeypatch: pytest.MonkeyPatch, two_cores: None
) -> None:
    bad = int(exact.source_segmenter.encode(["tree"])[0][-1])
    sound = [line.replace("tree", "dog") for line in lines_of(2, 30)]
    expected = exact.translate(sound, beam=2)
    generate = Generator.generate

    def fail(generator: Generator, source: torch.Tensor, *args: Any, **options: Any) -> Any:
        if (source == bad).any():
            raise ValueError("this is no sentence")
        return generate(generator, source, *args, **options)

    monkeypatch.setattr(Generator, "generate", fail)

    def ask(lines: list[str]) -> list[str]:
        return [
            x.text
            for x in exact.translate_lines(lines, DecodingOptions(beam=2), batching=Batching(max_tokens=40))
        ]

    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ask, sound if i % 2 else [*sound, "the tree"]) for i in range(8)]
    for i, future in enumerate(asked):
        if i % 2:
            assert future.result() == expected
        else:
            assert isinstance(future.exception(), ValueError)


def test_an_interrupt_leaves_the_engine_ready(exact: Translator, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = exact.translate(["the dog", "a cat"])

    def interrupt(*_: Any, **__: Any) -> list[list[Hypothesis]]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Generator, "generate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            exact.translate(["the dog", "a cat"])
    assert exact.translate(["the dog", "a cat"]) == expected


# The process -----------------------------------------------------------------------------------------------


def submit(engine: Engine, count: int, run: Callable[[list[int], bool], list[Any]]) -> list[Job]:
    jobs = [Job([i], lambda results: results[0]) for i in range(count)]
    engine.submit(jobs, BatchQueue(run, Limits(10)), lambda _: (10,))
    return jobs


def finish(engine: Engine, jobs: list[Job]) -> list[Any]:
    for _ in engine.as_ready(jobs):
        pass
    return [job.future.result() for job in jobs]


@pytest.mark.parametrize("num_engines", [1, 2])
def test_calls_that_overlap_leave_the_process_as_they_found_it(num_engines: int, two_cores: None) -> None:
    """The second begins before the first has ended, and ends after it."""
    interval, new_thread = sys.getswitchinterval(), threads_of_a_new_thread()
    engines = [Engine(lambda: 2) for _ in range(num_engines)]
    first_begins, second_begins, first_may_end, second_may_end = (threading.Event() for _ in range(4))
    inside: list[tuple[int, float]] = []

    def call(engine: Engine, begins: threading.Event, may_end: threading.Event) -> None:
        def run(batch: list[int], _: bool) -> list[int]:
            inside.append((torch.get_num_threads(), sys.getswitchinterval()))
            if num_engines == 2:
                begins.set()
            assert may_end.wait(SECONDS)
            return batch

        jobs = submit(engine, 2, run)
        if num_engines == 1:
            begins.set()
        assert finish(engine, jobs) == [0, 1]

    one = threading.Thread(target=call, args=(engines[0], first_begins, first_may_end))
    two = threading.Thread(target=call, args=(engines[-1], second_begins, second_may_end))
    one.start()
    assert first_begins.wait(SECONDS)
    two.start()
    assert second_begins.wait(SECONDS)
    first_may_end.set()
    one.join(SECONDS)
    second_may_end.set()
    two.join(SECONDS)
    assert not one.is_alive() and not two.is_alive()
    assert [count for count, _ in inside] == [1] * 4
    assert all(own == pytest.approx(1e-5) for _, own in inside)
    assert sys.getswitchinterval() == interval
    assert threads_of_a_new_thread() == new_thread == torch.get_num_threads() == 2


def test_translators_that_overlap_leave_the_process_as_they_found_it(
    translator: Translator, exact: Translator, two_cores: None
) -> None:
    interval, new_thread = sys.getswitchinterval(), threads_of_a_new_thread()
    batching = Batching(max_tokens=40)

    def ask(seed: int) -> None:
        one = (translator, exact)[seed % 2]
        list(one.translate_lines(lines_of(seed, 40), DecodingOptions(beam=2), batching=batching))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(8)))
    assert sys.getswitchinterval() == interval
    assert threads_of_a_new_thread() == new_thread


def test_cores_are_counted_as_they_were_found(two_cores: None) -> None:
    counts: list[int] = []

    def count() -> None:
        with one_core():
            counts.append(torch.get_num_threads())
            counts.append(num_cores())

    thread = threading.Thread(target=count)
    thread.start()
    thread.join()
    assert counts == [1, 2]
    assert num_cores() == 2


@settings(max_examples=30, deadline=None)
@given(data=st.data(), num_cores=st.integers(1, 3), num_callers=st.integers(1, 4), room=st.integers(3, 60))
def test_every_job_is_finished_once_whoever_asks_beside(
    data: st.DataObject, num_cores: int, num_callers: int, room: int
) -> None:
    lengths = st.lists(st.lists(st.integers(1, 20), max_size=3), max_size=20)  # of the items of each job
    asked = [data.draw(lengths) for _ in range(num_callers)]
    late = data.draw(st.sets(st.integers(1, 20)))
    engine = Engine(lambda: num_cores)
    begun: list[int] = []

    def run(batch: list[int], may_drop: bool) -> list[int | None]:
        if len(batch) > 1 and len(batch) * max(batch) > room:
            raise torch.OutOfMemoryError("no room")
        begun.append(len(batch))
        return [None if may_drop and x in late else x for x in batch]

    queue = BatchQueue(run, Limits(40))

    def ask(own: list[list[int]]) -> list[list[int]]:
        jobs = [Job(items, list) for items in own]
        engine.submit(jobs, queue, lambda length: (length,))
        ready = [job for part in engine.as_ready(jobs) for job in part]
        assert sorted(map(id, ready)) == sorted(map(id, jobs))
        return [job.future.result() for job in jobs]

    with ThreadPoolExecutor(num_callers) as pool:
        assert list(pool.map(ask, asked)) == asked


def test_what_was_given_up_once_is_not_given_up_for_others_who_ask() -> None:
    queue = BatchQueue(lambda batch, _: batch, Limits(10))
    jobs = [Job([i], list) for i in range(4)]
    tickets = [Ticket(job, 0, (10,)) for job in jobs]
    queue.add(tickets[:2], is_running=False)
    first = queue.take()
    assert first is not None and first.may_drop
    queue.give_back(first.tickets)
    queue.plan(num_free=2, num_at_once=2)
    queue.add(tickets[2:], is_running=True)
    batches = [queue.take() for _ in range(4)]
    may_drop = {x.tickets[0]: x.may_drop for x in batches if x is not None}
    assert may_drop == {ticket: ticket is not first.tickets[0] for ticket in tickets}


def test_a_future_that_nobody_waits_for_is_run_behind() -> None:
    engine = Engine(lambda: 1)
    queue = BatchQueue(lambda batch, _: batch, Limits(10))
    futures: list[Future[int]] = []
    for number in range(20):
        job = Job([number], lambda results: results[0])
        engine.submit([job], queue, lambda _: (10,))
        engine.run_behind()
        futures.append(job.future)
    assert [future.result(SECONDS) for future in futures] == list(range(20))


def test_requests_and_lines_may_be_submitted_together(exact: Translator) -> None:
    futures = exact.submit(["the dog", Request("a cat", reference="x"), " "], DecodingOptions(beam=2))
    found = [future.result(SECONDS) for future in futures]
    assert [x.text for x in found] == exact.translate(["the dog", "a cat", " "], beam=2)
    assert [x.request.reference for x in found] == [None, "x", None]
    assert exact.submit([], DecodingOptions()) == []
    with pytest.raises(UserError, match="`beam` must be at least 1"):
        exact.submit(["the dog"], DecodingOptions(beam=0))
