"""What is slower than it could be is a warning, and in a run a line of its log."""

import sys
import warnings
from pathlib import Path

import pytest
import torch
from support.toy_run import config, log

import nmt.models
from nmt.models import training_ops
from nmt.system.slower import SlowerWarning, telling_what_is_slower, warn_slower
from nmt.train_loop import train


def test_a_kernel_of_the_loss_that_does_not_work_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nmt.models.loss_kernel", None)
    monkeypatch.delattr(nmt.models, "loss_kernel", raising=False)
    training_ops._loss_kernel.cache_clear()
    with pytest.warns(SlowerWarning, match=r"Triton's kernel of the loss does not work here \(.*loss_kernel"):
        assert training_ops._loss_kernel(torch.device("cuda")) is None
    training_ops._loss_kernel.cache_clear()


def test_warnings_become_lines_and_others_stay() -> None:
    lines: list[str] = []
    with pytest.warns(DeprecationWarning, match="old"), telling_what_is_slower(lines):
        warn_slower("A kernel", RuntimeError("first line\nlast line"))
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    assert lines == ["warning: training is slower than it could be: A kernel does not work here (last line)"]


@pytest.mark.usefixtures("points_plugin")
def test_a_run_writes_them_into_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "nmt.train_loop.decide_split", lambda *_, **__: warn_slower("A kernel", OSError("no compiler"))
    )
    train(config(tmp_path, optimization={"max_update": 1}))
    assert "warning: training is slower than it could be: A kernel does not work here (no compiler)" in log(
        tmp_path
    )
