"""The update: the same gradient and metrics however the batch is cut, and what is done with the gradient."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.pair_task import ALL, UNEVEN, PairTask, collate
from support.ranks import run_ranks
from support.toy_task import PointExamples, Points, PointTask
from torch import nn

from nmt.data.batch_iterator import MicroBatch
from nmt.distributed import World, single
from nmt.options import OptimizationOptions
from nmt.trainer import Stepped, Trainer

CPU = single(torch.device("cpu"))


class GradientTrainer(Trainer):
    """Keeps the gradient of the update instead of stepping."""

    def _apply_gradient(self, epoch: int) -> Stepped:
        self.gradient = {name: p.grad.clone() for name, p in self.model.named_parameters()}
        no = torch.tensor(False)
        return Stepped(torch.tensor(1.0), is_cancelled=no, can_lower_scale=no)


def gradient_of(micro_batches: list[tuple[list[int], float]], world: World) -> tuple[dict[str, Any], Any]:
    trainer = GradientTrainer(
        PairTask(), PairTask().build_model(), OptimizationOptions(), world=world, seed=1, updates_per_epoch=1
    )
    with trainer.metrics.scope("train"):
        trainer.train_step([MicroBatch(collate(indices), weight) for indices, weight in micro_batches])
    return trainer.gradient, trainer.metrics.sums("train", world)


def save_gradients(world: World, folder: str) -> None:
    for name, shares in SHARES.items():
        gradient, sums = gradient_of(shares[world.rank], world)
        torch.save(gradient, f"{folder}/{name} {world.rank}.pt")
        Path(f"{folder}/{name} {world.rank}.json").write_text(json.dumps(sums))


@pytest.fixture(scope="module")
def whole() -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The gradient of the mean over all target tokens, by plain autograd; and the sums by plain addition."""
    model = PairTask().build_model()
    batch = collate(ALL)
    output = PairTask().compute_loss(model, batch)
    (output.loss / batch.num_targets).backward()
    sums = {"loss": output.loss.item(), "nll": output.sums["nll"].item()}
    sums |= {"num_targets": batch.num_targets, "num_examples": 11}
    return {name: p.grad for name, p in model.named_parameters()}, sums


def assert_same(gradient: Any, sums: Any, whole: Any) -> None:
    assert gradient.keys() == whole[0].keys()
    for name, expected in whole[0].items():
        torch.testing.assert_close(gradient[name], expected, rtol=1e-12, atol=1e-13)
    assert sums == pytest.approx(whole[1], rel=1e-12)


def test_one_batch_and_four_micro_batches_have_the_gradient_of_the_mean(whole: Any) -> None:
    assert_same(*gradient_of([(ALL, 1.0)], CPU), whole)
    assert_same(*gradient_of([(indices, 1.0) for indices in UNEVEN], CPU), whole)


SHARES = {
    "uneven": [[(ALL[:3], 1.0)], [(ALL[3:], 1.0)]],
    # Three batches for two ranks with two micro-batches each: the second has a filler.
    "filler": [[(ALL[:1], 1.0), (ALL[6:], 1.0)], [(ALL[1:6], 1.0), (ALL[:1], 0.0)]],
    "nothing but a filler": [[(ALL, 1.0)], [(ALL[:2], 0.0)]],
}


def test_two_ranks_have_the_gradient_of_one(whole: Any, tmp_path: Path) -> None:
    run_ranks(save_gradients, str(tmp_path), size=2)
    for name in SHARES:
        for rank in range(2):
            gradient = torch.load(tmp_path / f"{name} {rank}.pt")
            sums = json.loads((tmp_path / f"{name} {rank}.json").read_text())
            assert_same(gradient, sums, whole)


def test_an_update_that_is_not_finite_changes_nothing_and_is_counted() -> None:
    task = PointTask()
    model = task.build_model()
    trainer = Trainer(
        task, model, OptimizationOptions(warmup_updates=0, lr=0.1), world=CPU, seed=1, updates_per_epoch=1
    )
    good = PointExamples(16, seed=1).collate(list(PointExamples(16, seed=1).xy))
    bad = Points(good.xy * torch.nan, good.label)
    with trainer.metrics.scope("train"):
        trainer.train_step([MicroBatch(good, 1.0)])
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        trainer.train_step([MicroBatch(bad, 1.0)])
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        sums = trainer.metrics.sums("train", CPU)
        # What was cancelled is in none of the sums: they are those of the good batch.
        assert sums["num_cancelled"] == 1 and sums["num_targets"] == 16 and 0 < sums["loss"] < 100
        trainer.train_step([MicroBatch(good, 1.0)])
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_first_adam_update_is_the_sign_of_the_gradient_and_clipping_reports_the_true_norm() -> None:
    """Adam's first step is lr * g / (|g| + eps): about lr, against the sign of the gradient."""
    task = PointTask()
    model = nn.Linear(2, 2).double()
    options = OptimizationOptions(warmup_updates=4, lr=0.4, clip_norm=1e-3)
    trainer = Trainer(task, model, options, world=CPU, seed=1, updates_per_epoch=1)
    xy = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64)
    batch = Points(xy, torch.tensor([0, 1]))
    before = model.weight.detach().clone()
    probabilities = model(xy).softmax(1).detach()
    logits_gradient = (probabilities - torch.eye(2, dtype=torch.float64)) / 2
    gradient = logits_gradient.t() @ xy
    norm = torch.cat([gradient.flatten(), logits_gradient.sum(0)]).norm()
    with trainer.metrics.scope("train"):
        trainer.train_step([MicroBatch(batch, 1.0)])
    step = before - model.weight.detach()
    # The rate of the first of four updates of warm-up is a quarter of 0.4.
    torch.testing.assert_close(step, 0.1 * gradient.sign(), rtol=1e-3, atol=0)
    gauges = trainer.metrics.gauges("train")
    assert gauges["lr"] == pytest.approx(0.1)
    assert gauges["grad"] == pytest.approx(norm.item())
