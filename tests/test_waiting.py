"""The time that is spent waiting for batches."""

import time
from collections.abc import Iterator

import pytest
import torch
from toy_run import config, records

from nmt.run.waiting import WaitForData
from nmt.train_loop import train


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
