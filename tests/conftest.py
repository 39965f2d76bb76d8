"""What many tests share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported: kernels run on a CPU then

from support.tiny_translation_model import write_tiny_model

from nmt.translation.translator import Translator

# Those that take longest, the longest first: if one came last, one process would work and the other wait.
LONGEST_FIRST = [
    "test_batch_invariance.py",
    "test_survival.py",
    "test_compilation.py",
    "test_verify_scripts.py",
    "test_end_to_end.py",
    "test_signals.py",
    "test_machines.py",
    "test_fuzz_readers.py",
    "test_engine.py",
    "test_vision_training.py",
    "test_sharded.py",
    "test_gradient_contract.py",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files; the others keep their order."""
    assert all(Path(__file__).with_name(name).exists() for name in LONGEST_FIRST)
    places = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked `gpu` where there is none."""
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Let PyTorch compute on one thread: for small products it is the fastest, and test processes share cores."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def model(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small untrained model."""
    return write_tiny_model(tmp_path_factory.mktemp("run") / "model")


@pytest.fixture(scope="module")
def translator(model: Path) -> Translator:
    """Return this model, ready for text."""
    return Translator.load(model)


@pytest.fixture
def points_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install the task of `support/toy_task.py` under the name `points`, as a stranger's package would be."""
    metadata = tmp_path / "plugin" / "points_plugin-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: points-plugin\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[nmt.tasks]\npoints = support.toy_task:PointOptions\n")
    monkeypatch.syspath_prepend(metadata.parent)
