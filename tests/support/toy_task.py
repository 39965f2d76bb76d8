"""A third task in forty lines: points in the plane are above a line or below it; a model with batch norm."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from nmt.task import Illustrations, LossOutput


class Points(NamedTuple):
    xy: Tensor  # (B, 2)
    label: Tensor  # (B,)

    @property
    def num_examples(self) -> int:
        return len(self.label)

    num_targets = num_examples

    def to(self, device: torch.device) -> "Points":
        return Points(self.xy.to(device), self.label.to(device))


class PointExamples:
    def __init__(self, size: int, seed: int) -> None:
        self.xy = np.random.default_rng(seed).normal(size=(size, 2)).astype(np.float32)
        self.sizes = np.ones((size, 1), dtype=np.int32)

    def __len__(self) -> int:
        return len(self.xy)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.xy[index]

    def collate(self, items: list[np.ndarray]) -> Points:
        xy = torch.from_numpy(np.stack(items))
        return Points(xy, (xy[:, 0] > 2 * xy[:, 1]).long())


class PointTask:
    metrics = {"loss": "min", "accuracy": "max"}

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))

    def open_split(self, split: str) -> PointExamples:
        return PointExamples({"train": 500, "valid": 101}[split], seed=len(split))

    def compute_loss(self, model: nn.Module, batch: Points) -> LossOutput:
        scores = model(batch.xy)
        loss = nn.functional.cross_entropy(scores, batch.label, reduction="sum")
        return LossOutput(loss, {"correct": (scores.argmax(1) == batch.label).sum()})

    def summarize(self, sums: dict[str, float]) -> dict[str, float]:
        return {"loss": sums["loss"] / sums["num_targets"], "accuracy": sums["correct"] / sums["num_targets"]}

    def evaluate(self, model: nn.Module, examples: PointExamples, world: Any) -> dict[str, float]:
        return {}

    def illustrate(self, model: nn.Module, examples: PointExamples, world: Any) -> Illustrations:
        plane = np.zeros((4, 6, 3), dtype=np.uint8)
        plane[:2] = 255
        return Illustrations(texts={"classes": "below, *above*"}, images={"plane": plane})

    def save_assets(self, folder: Path) -> None:
        (folder / "classes.txt").write_text("below\nabove\n")


@dataclass(frozen=True)
class PointOptions:
    slope: float = field(default=2.0, metadata={"fixed": True})

    def build(self, assets: Path | None) -> PointTask:
        return PointTask()
