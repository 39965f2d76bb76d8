"""What becomes of the sums of a loss: ratios by the task, and means of those that it does not look at."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.toy_run import config, records
from support.toy_task import PointOptions, Points, PointTask
from torch import nn

from nmt.task import LossOutput
from nmt.train_loop import train
from nmt.update.summary import summarize

NUMBERS = st.floats(-1e6, 1e6)


class SummingTask(PointTask):
    """Two more sums, one of which it makes a ratio of in some way of its own."""

    def compute_loss(self, model: nn.Module, batch: Points) -> LossOutput:
        output = super().compute_loss(model, batch)
        above = batch.label.sum()
        return LossOutput(
            output.loss, {**output.sums, "above": above, "weight": torch.tensor(3.0) * len(batch.xy)}
        )

    def summarize(self, sums: Mapping[str, float]) -> dict[str, float]:
        return {**super().summarize(sums), "share below": 1 - sums.get("above", 0.0) / sums["num_examples"]}


@dataclass(frozen=True)
class SummingOptions(PointOptions):
    def build(self, assets: Path | None) -> PointTask:
        return SummingTask()


@pytest.mark.usefixtures("points_plugin")
def test_a_sum_that_the_task_does_not_look_at_is_reported_as_a_mean_over_the_targets(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(config(folder, task_options=SummingOptions(), optimization={"max_update": 20}))
    for kind in ("train", "epoch", "valid"):
        for record in records(folder, kind):
            assert record["weight"] == 3.0
            assert "above" not in record and 0 < record["share below"] < 1
            assert not record.keys() & {"num_targets", "num_examples", "num_cancelled", "correct"}


class ReadingTask(PointTask):
    """Reads some sums, in one of several ways."""

    def __init__(self, names: set[str], way: str) -> None:
        self.names, self.way = names, way

    def summarize(self, sums: Mapping[str, float]) -> dict[str, float]:
        if self.way == "item":
            return {f"of {name}": sums[name] for name in self.names if name in sums}
        if self.way == "get":
            return {f"of {name}": sums.get(name, 0.0) for name in self.names}
        return {f"of {name}": value for name, value in sums.items()}


SUMS = st.dictionaries(st.sampled_from(["loss", "nll", "kl", "x"]), NUMBERS)


@given(SUMS, st.sets(st.sampled_from(["loss", "nll", "kl", "x"])), st.sampled_from(["item", "get", "all"]))
def test_each_sum_is_reported_once(sums: dict[str, float], read: set[str], way: str) -> None:
    counts: dict[str, float] = {"num_targets": 4.0, "num_examples": 2.0, "num_cancelled": 1.0}
    found: dict[str, Any] = summarize(ReadingTask(read, way), {**sums, **counts})
    seen = set(sums) if way == "all" else read
    for name, value in sums.items():
        if name in seen:
            assert found[f"of {name}"] == value and name not in found
        else:
            assert found[name] == value / 4.0
    assert not found.keys() & counts.keys()
