"""Updates in low precision: float32 parameters and sums, the loss scale of float16, any task."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.pair_task import ALL, SIZES, UNEVEN, PairTask, collate
from support.ranks import run_ranks
from support.toy_run import config, log, records
from support.toy_task import PointExamples, PointOptions, Points, PointTask
from torch import Tensor, nn

from nmt.data.batch_iterator import MicroBatch
from nmt.distributed import World, single
from nmt.models.transformer import Transformer
from nmt.options import OptimizationOptions
from nmt.task import LossOutput
from nmt.train_loop import train
from nmt.trainer import Stepped, Trainer
from nmt.update.precision import Precision

CPU = single(torch.device("cpu"))
LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}
ROUNDING = {"bf16": 2**-8, "fp16": 2**-11}


def points(size: int = 32) -> Points:
    examples = PointExamples(size, seed=1)
    return examples.collate(list(examples.xy))


class SingleTask(PairTask):
    """Translation in float32."""

    def build_model(self) -> nn.Module:
        return super().build_model().float()


class GradientTrainer(Trainer):
    """Keeps the gradient of the update, as the optimizer gets it."""

    def _apply_gradient(self, epoch: int) -> Stepped:
        parameters = dict(self.model.named_parameters())
        self.precision.unscale_([p.grad for p in parameters.values()])
        self.gradient = {name: p.grad.clone() for name, p in parameters.items()}
        no = torch.tensor(False)
        return Stepped(torch.tensor(1.0), is_cancelled=no, can_lower_scale=no)


def gradients(
    precision: str, micro_batches: list[tuple[list[int], float]], world: World = CPU
) -> dict[str, Tensor]:
    task = SingleTask()
    options = OptimizationOptions(precision=precision)
    trainer = GradientTrainer(task, task.build_model(), options, world=world, seed=1, updates_per_epoch=1)
    trainer.train_step([MicroBatch(collate(indices), weight) for indices, weight in micro_batches])
    return trainer.gradient


def off_by(gradient: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    difference = sum((gradient[name] - expected[name]).square().sum() for name in expected)
    return (difference / sum(each.square().sum() for each in expected.values())).sqrt().item()


@pytest.mark.parametrize("precision", LOW)
def test_the_gradient_is_float32s_but_for_roundings_on_the_way(precision: str) -> None:
    """About 40 roundings lie between the embeddings of the source and the loss, and as many on the way back.

    They add up as independent errors do: sqrt(80) roundings; twice that is allowed.
    """
    gradient = gradients(precision, [(ALL, 1.0)])
    assert all(each.dtype == torch.float32 for each in gradient.values())
    assert 0 < off_by(gradient, gradients("fp32", [(ALL, 1.0)])) < 18 * ROUNDING[precision]


@pytest.mark.parametrize("precision", LOW)
def test_micro_batches_add_up_in_float32(precision: str) -> None:
    """The sum is exactly that of the micro-batches' own gradients, formed in float32."""
    total = gradients(precision, [(indices, 1.0) for indices in UNEVEN])
    task, num_targets = SingleTask(), collate(ALL).num_targets
    model = task.build_model()
    wrapped = Precision(precision, CPU.device).wrap(Objective(task, model), model)
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    factor = Precision(precision, CPU.device).scale(torch.tensor(1.0)) / num_targets
    for indices in UNEVEN:
        model.zero_grad()
        (wrapped(collate(indices)).loss * factor).backward()
        for name, p in model.named_parameters():
            assert p.grad is not None
            expected[name] += p.grad
    unscale = Precision(precision, CPU.device).scale(torch.tensor(1.0)).item()
    for name, each in expected.items():
        torch.testing.assert_close(total[name], each / unscale, rtol=1e-6, atol=1e-9)


class Objective(nn.Module):
    def __init__(self, task: Any, model: nn.Module) -> None:
        super().__init__()
        self.task, self.model = task, model

    def forward(self, batch: Any) -> LossOutput:
        return self.task.compute_loss(self.model, batch)


SHARES = [[(ALL[:1], 1.0), (ALL[6:], 1.0)], [(ALL[1:6], 1.0), (ALL[:1], 0.0)]]


def save_gradients(world: World, folder: str) -> None:
    for precision in LOW:
        torch.save(gradients(precision, SHARES[world.rank], world), f"{folder}/{precision} {world.rank}.pt")


@pytest.mark.usefixtures("one_thread")  # as each rank has: products in bfloat16 depend on it
def test_two_ranks_have_the_gradient_of_one_in_low_precision(tmp_path: Path) -> None:
    run_ranks(save_gradients, str(tmp_path), size=2)
    for precision in LOW:
        expected = gradients(precision, [share for shares in SHARES for share in shares])
        for rank in range(2):
            gradient = torch.load(tmp_path / f"{precision} {rank}.pt")
            for name, each in expected.items():  # sums of the same numbers in another order
                torch.testing.assert_close(gradient[name], each, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("precision", LOW)
def test_a_task_with_batch_norm_learns_and_its_statistics_and_loss_are_in_float32(precision: str) -> None:
    task = PointTask()
    torch.manual_seed(1)
    model = task.build_model()
    seen: list[torch.dtype] = []
    model[0].register_forward_hook(lambda _, args, output: seen.extend([args[0].dtype, output.dtype]))
    model[1].register_forward_hook(lambda module, *_: seen.append(module.weight.dtype))
    options = OptimizationOptions(precision=precision, warmup_updates=0, lr=0.05)
    trainer = Trainer(task, model, options, world=CPU, seed=1, updates_per_epoch=1)
    losses = []
    for _ in range(60):
        with trainer.metrics.scope("train"):
            trainer.train_step([MicroBatch(points(), 1.0)])
        losses.append(trainer.metrics.sums("train", CPU)["loss"])
        trainer.metrics.reset("train")
    assert seen[:3] == [LOW[precision], LOW[precision], torch.float32]
    assert losses[-1] < 0.3 * losses[0]
    output = trainer.replicas.objective(points())
    assert output.loss.dtype == torch.float32
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in model.state_dict().values())
    # Validation computes with the parameters themselves: what is measured is what is saved.
    seen.clear()
    trainer.validate(PointExamples(32, seed=1), [points()])
    assert set(seen) == {torch.float32}


def fp16_trainer(scale: float | None = None) -> Trainer:
    task = PointTask()
    torch.manual_seed(1)
    options = OptimizationOptions(precision="fp16", warmup_updates=0, lr=0.01)
    trainer = Trainer(task, task.build_model(), options, world=CPU, seed=1, updates_per_epoch=1)
    if scale is not None:
        trainer.precision.load_state_dict({"scale": scale, "num_good": 0})
    return trainer


def test_a_run_whose_scale_begins_too_high_comes_down_and_is_never_taken_back(tmp_path: Path) -> None:
    """The first scale, 2**16, times the gradient is made to overflow by a loss 256 times as large."""

    class LoudTask(PointTask):
        def compute_loss(self, model: nn.Module, batch: Points) -> LossOutput:
            output = super().compute_loss(model, batch)
            return LossOutput(output.loss * 2.0**8, output.sums)

    @dataclass(frozen=True)
    class LoudOptions(PointOptions):
        def build(self, assets: Path | None) -> PointTask:
            return LoudTask()

    train(
        config(
            tmp_path / "run",
            task_options=LoudOptions(),
            optimization={"precision": "fp16", "max_bad_updates": 2, "max_update": 30, "clip_norm": 1.0},
        )
    )
    said = log(tmp_path / "run")
    assert said.count("cancelled: an overflow in fp16; the loss scale is halved") > 2
    assert records(tmp_path / "run", "back") == []
    assert records(tmp_path / "run", "valid")[-1]["update"] == 30


def test_a_scale_that_overflows_cancels_the_update_and_is_halved() -> None:
    trainer = fp16_trainer(scale=2.0**40)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    with trainer.metrics.scope("train"):
        trainer.train_step([MicroBatch(points(), 1.0)])
        assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
        assert trainer.precision.state_dict() == {"scale": 2.0**39, "num_good": 0}
        while trainer.precision.state_dict()["num_good"] < 1:
            trainer.train_step([MicroBatch(points(), 1.0)])
    assert any(not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    scale = trainer.precision.state_dict()["scale"]
    assert trainer.metrics.sums("train", CPU)["num_cancelled"] == 40 - torch.tensor(scale).log2().item()


def test_the_scale_is_doubled_after_two_thousand_good_updates() -> None:
    precision = Precision("fp16", CPU.device)
    precision.load_state_dict({"scale": 8.0, "num_good": 1998})
    precision.adapt_(torch.tensor(False))
    assert precision.state_dict() == {"scale": 8.0, "num_good": 1999}
    precision.adapt_(torch.tensor(False))
    assert precision.state_dict() == {"scale": 16.0, "num_good": 0}
    precision.adapt_(torch.tensor(True))
    assert precision.state_dict() == {"scale": 8.0, "num_good": 0}


def test_the_gradient_norm_and_the_step_do_not_depend_on_the_scale() -> None:
    results = []
    for scale in (2.0**4, 2.0**10):
        trainer = fp16_trainer(scale)
        with trainer.metrics.scope("train"):
            trainer.train_step([MicroBatch(points(), 1.0)])
        results.append(trainer.metrics.gauges("train")["grad"])
    # But for what is too small for float16 at the lower scale.
    assert results[0] == pytest.approx(results[1], rel=1e-3)


def test_a_resumed_run_in_float16_goes_on_with_its_scale() -> None:
    whole, parts = fp16_trainer(), fp16_trainer()
    for trainer in (whole, parts):
        trainer.precision.load_state_dict({"scale": 2.0**30, "num_good": 5})
        for _ in range(20):
            trainer.train_step([MicroBatch(points(), 1.0)])
    resumed = fp16_trainer()
    resumed.model.load_state_dict(parts.model.state_dict())
    resumed.load_state_dict(*parts.state_dict())
    for trainer in (whole, resumed):
        for _ in range(5):
            trainer.train_step([MicroBatch(points(), 1.0)])
    assert resumed.precision.state_dict() == whole.precision.state_dict() != {"scale": 2.0**30, "num_good": 5}
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_auto_is_float32_on_a_cpu_and_fp32_leaves_everything_alone() -> None:
    for name in ("auto", "fp32"):
        precision = Precision(name, CPU.device)
        objective = nn.Linear(1, 1)
        assert precision.wrap(objective, objective) is objective
        assert precision.dtype == torch.float32 and precision.state_dict() == {}
        factor = torch.tensor(3.0)
        assert precision.scale(factor) is factor


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["auto", "bf16", "fp16"])
def test_a_gpu_updates_in_low_precision(precision: str) -> None:
    world = single(torch.device("cuda"))
    task = SingleTask()
    options = OptimizationOptions(precision=precision, warmup_updates=0)
    trainer = Trainer(task, task.build_model(), options, world=world, seed=1, updates_per_epoch=1)
    with trainer.metrics.scope("train"):
        for _ in range(3):
            trainer.train_step([MicroBatch(collate(ALL), 1.0)])
    sums = trainer.metrics.sums("train", world)
    assert 0 < sums["loss"] / sums["num_targets"] < 4


@pytest.mark.parametrize("precision", ["fp32", *LOW])
def test_activation_checkpointing_changes_no_bit_of_the_gradient(precision: str) -> None:
    """Dropout is on: the masks of the second computation are those of the first."""
    found = []
    for activation_checkpointing in (False, True):

        class DroppingTask(PairTask):
            def build_model(self) -> nn.Module:
                torch.manual_seed(3)
                sizes = replace(
                    SIZES,
                    dropout=0.3,
                    attention_dropout=0.2,
                    activation_checkpointing=activation_checkpointing,  # noqa: B023
                )
                return Transformer(sizes, source_vocabulary_size=15, target_vocabulary_size=15, pad_id=1)

        task = DroppingTask()
        options = OptimizationOptions(precision=precision)
        trainer = GradientTrainer(task, task.build_model(), options, world=CPU, seed=1, updates_per_epoch=1)
        trainer.train_step([MicroBatch(collate(ALL), 1.0)])
        found.append(trainer.gradient)
    assert [name for name in found[0] if not torch.equal(found[0][name], found[1][name])] == []


def test_activation_checkpointing_keeps_the_inputs_of_layers_alone() -> None:
    kept = []
    for activation_checkpointing in (False, True):
        sizes = replace(SIZES, activation_checkpointing=activation_checkpointing)
        model = Transformer(sizes, source_vocabulary_size=15, target_vocabulary_size=15, pad_id=1)
        num_elements = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal num_elements
            num_elements += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            PairTask().compute_loss(model, collate(ALL))
        kept.append(num_elements)
    assert kept[1] < 0.6 * kept[0]
