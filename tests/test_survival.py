"""A run that is killed, at any operation on the disk or at random, ends like one that was left alone."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.crash_injection import content, install_plugin, snapshot

BIN = Path(sys.executable).parent
TESTS = Path(__file__).parent
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_kill_or_a_full_disk_at_any_operation_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    result = subprocess.run(
        [sys.executable, "-m", "support.crash_injection", tmp_path / "runs"],
        cwd=TESTS,
        capture_output=True,
        text=True,
        env={**os.environ, **ONE_THREAD, "TMPDIR": str(tmp_path / "tmp")},
        timeout=880,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["failures"] == []
    # Each operation once; six checkpoints of five files each cannot be written with fewer.
    assert report["kill before"] == report["operations"] > 150
    assert report["kill half-way"] == report["full"] > 60
    assert report["kills of a resumed run"] > 30


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """nmt-train for the points task, at work for some seconds, with a checkpoint every few updates."""
    install_plugin(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'plugin'}:{TESTS}")
    for name, value in ONE_THREAD.items():
        monkeypatch.setenv(name, value)
    return [
        *(
            BIN / "nmt-train",
            "--task",
            "points",
            "--batch-size",
            "50",
            "--max-update",
            "400",
            "--device",
            "cpu",
        ),
        *("--save-interval-updates", "3", "--keep-last", "2", "--log-interval", "5", "--save-dir", "run"),
    ]


@pytest.mark.slow
def test_five_kills_at_random_moments_do_no_harm(tmp_path: Path, command: list[Any]) -> None:
    folders = [tmp_path / "whole", tmp_path / "killed"]
    for folder in folders:
        folder.mkdir()
    subprocess.run(command, cwd=folders[0], check=True, stderr=subprocess.DEVNULL)
    records = folders[1] / "run" / "metrics.jsonl"
    rng = random.Random()
    num_killed_at_work = 0
    for _ in range(5):
        before = records.stat().st_mtime_ns if records.exists() else 0
        process = subprocess.Popen(command, cwd=folders[1], stderr=subprocess.DEVNULL)
        while process.poll() is None and (not records.exists() or records.stat().st_mtime_ns == before):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.7))
        process.send_signal(signal.SIGKILL)
        num_killed_at_work += process.wait() == -signal.SIGKILL
    assert num_killed_at_work >= 2, "the run must be long enough to be killed in it"
    subprocess.run(command, cwd=folders[1], check=True, stderr=subprocess.DEVNULL)
    assert snapshot(folders[1]) == snapshot(folders[0])


@pytest.mark.slow
def test_the_same_seed_gives_the_same_files(tmp_path: Path, command: list[Any]) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        subprocess.run(
            [*command, "--max-update", "20", "--deterministic"],
            cwd=tmp_path / name,
            check=True,
            stderr=subprocess.DEVNULL,
        )
    one, other = (snapshot(tmp_path / name) for name in ("one", "other"))
    assert one == other
    assert "run/checkpoints/update-0000020/optimizer.safetensors" in one
    assert isinstance(content(tmp_path / "one/run/checkpoints/last/model.safetensors"), bytes)


@pytest.mark.slow
def test_a_file_that_may_grow_no_further_ends_the_run_with_a_line(tmp_path: Path, command: list[Any]) -> None:
    """The system's own refusal, through Rust's writer: no file may be as large as the optimizer's."""
    whole, full = tmp_path / "whole", tmp_path / "full"
    for folder in (whole, full):
        folder.mkdir()
    short = [*command, "--max-update", "12", "--log-interval", "100"]
    subprocess.run(short, cwd=whole, check=True, stderr=subprocess.DEVNULL)
    subprocess.run([*short, "--max-update", "6"], cwd=full, check=True, stderr=subprocess.DEVNULL)
    (full / "run" / "train.log").unlink()  # it grows too
    limit = (full / "run" / "checkpoints" / "last" / "optimizer.safetensors").stat().st_size - 1
    limited = f"import resource as r, sys; r.setrlimit(r.RLIMIT_FSIZE, ({limit}, -1)); "
    limited += "from nmt.cli.train import main; main(sys.argv[1:])"
    arguments = [sys.executable, "-c", limited, *map(str, short[1:])]
    result = subprocess.run(arguments, cwd=full, capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    last = result.stderr.rstrip("\n").split("\n")[-1]
    assert last == (
        "nmt-train: error: `run/checkpoints/update-0000009` could not be written: File too large. "
        "Earlier checkpoints are as they were: make room, and the same command goes on from the checkpoint of "
        "update 6."
    )
    assert "Traceback" not in result.stderr
    subprocess.run(short, cwd=full, check=True, stderr=subprocess.DEVNULL)
    for name in ("model.safetensors", "optimizer.safetensors"):
        place = f"run/checkpoints/update-0000012/{name}"
        assert (whole / place).read_bytes() == (full / place).read_bytes()
