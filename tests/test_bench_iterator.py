"""What scripts/bench/iterator.py simulates: a corpus that opens, and a position that a run could have."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from nmt.data.indexed_dataset import IndexedDataset
from nmt.data.options import BatchingOptions
from nmt.data.parallel_dataset import ParallelDataset


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    path = Path(__file__).parent.parent / "scripts" / "bench" / "iterator.py"
    spec = importlib.util.spec_from_file_location("bench_iterator", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def open_corpus(folder: Path) -> ParallelDataset:
    return ParallelDataset(IndexedDataset(folder / "source"), IndexedDataset(folder / "target"))


def test_the_corpus_is_a_data_set_of_as_many_pairs_of_moderate_lengths(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "BLOCK", 400)  # three blocks, the last one smaller
    bench.write_corpus(tmp_path, 1000)
    sizes = open_corpus(tmp_path).sizes[:]  # opening checks that offsets and lengths agree
    assert sizes.shape == (1000, 2)
    assert sizes.min() >= 2 and sizes.max() <= bench.LONGEST
    assert (np.abs(sizes.mean(axis=0) - 25) < 3).all()


def test_the_middle_is_a_position_that_leaves_half_of_the_epoch(bench: ModuleType, tmp_path: Path) -> None:
    bench.write_corpus(tmp_path, 3000)
    options = BatchingOptions(max_tokens=500, window_size=300)
    batches = bench.new_iterator(open_corpus(tmp_path), options, 2)
    num_batches = len(batches.first_batches)
    batches.load_state_dict(
        batches.state_dict() | bench.in_the_middle(batches.state_dict(), num_batches=num_batches)
    )
    left = sum(len(batch.indices) for update in batches for batch in update if batch.weight)
    assert 600 < left < 900  # one rank of two: of five windows, of which the first is half over, its half


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not say which memory is private")
def test_each_figure_is_in_the_table(
    bench: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench.write_corpus(tmp_path, 2000)
    found = bench.measure(tmp_path, 500, 8)
    monkeypatch.setattr("sys.argv", ["iterator.py", "--pairs", "2000", "--ranks", "8", "--max-tokens", "500"])
    bench.report(bench.parse_arguments(), [found])
    heading, names, _, row = capsys.readouterr().out.splitlines()
    assert heading.startswith("2,000 pairs, batches of 500 tokens, ")
    assert names.count("|") == row.count("|") == 11
    # About 25 tokens a pair, of which 20 fit into a batch or fewer, for 8 ranks.
    assert 12 <= found.updates <= 25
    assert f"| {found.updates} |" in row
