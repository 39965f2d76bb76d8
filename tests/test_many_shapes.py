"""What the libraries keep for each shape of a batch stays small, however many shapes there are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.tiny_translation_model import write_tiny_model

from nmt.system.prepared_shapes import keep_prepared_shapes
from nmt.translation.translator import Translator

PROGRAM = """
import nmt  # sets how much is kept
import torch

if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    raise SystemExit(3)
weight = torch.zeros(64, 64)

def memory():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e6

def multiply(sizes):
    for size in sizes:
        torch.ops.mkldnn._linear_pointwise(torch.zeros(size, 64), weight, None, "none", [], "")

multiply(range(100, 200))
before = memory()
multiply(range(200, 600))
print(memory() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ever_new_shapes_do_not_fill_the_memory() -> None:
    """400 shapes of 0.3 MB each would take 120 MB."""
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    if result.returncode == 3:
        pytest.skip("this PyTorch has no oneDNN")
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 40


@pytest.mark.parametrize("given", [None, "100", "16"])
def test_what_the_user_sets_stands(monkeypatch: pytest.MonkeyPatch, given: str | None) -> None:
    names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    for name in names:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(f"NMT_{name}", raising=False)
    if given is not None:
        monkeypatch.setenv(names[0], given)
    keep_prepared_shapes(16)
    assert [os.environ[name] for name in names] == [given or "16", "16"]
    keep_prepared_shapes(256)
    assert [os.environ[name] for name in names] == [given or "256", "256"]


def test_a_translator_keeps_some_for_each_thread(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        monkeypatch.setenv(name, "16")  # as `import nmt` has set it
        monkeypatch.setenv(f"NMT_{name}", "16")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    Translator.load(model)
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "48"


def test_a_process_that_was_started_by_another_sets_its_own() -> None:
    program = """
import os, subprocess, sys
from nmt.system.prepared_shapes import keep_prepared_shapes
keep_prepared_shapes(256)
child = "import nmt, os; print(os.environ['ONEDNN_PRIMITIVE_CACHE_CAPACITY'])"
subprocess.run([sys.executable, "-c", child], check=True)
"""
    environment = {name: value for name, value in os.environ.items() if "CACHE_CAPACITY" not in name}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert result.stdout == "16\n"
