"""What many tests share."""

from pathlib import Path

import pytest


@pytest.fixture
def points_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install the task of `toy_task.py` under the name `points`, as a stranger's package would be."""
    metadata = tmp_path / "plugin" / "points_plugin-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: points-plugin\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[nmt.tasks]\npoints = toy_task:PointOptions\n")
    monkeypatch.syspath_prepend(metadata.parent)
