"""Cancelled updates are known one update later, on all ranks, with the examples that are to blame."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from support.ranks import run_ranks
from support.toy_task import PointExamples, Points, PointTask
from torch import nn

from nmt.data.batch_iterator import MicroBatch
from nmt.distributed import World, single
from nmt.options import OptimizationOptions
from nmt.task import LossOutput
from nmt.trainer import Trainer
from nmt.update.cancellations import Cancelled

Precision = Literal["fp32", "bf16", "fp16"]
CPU = single(torch.device("cpu"))
OPTIONS = OptimizationOptions(warmup_updates=0, lr=0.1)


def make_trainer(world: World, *, precision: Precision = "fp32", scale: float = 1.0) -> Trainer:
    torch.manual_seed(1)
    task, options = PointTask(), replace(OPTIONS, precision=precision)
    trainer = Trainer(task, task.build_model(), options, world=world, seed=1, updates_per_epoch=1)
    trainer.precision.load_state_dict({"scale": scale, "num_good": 0})
    return trainer


def batch(first: int, *, bad: bool = False) -> MicroBatch:
    examples = PointExamples(100, seed=1)
    indices = list(range(first, first + 4))
    points = examples.collate([examples[index] for index in indices])
    return MicroBatch(Points(points.xy * (torch.nan if bad else 1.0), points.label), 1.0, indices)


def test_what_is_found_comes_with_the_next_update_and_names_the_bad_micro_batch() -> None:
    trainer = make_trainer(CPU)
    trainer.train_step([batch(0), batch(10, bad=True)])
    assert trainer.cancellations.take() == []
    trainer.train_step([batch(20)])
    assert trainer.cancellations.take() == [Cancelled(update=1, examples=[10, 11, 12, 13])]
    assert trainer.cancellations.known_in_a_row() == 1
    assert trainer.cancellations.num_in_a_row() == 0  # of the last update, which was made


def test_a_run_of_bad_updates_is_counted_through_a_resume() -> None:
    trainer = make_trainer(CPU)
    trainer.train_step([batch(0, bad=True)])
    trainer.train_step([batch(0, bad=True)])
    tensors, values = trainer.state_dict()
    resumed = make_trainer(CPU)
    resumed.load_state_dict(tensors, json.loads(json.dumps(values)))
    assert resumed.cancellations.known_in_a_row() == 2
    resumed.train_step([batch(0, bad=True)])
    assert resumed.cancellations.num_in_a_row() == 3


def test_an_overflow_in_fp16_lowers_the_scale_and_is_not_counted_among_the_bad() -> None:
    trainer = make_trainer(CPU, precision="fp16", scale=2.0**40)
    for _ in range(5):
        trainer.train_step([batch(0)])
    assert trainer.cancellations.num_in_a_row() == 0
    assert trainer.cancellations.take() == [
        Cancelled(update, [0, 1, 2, 3], is_overflow=True) for update in (1, 2, 3, 4, 5)
    ]
    assert trainer.precision.state_dict() == {"scale": 2.0**35, "num_good": 0}


def test_an_overflow_neither_counts_nor_ends_a_row_of_bad_updates() -> None:
    trainer = make_trainer(CPU, precision="fp16", scale=2.0**40)
    for is_bad in (True, False, True):
        trainer.train_step([batch(0, bad=is_bad)])
    assert trainer.cancellations.num_in_a_row() == 2
    assert [cancelled.is_overflow for cancelled in trainer.cancellations.take()] == [False, True, False]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_loss_that_is_not_finite_is_bad_at_any_scale(precision: Precision) -> None:
    trainer = make_trainer(CPU, precision=precision, scale=2.0**10)
    trainer.train_step([batch(0, bad=True)])
    assert trainer.cancellations.num_in_a_row() == 1
    assert not trainer.cancellations.take()[0].is_overflow


def test_a_gradient_that_overflows_at_the_lowest_scale_is_bad() -> None:
    class SteepTask(PointTask):
        def compute_loss(self, model: nn.Module, batch: Points) -> LossOutput:
            output = super().compute_loss(model, batch)
            return LossOutput(output.loss * 1e9, output.sums)

    trainer = make_trainer(CPU, precision="fp16", scale=4.0)
    trainer.replicas.objective.objective.task = SteepTask()
    for _ in range(4):
        trainer.train_step([batch(0)])
    # At 4 and at 2 the scale could still be lowered; at 1 it stays.
    assert trainer.cancellations.num_in_a_row() == 2
    assert [cancelled.is_overflow for cancelled in trainer.cancellations.take()] == [True, True, False, False]
    assert trainer.precision.state_dict() == {"scale": 1.0, "num_good": 0}


def train_on_two_ranks(world: World, folder: str) -> None:
    in_float16 = make_trainer(world, precision="fp16", scale=2.0**40)
    in_float16.train_step([batch(40 * world.rank)])
    in_float16.train_step([batch(40 * world.rank, bad=world.rank == 1)])
    num_bad, (first, second) = in_float16.cancellations.num_in_a_row(), in_float16.cancellations.take()
    assert num_bad == 1 and first.is_overflow and not second.is_overflow

    trainer = make_trainer(world)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    statistics = [value.clone() for value in trainer.statistics]
    trainer.train_step([batch(40 * world.rank, bad=world.rank == 1)])
    same = all(map(torch.equal, before, trainer.model.parameters()))
    same_statistics = all(map(torch.equal, statistics, trainer.statistics))
    trainer.train_step([batch(0)])
    found = [[cancelled.update, cancelled.examples] for cancelled in trainer.cancellations.take()]
    moved = not any(map(torch.equal, before, trainer.model.parameters()))
    record = {"same": same, "same_statistics": same_statistics, "found": found, "moved": moved}
    Path(f"{folder}/{world.rank}.json").write_text(json.dumps(record))


@pytest.mark.timeout(120)
def test_one_bad_rank_cancels_the_update_of_all_and_is_named_by_all(tmp_path: Path) -> None:
    run_ranks(train_on_two_ranks, str(tmp_path), size=2)
    for rank in range(2):
        record = json.loads((tmp_path / f"{rank}.json").read_text())
        # Batch norm's statistics are as they were too: those of the bad batch are not numbers.
        assert record["same"] and record["same_statistics"] and record["moved"]
        assert record["found"] == [[1, [40, 41, 42, 43]]]
