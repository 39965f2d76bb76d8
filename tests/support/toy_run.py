"""Runs of the toy task, and what they leave behind."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from nmt.checkpoints.run_folder import CheckpointFolder
from nmt.data.options import BatchingOptions
from nmt.options import CheckpointOptions, OptimizationOptions, TrainConfig
from nmt.run.run_log import TIMES
from support.toy_task import PointOptions

# 500 examples in batches of 32: 16 updates an epoch.
OPTIMIZATION = OptimizationOptions(lr=0.02, warmup_updates=5, max_update=100)


def config(folder: Path, **changes: Any) -> TrainConfig[PointOptions]:
    checkpoints = CheckpointOptions(**changes.pop("checkpoints", {}))
    optimization = replace(OPTIMIZATION, **changes.pop("optimization", {}))
    settings: dict[str, Any] = {"device": "cpu", "log_interval": 10, **changes}
    return TrainConfig(
        task="points",
        task_options=settings.pop("task_options", PointOptions()),
        save_dir=folder,
        batching=settings.pop("batching", BatchingOptions(max_tokens=None, batch_size=32)),
        optimization=optimization,
        checkpoints=checkpoints,
        **settings,
    )


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def log(folder: Path) -> str:
    return (folder / "train.log").read_text()


def tensors(folder: Path, update: int) -> dict[str, torch.Tensor]:
    path = CheckpointFolder(folder / "checkpoints").at(update)
    return {**load_file(path / "model.safetensors"), **load_file(path / "optimizer.safetensors")}


def assert_bit_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def without_time(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key not in TIMES} for record in found]
