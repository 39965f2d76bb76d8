"""What the libraries keep for each shape of a batch stays small, however many shapes there are."""

import subprocess
import sys

import pytest

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
