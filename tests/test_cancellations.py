"""Cancelled updates are known one update later, on all ranks, with the examples that are to blame."""

import json
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from toy_task import PointExamples, Points, PointTask

from nmt.cancellations import Cancelled
from nmt.data.batch_iterator import MicroBatch
from nmt.distributed import World, single
from nmt.options import OptimizationOptions
from nmt.trainer import Trainer

OPTIONS = OptimizationOptions(warmup_updates=0, lr=0.1)


def make_trainer(world: World) -> Trainer:
    torch.manual_seed(1)
    task = PointTask()
    return Trainer(task, task.build_model(), OPTIONS, world=world, seed=1, updates_per_epoch=1)


def batch(first: int, *, bad: bool = False) -> MicroBatch:
    examples = PointExamples(100, seed=1)
    indices = list(range(first, first + 4))
    points = examples.collate([examples[index] for index in indices])
    return MicroBatch(Points(points.xy * (torch.nan if bad else 1.0), points.label), 1.0, indices)


def test_what_is_found_comes_with_the_next_update_and_names_the_bad_micro_batch() -> None:
    trainer = make_trainer(single(torch.device("cpu")))
    trainer.train_step([batch(0), batch(10, bad=True)])
    assert trainer.cancellations.take() == []
    trainer.train_step([batch(20)])
    assert trainer.cancellations.take() == [Cancelled(update=1, examples=[10, 11, 12, 13])]
    assert trainer.cancellations.known_in_a_row() == 1
    assert trainer.cancellations.num_in_a_row() == 0  # of the last update, which was made


def test_a_run_of_bad_updates_is_counted_through_a_resume() -> None:
    trainer = make_trainer(single(torch.device("cpu")))
    trainer.train_step([batch(0, bad=True)])
    trainer.train_step([batch(0, bad=True)])
    tensors, values = trainer.state_dict()
    resumed = make_trainer(single(torch.device("cpu")))
    resumed.load_state_dict(tensors, json.loads(json.dumps(values)))
    assert resumed.cancellations.known_in_a_row() == 2
    resumed.train_step([batch(0, bad=True)])
    assert resumed.cancellations.num_in_a_row() == 3


def train_on_two_ranks(world: World, folder: str) -> None:
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
