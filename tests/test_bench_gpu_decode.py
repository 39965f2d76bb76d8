"""That scripts/bench/gpu_decode.py runs, with a small model on a CPU."""

import importlib.util
import sys
from pathlib import Path

import pytest


@pytest.mark.usefixtures("one_thread")
def test_the_benchmark_of_decoding_prints_a_row_for_each_engine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(__file__).parent.parent / "scripts" / "bench" / "gpu_decode.py"
    spec = importlib.util.spec_from_file_location("bench_gpu_decode", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_gpu_decode", module)  # its dataclasses look for their module
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [str(path), "--tiny", "--plain", "--precision", "fp32"])
    module.main()
    rows = [line.split(" | ")[:3] for line in capsys.readouterr().out.splitlines() if line.count("|") > 5]
    assert rows[1:] == [
        ["nmt", "5", "fp32"],
        ["nmt, not recorded", "5", "fp32"],
        ["nmt", "1", "fp32"],
        ["nmt, not recorded", "1", "fp32"],
    ]
