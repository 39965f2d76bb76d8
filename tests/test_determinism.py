"""Deterministic algorithms: on while they are wanted, then as before, and one line where there is none."""

import os

import pytest
import torch

from nmt.errors import UserError
from nmt.system.determinism import deterministic_algorithms


def flags() -> tuple[bool, bool, bool]:
    cudnn = torch.backends.cudnn
    return torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark


def test_they_are_on_inside_and_as_before_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = flags()
    with deterministic_algorithms(False):
        assert flags() == before and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    with deterministic_algorithms(True):
        assert flags() == (True, True, False) and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert flags() == before


def test_an_operation_without_a_deterministic_form_is_one_line() -> None:
    before = flags()
    with (
        pytest.raises(
            UserError, match=r"^`deterministic` must be off .* but put_ has none here\. .*$"
        ) as caught,
        deterministic_algorithms(True),
    ):
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
    assert "\n" not in str(caught.value) and flags() == before


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="size of tensor"), deterministic_algorithms(True):
        torch.zeros(2) + torch.zeros(3)
