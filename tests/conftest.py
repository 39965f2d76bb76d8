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
def translator(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Translator:
    """Return the small untrained model, ready for text."""
    return Translator.load(write_tiny_model(tmp_path_factory.mktemp("run") / "model"))


@pytest.fixture
def points_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install the task of `support/toy_task.py` under the name `points`, as a stranger's package would be."""
    metadata = tmp_path / "plugin" / "points_plugin-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: points-plugin\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[nmt.tasks]\npoints = support.toy_task:PointOptions\n")
    monkeypatch.syspath_prepend(metadata.parent)
