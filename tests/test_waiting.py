"""The time that is spent waiting: for batches, and for other ranks."""

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.ranks import run_ranks
from support.toy_run import config, records
from support.toy_task import PointExamples, PointTask

from nmt.data.batch_iterator import MicroBatch
from nmt.distributed import World, single
from nmt.options import OptimizationOptions
from nmt.run.opening import open_run
from nmt.run.waiting import WaitForData
from nmt.system.signals import StopRequest
from nmt.train_loop import train, train_run
from nmt.trainer import Trainer


def test_asking_counts_and_what_is_done_with_a_batch_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)

    def batches() -> Iterator[int]:
        nonlocal now
        for seconds in (1, 2, 4):
            now += seconds  # to read
            yield seconds
        now += 100  # the end is no batch

    waiting = WaitForData(torch.device("cpu"))
    found = []
    for batch in waiting.watch(batches()):
        found.append(batch)
        now += 50  # to train
    assert found == [1, 2, 4]
    assert waiting.take_seconds() == 7
    assert waiting.take_seconds() == 0


@pytest.mark.usefixtures("points_plugin")
def test_each_report_has_the_share_of_time(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    train(config(tmp_path / "run", optimization={"max_update": 20}))
    shares = [record["waited for data"] for record in records(tmp_path / "run", "train")]
    assert len(shares) == 2 and all(0 < share < 1 for share in shares)
    assert "| waited for data " in (tmp_path / "run" / "train.log").read_text()


@pytest.mark.gpu
def test_a_gpu_that_is_busy_does_not_wait() -> None:
    matrix = torch.randn(4096, 4096, device="cuda")

    def batches() -> Iterator[int]:
        for i in range(5):
            if i == 3:
                torch.cuda.synchronize()
                time.sleep(0.2)
            yield i

    waiting = WaitForData(torch.device("cuda"))
    for _ in waiting.watch(batches()):
        for _ in range(20):
            matrix @ matrix
    assert 0.15 < waiting.take_seconds() < 0.4


def _train_sharded(world: World, folder: str) -> None:
    settings = config(Path(folder, "sharded"), optimization={"max_update": 10, "shard_weights": True})
    with closing(open_run(settings, world, StopRequest())) as run:
        train_run(run)


def _train_two(world: World, folder: str) -> None:
    if world.rank == 1:
        make_update = Trainer.train_step

        def make_update_late(self: Trainer, *args: Any, **kwargs: Any) -> None:
            time.sleep(0.1)
            make_update(self, *args, **kwargs)

        Trainer.train_step = make_update_late  # type: ignore[method-assign]
    settings = config(Path(folder, "run"), optimization={"max_update": 10})
    with closing(open_run(settings, world, StopRequest())) as run:
        train_run(run)


def _train_with_a_slow_rank(world: World, folder: str) -> None:
    """Make updates of which rank 1 takes its time: to begin one, or in its forward pass."""
    for name in ("begin", "forward"):
        trainer = Trainer(
            PointTask(),
            PointTask().build_model(),
            OptimizationOptions(),
            world=world,
            seed=1,
            updates_per_epoch=9,
        )
        if name == "forward" and world.rank == 1:
            trainer.model.register_forward_pre_hook(lambda *_: time.sleep(0.5))
        batch = PointExamples(8, seed=1).collate(list(PointExamples(8, seed=1).xy))
        for _ in range(2):
            if name == "begin" and world.rank == 1:
                time.sleep(0.5)
            trainer.train_step([MicroBatch(batch, 1.0, np.arange(8))])
        Path(folder, f"{name}{world.rank}").write_text(str(world.waited.take_seconds()))
        trainer.close()
    _train_sharded(world, folder)
    _train_two(world, folder)


def test_the_rank_that_others_wait_for_waits_least_and_is_named(tmp_path: Path) -> None:
    run_ranks(_train_with_a_slow_rank, str(tmp_path), size=2)
    for name in ("begin", "forward"):
        waited = [float((tmp_path / f"{name}{rank}").read_text()) for rank in range(2)]
        assert waited[0] > 0.9 and waited[1] < waited[0], name
    (record,) = records(tmp_path / "sharded", "train")
    assert "waited for ranks" not in record, "most of it would be missing"
    (record,) = records(tmp_path / "run", "train")
    assert record["slowest rank"] == 1
    assert 0 <= record["slowest rank waited"] < record["waited for ranks"] <= 1
    shown = f"| waited for ranks {record['waited for ranks']:.1%} | slowest rank 1, which waited "
    assert shown in (tmp_path / "run" / "train.log").read_text()


def test_a_single_rank_waits_for_nobody() -> None:
    world = single(torch.device("cpu"))
    assert world.sum_in_update_(torch.ones(2)).tolist() == [1, 1]
    assert world.waited.take_seconds() == 0


@pytest.mark.usefixtures("points_plugin")
def test_a_single_rank_reports_no_waiting_for_ranks(tmp_path: Path) -> None:
    train(config(tmp_path / "run", optimization={"max_update": 10}))
    (record,) = records(tmp_path / "run", "train")
    assert "waited for ranks" not in record and "slowest rank" not in record
