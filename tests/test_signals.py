"""Runs that are asked to stop, and ranks that are lost: real processes, real signals."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.crash_injection import content, install_plugin
from support.toy_task import PointOptions, PointTask

import nmt
from nmt.cli.train import main
from nmt.data.options import BatchingOptions
from nmt.errors import EXIT_RESUMABLE
from nmt.options import CheckpointOptions, OptimizationOptions, TrainConfig
from nmt.system.signals import StopRequest
from nmt.train_loop import train
from nmt.trainer import Trainer

TESTS = Path(__file__).parent
ENDLESS = ["--max-update", "1000000"]


def config(folder: Path) -> TrainConfig[PointOptions]:
    """5 updates an epoch; a validation and a checkpoint within epochs and at their ends."""
    return TrainConfig(
        task="points",
        task_options=PointOptions(),
        save_dir=folder,
        batching=BatchingOptions(max_tokens=None, batch_size=100, required_batch_size_multiple=1),
        optimization=OptimizationOptions(lr=0.02, warmup_updates=5, max_update=14, patience=100),
        checkpoints=CheckpointOptions(validate_interval_updates=4, save_interval_updates=6),
        device="cpu",
        log_interval=3,
    )


def final(folder: Path, update: int) -> dict[str, Any]:
    """What a run has come to, but for times, earlier checkpoints that are left, and what resumes changed."""
    checkpoint = folder / "checkpoints" / f"update-{update:07d}"
    files = [checkpoint / name for name in ("model.safetensors", "optimizer.safetensors", "state.json")]
    records = [record for record in content(folder / "metrics.jsonl") if record["kind"] != "resume"]
    return {**{path.name: content(path) for path in files}, "metrics.jsonl": records}


@pytest.mark.usefixtures("points_plugin")
@pytest.mark.parametrize("at", [1, 4, 5, 6, 7, 12], ids=lambda at: f"update {at}")
def test_a_run_that_is_asked_to_stop_goes_on_bit_equal(
    tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within an epoch, at its end (5), where a validation (4, 12) or a checkpoint (6) is due."""
    train(config(tmp_path / "whole"))
    stop = StopRequest()
    make_update = Trainer.train_step

    def make_update_and_ask(self: Trainer, *args: Any, **kwargs: Any) -> None:
        make_update(self, *args, **kwargs)
        if self.update == at:
            stop.request("the test")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", make_update_and_ask)
        last = train(config(tmp_path / "parts"), stop=stop)
    assert last.best.resolve().name <= f"update-{at:07d}"
    assert (tmp_path / "parts" / "checkpoints" / "last").readlink() == Path(f"update-{at:07d}")
    line = (tmp_path / "parts" / "train.log").read_text().rstrip("\n").split("\n")[-1]
    assert f"stopped: the test after update {at}, which is saved; the same command goes on" in line
    train(config(tmp_path / "parts"))
    assert final(tmp_path / "parts", 14) == final(tmp_path / "whole", 14)
    for link in ("best", "last"):
        links = [(tmp_path / run / "checkpoints" / link).readlink() for run in ("parts", "whole")]
        assert links[0] == links[1]


@pytest.mark.usefixtures("points_plugin")
def test_a_request_during_validation_or_saving_is_obeyed_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config(tmp_path / "whole"))
    for method in ("evaluate", "save_assets"):
        stop = StopRequest()
        original = getattr(PointTask, method)

        def ask(
            self: PointTask, *args: Any, stop: StopRequest = stop, original: Callable[..., Any] = original
        ) -> Any:
            stop.request("the test")
            return original(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(PointTask, method, ask)
            train(config(tmp_path / method), stop=stop)
        # The first validation, and with it the first checkpoint, is that after update 4.
        assert (tmp_path / method / "checkpoints" / "last").readlink() == Path("update-0000004")
        assert (
            json.loads((tmp_path / method / "metrics.jsonl").read_text().splitlines()[-1])["kind"] == "valid"
        )
        train(config(tmp_path / method))
        assert final(tmp_path / method, 14) == final(tmp_path / "whole", 14)


@pytest.mark.usefixtures("points_plugin")
def test_a_request_before_the_first_update_makes_none(tmp_path: Path) -> None:
    stop = StopRequest()
    stop.request("the test")
    train(config(tmp_path / "run"), stop=stop)
    assert "stopped: the test before the first update" in (tmp_path / "run" / "train.log").read_text()
    train(config(tmp_path / "whole"))
    train(config(tmp_path / "run"))
    assert final(tmp_path / "run", 14) == final(tmp_path / "whole", 14)


@pytest.mark.usefixtures("points_plugin")
@pytest.mark.parametrize("is_asked", [False, True])
def test_the_exit_code_tells_a_finished_run_from_one_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_asked: bool
) -> None:
    make_update = Trainer.train_step

    def make_update_and_ask(self: Trainer, *args: Any, **kwargs: Any) -> None:
        make_update(self, *args, **kwargs)
        if is_asked and self.update == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)  # until the thread that listens has heard it

    monkeypatch.setattr(Trainer, "train_step", make_update_and_ask)
    command = ["--task", "points", "--batch-size", "50", "--device", "cpu", "--max-update", "6"]
    command += ["--save-dir", str(tmp_path / "run")]
    if not is_asked:
        main(command)
        return
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == EXIT_RESUMABLE == 75
    is_asked = False
    main(command)


class Started:
    """Processes of a test, all killed at its end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "PYTHONPATH": f"{folder / 'plugin'}:{TESTS}:{Path(nmt.__file__).parents[1]}",
            "OMP_NUM_THREADS": "1",
        }
        self.all: list[subprocess.Popen[str]] = []

    def start(self, command: list[Any], **environment: Any) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            list(map(str, command)),
            cwd=self.folder,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**self.environment, **{name: str(value) for name, value in environment.items()}},
        )
        self.all.append(process)
        return process

    def train(self, *options: Any, **environment: Any) -> "subprocess.Popen[str]":
        return self.start([sys.executable, "-m", "nmt.cli.train", *OPTIONS, *options], **environment)

    def ranks(self, *options: Any, size: int = 2) -> list["subprocess.Popen[str]"]:
        """Start ranks without torchrun."""
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": server.getsockname()[1], "WORLD_SIZE": size}
        return [self.train(*options, **place, RANK=rank, LOCAL_RANK=rank) for rank in range(size)]

    def torchrun(self, *options: Any, max_restarts: int = 0) -> "subprocess.Popen[str]":
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
        launcher += ["--max-restarts", max_restarts, "-m", "nmt.cli.train"]
        return self.start([sys.executable, *launcher, *OPTIONS, *options])

    def wait_for_records(self, number: int, *, after: int = 0) -> None:
        """Wait until the run has written so many records more."""
        path = self.folder / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not path.exists() or path.read_bytes().count(b"\n") < after + number:
            assert time.monotonic() < deadline, [p.communicate(timeout=1)[1] for p in self.all if p.poll()]
            time.sleep(0.02)

    def num_records(self) -> int:
        return (self.folder / "run" / "metrics.jsonl").read_bytes().count(b"\n")


OPTIONS = ["--task", "points", "--batch-size", "50", "--device", "cpu", "--save-dir", "run"]
OPTIONS += ["--log-interval", "5", "--save-interval-updates", "20"]


@pytest.fixture
def started(tmp_path: Path) -> Any:
    install_plugin(tmp_path)
    processes = Started(tmp_path)
    yield processes
    for process in processes.all:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def end(process: "subprocess.Popen[str]", code: int) -> str:
    said: str = process.communicate(timeout=120)[1]
    assert process.returncode == code, said
    assert "Traceback" not in said and "Exception ignored" not in said, said
    return said


def children_of(process: "subprocess.Popen[str]") -> list[int]:
    """Return the ranks that torchrun has started."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True).stdout
    children = [int(line.split()[0]) for line in listed.splitlines() if int(line.split()[1]) == process.pid]
    assert len(children) >= 2
    return children


def last_update(folder: Path) -> int:
    return int((folder / "run" / "checkpoints" / "last").readlink().name.removeprefix("update-"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_to_all_processes_of_a_run_saves_and_ends_well(
    started: Started, number: signal.Signals
) -> None:
    """To its whole group, as a terminal and cluster schedulers send it: workers that read data go on, too."""
    process = started.train(*ENDLESS, "--num-workers", 2)
    started.wait_for_records(3)
    os.killpg(process.pid, number)
    said = end(process, EXIT_RESUMABLE)
    update = last_update(started.folder)
    assert said.endswith(
        f"stopped: {number.name} after update {update}, which is saved; the same command goes on from there\n"
    )
    assert f"nmt-train: {number.name}: ends after this update, and saves; once more ends at once" in said
    end(started.train("--max-update", update + 20), 0)
    end(started.train("--max-update", update + 20, "--save-dir", "whole"), 0)
    ends = [final(started.folder / name, update + 20) for name in ("run", "whole")]
    assert ends[0] == ends[1]


@pytest.mark.slow
def test_a_second_signal_ends_at_once_even_while_another_rank_is_waited_for(started: Started) -> None:
    one, other = started.ranks(*ENDLESS)
    started.wait_for_records(3)
    other.send_signal(signal.SIGSTOP)  # so that rank 0 waits for it, in C++
    time.sleep(1)
    one.send_signal(signal.SIGTERM)
    time.sleep(1)
    assert one.poll() is None
    one.send_signal(signal.SIGTERM)
    assert "SIGTERM again: ended at once" in end(one, 128 + signal.SIGTERM)


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_at_the_same_update(started: Started) -> None:
    one, other = started.ranks(*ENDLESS)
    started.wait_for_records(3)
    other.send_signal(signal.SIGTERM)
    assert "stopped: SIGTERM after update" in end(one, EXIT_RESUMABLE)
    end(other, EXIT_RESUMABLE)
    update = last_update(started.folder)
    ranks = started.ranks("--max-update", update + 20)
    said = [end(rank, 0) for rank in ranks]
    assert f"finished: reached max-update {update + 20} | " in said[0]
    for rank in started.ranks("--max-update", update + 20, "--save-dir", "whole"):
        end(rank, 0)
    ends = [final(started.folder / name, update + 20) for name in ("run", "whole")]
    assert ends[0] == ends[1]


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1], ids=lambda lost: f"rank {lost}")
def test_a_rank_that_is_killed_is_named_by_the_other(started: Started, lost: int) -> None:
    ranks = started.ranks(*ENDLESS)
    started.wait_for_records(3)
    ranks[lost].kill()
    said = end(ranks[1 - lost], 75)
    name = f"rank {lost} (process {ranks[lost].pid} on "
    assert f"nmt-train: error: this rank cannot go on alone: {name}" in said
    assert said.count("error:") == 1


@pytest.mark.slow
def test_a_rank_that_no_longer_answers_is_named_after_the_timeout(started: Started) -> None:
    ranks = started.ranks(*ENDLESS, "--rank-timeout", "0.1")
    started.wait_for_records(3)
    ranks[1].send_signal(signal.SIGSTOP)
    assert f"rank 1 (process {ranks[1].pid} on " in end(ranks[0], 75)


@pytest.mark.slow
def test_torchrun_takes_the_run_up_again_after_a_rank_was_killed(started: Started) -> None:
    process = started.torchrun("--max-update", "400", max_restarts=1)
    started.wait_for_records(5)
    children = children_of(process)
    os.kill(max(children), signal.SIGKILL)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said
    assert "resume: from run/checkpoints/update-" in said and "finished: reached max-update 400" in said
    assert "has given no sign of life" in said or "Traceback" not in said
    ranks = started.ranks("--max-update", "400", "--save-dir", "whole")
    for rank in ranks:
        end(rank, 0)
    ends = [final(started.folder / name, 400) for name in ("run", "whole")]
    assert ends[0] == ends[1]


@pytest.mark.slow
def test_torchrun_does_not_go_on_with_a_run_that_was_asked_to_stop(started: Started) -> None:
    """One rank gets the signal, and torchrun takes its exit code for a failure, and starts all ranks again."""
    process = started.torchrun(*ENDLESS, max_restarts=2)
    started.wait_for_records(5)
    children = children_of(process)
    os.kill(max(children), signal.SIGTERM)
    said = process.communicate(timeout=300)[1]
    assert process.returncode not in (0, None), said
    assert said.count("stopped: SIGTERM after update") == 1 and "resume: from" not in said, said
    assert said.count("stopped before torchrun started the ranks again: no update is made") == 2, said
    assert "finished: " not in said
    update = last_update(started.folder)
    assert f"after update {update}, which is saved" in said
    process = started.torchrun("--max-update", update + 20)  # another torchrun goes on
    assert f"finished: reached max-update {update + 20}" in end(process, 0)


@pytest.mark.slow
def test_ranks_say_nothing_but_what_rank_0_reports(started: Started) -> None:
    said = end(started.torchrun("--max-update", 20), 0)
    lines = [line for line in said.splitlines() if "OMP_NUM_THREADS" not in line]
    assert "find_unused_parameters" not in said and "reducer.cpp" not in said and "Warning" not in said, said
    assert sum("finished: " in line for line in lines) == 1


@pytest.mark.slow
def test_torchrun_that_is_asked_to_stop_leaves_a_run_to_go_on_with(started: Started) -> None:
    process = started.torchrun(*ENDLESS)
    started.wait_for_records(10)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[1]
    assert "stopped: SIGTERM after update" in said
    assert last_update(started.folder) > 0
