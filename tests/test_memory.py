"""Memory: what does not fit is found before the first update and split, and the update stays the same."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.toy_run import assert_bit_equal, config, log, records, tensors
from support.toy_task import PointOptions, Points, PointTask
from torch import nn

from nmt.checkpoints.run_folder import CheckpointFolder
from nmt.data.batch_iterator import BatchIterator
from nmt.data.batching import padded_size
from nmt.data.options import BatchingOptions
from nmt.distributed import single
from nmt.errors import UserError
from nmt.run.forecast import parameter_counts
from nmt.run.memory_probe import fits, most_tokens, search_max_tokens
from nmt.run.opening import open_run
from nmt.system.signals import StopRequest
from nmt.task import LossOutput
from nmt.train_loop import describe, look_ahead, train

CPU = single(torch.device("cpu"))


class SmallMemoryTask(PointTask):
    """A device with memory for so many points at once; the model has no batch norm, which sees its batch."""

    room = 1000

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2)).double()

    def compute_loss(self, model: nn.Module, batch: Points) -> LossOutput:
        if model.training and batch.num_examples > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().compute_loss(model, Points(batch.xy.double(), batch.label))


@dataclass(frozen=True)
class SmallMemoryOptions(PointOptions):
    def build(self, assets: Path | None) -> PointTask:
        return SmallMemoryTask()


@pytest.mark.usefixtures("points_plugin")
def test_batches_that_do_not_fit_are_run_in_parts_with_the_same_updates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, room in (("large", 1000), ("small", 10)):
        monkeypatch.setattr(SmallMemoryTask, "room", room)
        train(config(tmp_path / name, optimization={"max_update": 40}, task_options=SmallMemoryOptions()))
    # 32 do not fit, nor 16, but 8 do.
    state = json.loads(
        (CheckpointFolder(tmp_path / "small" / "checkpoints").at(40) / "state.json").read_text()
    )
    assert state["split_above"] == 8
    assert "batches above 8 (examples x longest) are run in parts" in log(tmp_path / "small")
    large, small = (records(tmp_path / name, "train") for name in ("large", "small"))
    for ours, theirs in zip(large, small, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-9)
    models = [tensors(tmp_path / name, 40) for name in ("large", "small")]
    for name, tensor in models[0].items():
        torch.testing.assert_close(tensor, models[1][name], rtol=1e-6, atol=1e-9)


class OutOfMemoryError(RuntimeError):
    """As torch's own, with any text."""


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OutOfMemoryError("no more"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB, other allocations: 1.00 GB)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:75] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError(
            "[enforce fail] . DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."
        ),
    ],
)
def test_a_lack_of_memory_on_any_device_is_no_end(error: BaseException) -> None:
    def run(batch: Points) -> None:
        raise error

    examples = PointTask().open_split("train")
    assert not fits(run, examples, np.arange(4))


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ValueError("out of memory"), UserError("no")])
def test_other_errors_of_a_probe_are_shown(error: Exception) -> None:
    def run(batch: Points) -> None:
        raise error

    with pytest.raises(type(error), match=str(error)):
        fits(run, PointTask().open_split("train"), np.arange(4))


@pytest.mark.usefixtures("points_plugin")
def test_a_run_in_parts_is_resumed_in_the_same_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(folder: Path, max_update: int, *, room: int) -> None:
        monkeypatch.setattr(SmallMemoryTask, "room", room)
        train(config(folder, optimization={"max_update": max_update}, task_options=SmallMemoryOptions()))

    run(tmp_path / "whole", 30, room=10)
    run(tmp_path / "parts", 13, room=10)
    run(tmp_path / "parts", 30, room=1000)  # on another machine
    assert_bit_equal(tensors(tmp_path / "whole", 30), tensors(tmp_path / "parts", 30))


class FailingTask(SmallMemoryTask):
    """Its losses are not numbers for sixteen small batches, after so many good ones."""

    num_good = 1000

    def __init__(self) -> None:
        self.num_seen = 0

    def compute_loss(self, model: nn.Module, batch: Points) -> LossOutput:
        output = super().compute_loss(model, batch)
        if not model.training or batch.num_examples > 8:
            return output
        self.num_seen += 1
        is_bad = self.num_good < self.num_seen <= self.num_good + 16
        return LossOutput(output.loss * (torch.nan if is_bad else 1.0), output.sums)


@dataclass(frozen=True)
class FailingOptions(PointOptions):
    def build(self, assets: Path | None) -> PointTask:
        return FailingTask()


@pytest.mark.usefixtures("points_plugin")
def test_a_run_that_goes_back_to_when_there_was_more_memory_still_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint knows nothing of parts."""
    for room, num_good, max_update in ((1000, 1000, 13), (8, 16, 30)):
        monkeypatch.setattr(SmallMemoryTask, "room", room)
        monkeypatch.setattr(FailingTask, "num_good", num_good)
        optimization = {"max_update": max_update, "max_bad_updates": 3}
        train(config(tmp_path, optimization=optimization, task_options=FailingOptions()))
    assert records(tmp_path, "back") and records(tmp_path, "train")[-1]["update"] == 30


@pytest.mark.usefixtures("points_plugin")
def test_without_room_for_one_example_the_run_does_not_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SmallMemoryTask, "room", 0)
    with pytest.raises(UserError, match="one of length 1 alone does not"):
        train(config(tmp_path / "run", task_options=SmallMemoryOptions()))


@pytest.mark.usefixtures("points_plugin")
def test_probing_changes_nothing_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(config(tmp_path / "probed", optimization={"max_update": 20}))
    monkeypatch.setattr("nmt.train_loop.look_ahead", lambda run: [])
    train(config(tmp_path / "not", optimization={"max_update": 20}))
    assert_bit_equal(tensors(tmp_path / "probed", 20), tensors(tmp_path / "not", 20))


@pytest.mark.usefixtures("points_plugin")
def test_a_dry_run_prints_the_table_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(config(tmp_path / "run", dry_run=True))
    table = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line[0] != " ")
    # Linear(2, 8), batch norm, Linear(8, 2): 24 + 16 + 18 parameters. 500 examples in batches of 32.
    assert table["model"] == "58 parameters"
    assert table["data"] == "500 training examples, 101 validation examples"
    assert table["updates"] == "16 an epoch, of about 31 targets on 1 x cpu"
    # Multiply-adds count two: forward 2 * (16 + 16) an example; backward as much for the weights of both layers
    # and for the input of the second, but not of the first.
    assert (
        table["work"]
        == f"{2 * (16 + 16) * 2 + 2 * 16} FLOP a target in matrix products, forward and backward"
    )
    assert "s an update" in table["time"] and table["time"].endswith("for 100 updates")
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("points_plugin")
def test_to_describe_a_run_neither_changes_nor_writes_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SmallMemoryTask, "room", 10)
    run = open_run(config(tmp_path / "run", task_options=SmallMemoryOptions()), CPU, StopRequest())
    lines = list(describe(run))
    assert lines == list(describe(run)) and any("42 parameters" in line for line in lines)
    assert run.batches.split_above is None
    assert list(look_ahead(run))[: len(lines)] == lines
    assert run.batches.split_above == 8
    run.close()
    assert not (tmp_path / "run").exists()


def test_parameters_are_counted_by_module_and_tied_ones_once() -> None:
    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(7, 3),
            "layers": nn.Sequential(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3)), nn.BatchNorm1d(3)),
            "output": nn.Linear(3, 7),
        }
    )
    model["output"].weight = model["embedding"].weight
    expected = {"embedding": 21, "layers.0": 20 + 18, "layers.1": 6, "output": 7}
    assert parameter_counts(model) == expected


def test_max_tokens_auto_is_refused_on_a_cpu(tmp_path: Path) -> None:
    options = BatchingOptions(max_tokens="auto")
    with pytest.raises(UserError, match="`max-tokens` must be a number on a CPU, but is auto"):
        train(config(tmp_path / "run", batching=options))


@given(st.integers(600, 20_000), st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_the_search_finds_most_of_what_fits(room: int, multiple: int) -> None:
    sizes = np.random.default_rng(room).integers(1, 100, (3000, 2), dtype=np.int32)
    found = search_max_tokens(
        lambda batch: padded_size(sizes, batch) <= room, sizes, multiple=multiple, most=10**9, world=CPU
    )
    # Steps of one and a half, then a margin of a tenth: never more than fits, never less than 0.6 / 1.1 of it.
    assert found <= room and found >= 0.5 * room


def test_the_search_ends_where_everything_fits() -> None:
    sizes = np.full((50, 1), 10, dtype=np.int32)
    assert search_max_tokens(lambda batch: True, sizes, multiple=1, most=10**9, world=CPU) >= 450


@given(st.integers(100, 20_000))
@settings(max_examples=30, deadline=None)
def test_the_search_ends_at_what_is_good_to_train_with(most: int) -> None:
    sizes = np.random.default_rng(most).integers(1, 100, (3000, 2), dtype=np.int32)
    tried = []

    def does_fit(batch: Any) -> bool:
        tried.append(padded_size(sizes, batch))
        return True

    assert search_max_tokens(does_fit, sizes, multiple=1, most=most, world=CPU) == most
    assert max(tried) <= most


def test_an_epoch_keeps_300_updates_where_max_tokens_is_found() -> None:
    # 29,000 pairs of 15 tokens on 2 ranks with 2 batches each: 435,000 / 1,200 = 362, but no fewer than 1,024.
    assert most_tokens(435_000, longest_example=50, batches_an_update=4) == 1024
    assert most_tokens(435_000, longest_example=1500, batches_an_update=1) == 1500
    assert most_tokens(30_000_000, longest_example=256, batches_an_update=4) == 25_000


class Lengths:
    def __init__(self, sizes: Any) -> None:
        self.sizes = sizes

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> int:
        return index

    def collate(self, items: list[int]) -> tuple[int, ...]:
        return tuple(items)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(5, 60), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_parts_hold_the_examples_of_their_update_within_the_limit(
    world_size: int, update_freq: int, limit: int, seed: int
) -> None:
    sizes = np.random.default_rng(seed).integers(1, 13, (90, 2), dtype=np.int32)
    options = BatchingOptions(max_tokens=60, required_batch_size_multiple=2, update_freq=update_freq)

    def updates(split_above: int | None) -> list[list[Any]]:
        ranks = [
            BatchIterator(Lengths(sizes), options, seed=seed, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        for rank in ranks:
            rank.split_above = split_above
        return [list(shares) for shares in zip(*ranks, strict=True)]

    for whole, parts in zip(updates(None), updates(limit), strict=True):
        assert len({len(share) for share in parts}) == 1, "ranks must run the same number of micro-batches"
        for ours, theirs in zip(whole, parts, strict=True):
            wanted = [index for batch in ours if batch.weight for index in batch.batch]
            assert [index for batch in theirs if batch.weight for index in batch.batch] == wanted
        for share in parts:
            for micro_batch in share:
                size = padded_size(sizes, np.array(micro_batch.batch))
                assert size <= limit or len(micro_batch.batch) == 1
