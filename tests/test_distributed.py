"""The ranks of a run: two real processes over Gloo, and the choice of a device."""

import json
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from support.toy_task import PointExamples, PointTask

from nmt.data.batch_iterator import MicroBatch
from nmt.distributed import World, join_world, meet, single
from nmt.errors import LostRankError, UserError
from nmt.options import OptimizationOptions
from nmt.trainer import Trainer
from nmt.update.metrics import Metrics

SIZE = 2


def _run_rank(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(SIZE),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    with join_world("cpu") as world:
        tensor = torch.tensor([1, 2**40 + rank])
        summed = world.sum_(tensor)
        metrics = Metrics()
        with metrics.scope("train"):
            metrics.add({"loss": torch.tensor(0.5 + rank)})
            if rank == 1:
                metrics.add({"only_here": 3.0})
        world.barrier()
        report = {
            "place": [world.rank, world.size, world.is_main, str(world.device)],
            "sum": summed.tolist(),
            "is_in_place": summed is tensor,
            "keeps_dtype": tensor.dtype == torch.int64,
            "gathered": world.gather({"rank": rank}),
            "broadcast": world.broadcast(f"from {rank}"),
            "sums": metrics.sums("train", world),
            "empty": metrics.sums("never entered", world),
        }
    report["left"] = not dist.is_initialized()
    Path(folder, f"{rank}.json").write_text(json.dumps(report))


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port


@pytest.mark.timeout(120)
def test_two_processes_add_up_and_exchange(tmp_path: Path) -> None:
    mp.spawn(_run_rank, args=(_free_port(), str(tmp_path)), nprocs=SIZE)
    for rank in range(SIZE):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == {
            "place": [rank, SIZE, rank == 0, "cpu"],
            "sum": [2, 2**41 + 1],
            "is_in_place": True,
            "keeps_dtype": True,
            "gathered": [{"rank": 0}, {"rank": 1}],
            "broadcast": "from 0",
            "sums": {"loss": 2.0, "only_here": 3.0},
            "empty": {},
            "left": True,
        }


def _run_updating_rank(rank: int, port: int, folder: str) -> None:
    """Make an update by DDP and one by FSDP, and list the threads that are left when the world has been left."""
    values = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": SIZE,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ |= {name: str(value) for name, value in values.items()}
    with join_world("cpu") as world:
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
        model(torch.ones(1, 2)).sum().backward()
        del model
        options = OptimizationOptions(shard_weights=True)
        task = PointTask()
        trainer = Trainer(task, task.build_model(), options, world=world, seed=1, updates_per_epoch=1)
        examples = PointExamples(4, seed=1)
        trainer.train_step([MicroBatch(examples.collate(list(examples.xy)), 1.0)])
        trainer.close()
        del trainer
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    Path(folder, f"{rank}.json").write_text(json.dumps(names))


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are listed on Linux")
def test_no_thread_of_gloo_outlives_the_world(tmp_path: Path) -> None:
    """One that waits for Python's lock when the interpreter ends aborts the process."""
    mp.spawn(_run_updating_rank, args=(_free_port(), str(tmp_path)), nprocs=SIZE)
    for rank in range(SIZE):
        names = json.loads((tmp_path / f"{rank}.json").read_text())
        assert names and [name for name in names if "gloo" in name] == []


def test_a_single_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with join_world("cpu") as world:
        assert world == single(torch.device("cpu")) == World(0, 1, torch.device("cpu"))
        assert world.is_main
        assert not dist.is_initialized()
        tensor = torch.ones(3)
        assert world.sum_(tensor) is tensor
        assert tensor.tolist() == [1.0, 1.0, 1.0]
        assert world.gather("a") == ["a"]
        assert world.broadcast("a") == "a"
        world.barrier()


def test_the_group_is_left_on_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    store = iter([(dist.HashStore(), 0, 2)])
    monkeypatch.setattr("nmt.distributed.rendezvous", lambda *_, **__: store)
    monkeypatch.setattr("nmt.distributed.meet", lambda store, **_: store)
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    calls = []
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: calls.append(backend))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append("destroyed"))
    with pytest.raises(KeyError), join_world("cpu"):
        raise KeyError
    assert calls == ["gloo", "destroyed"]


def test_ranks_meet_although_lost_ones_have_left_their_traces() -> None:
    """Three attempts in one store, with a rank that comes late and one that died after it was seen."""
    store = dist.HashStore()
    for attempt in range(3):
        store.set("here 1", f"rank 1 of attempt {attempt}, which died at once")
        with ThreadPoolExecutor(3) as pool:
            found = [pool.submit(meet, store, rank=rank, size=3) for rank in (0, 2)]
            time.sleep(0.1)
            assert not any(future.done() for future in found)
            found.append(pool.submit(meet, store, rank=1, size=3))
            parts = [future.result() for future in found]
        assert not parts[0].check(["address"]), "nothing of an earlier attempt is seen"
        parts[0].set("address", str(attempt))
        assert [part.get("address") for part in parts] == [str(attempt).encode()] * 3


def test_a_rank_that_does_not_come_is_not_waited_for_without_end() -> None:
    with pytest.raises(LostRankError, match="all 2 ranks must come within"):
        meet(dist.HashStore(), rank=0, size=2, timeout=timedelta(seconds=0.1))


def test_an_environment_without_ranks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match="`RANK` must be set where `WORLD_SIZE` is 2"), join_world("cpu"):
        pass


def test_an_unknown_device_is_refused() -> None:
    with (
        pytest.raises(UserError, match="`device` must be one of auto, cpu, cuda, mps, but is 'tpu'"),
        join_world("tpu"),
    ):
        pass


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_refused(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match=f"`device` {device} must"), join_world(device):
        pass


def test_auto_takes_the_gpu_of_the_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with join_world("auto") as world:
        assert world.device == torch.device("cuda", 3)
    assert chosen == [torch.device("cuda", 3)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_sums_on_a_gpu_are_read_once() -> None:
    world = single(torch.device("cuda", 0))
    metrics = Metrics()
    with metrics.scope("train"):
        metrics.add({"loss": torch.ones((), device="cuda"), "targets": 3})
    assert metrics.sums("train", world) == {"loss": 1.0, "targets": 3.0}


@pytest.mark.parametrize("local_size", [1, 2])
def test_ranks_of_several_machines_that_do_not_reach_each_other_are_told_what_to_set(
    local_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
    }
    for name, value in {**places, "LOCAL_WORLD_SIZE": str(local_size)}.items():
        monkeypatch.setenv(name, value)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("Gloo connectFullMesh failed with [gloo/pair.cc:1] Connection refused\nmore")

    monkeypatch.setattr("nmt.distributed.rendezvous", fail)
    with pytest.raises(LostRankError) as caught, join_world("cpu"):
        pass
    text = str(caught.value)
    assert text.startswith("all 2 ranks must reach each other, but could not: Gloo connectFullMesh failed")
    assert ("Set GLOO_SOCKET_IFNAME" in text) == (local_size == 1) and "more" not in text
