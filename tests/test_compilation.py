"""Compiled updates: the same numbers within rounding, the same names, and a line where there is no compiler."""

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.image_files import write_folders
from support.pair_task import PAD, SIZES, PairTask, collate
from support.ranks import run_ranks
from torch import Tensor, nn

from nmt.checkpoints.weights import weights
from nmt.data.batch_iterator import MicroBatch
from nmt.data.options import BatchingOptions
from nmt.distributed import World, single
from nmt.errors import UserError
from nmt.models.transformer import Transformer
from nmt.options import CheckpointOptions, OptimizationOptions, TrainConfig
from nmt.train_loop import train
from nmt.trainer import Stepped, Trainer
from nmt.update.compilation import compile_failures, compile_model, uncompiled
from nmt.vision.options import ImageClassificationOptions

# torch's compiler uses what torch warns of, and hides that from those who have not made warnings errors.
pytestmark = pytest.mark.filterwarnings("ignore")

CPU = single(torch.device("cpu"))
# Batches whose numbers of sentences and lengths all differ, the first and the last of one shape.
CUTS = [[0, 1, 2], [3, 4, 5, 6], [7, 8], [9, 10, 2, 4, 6], [0, 1, 2]]


@pytest.fixture(autouse=True)
def _without_trace() -> Iterator[None]:
    """Keep pytest from collecting the compiler's trace, which makes it slow."""
    logger = logging.getLogger("torch.__trace")
    was_disabled, logger.disabled = logger.disabled, True
    yield
    logger.disabled = was_disabled


class WiderTask(PairTask):
    """The translation loss in float32, of a model of some depth, with or without what `changes` says."""

    def __init__(self, **changes: Any) -> None:
        self.options = replace(SIZES, encoder_layers=2, encoder_embed_dim=16, decoder_embed_dim=16, **changes)

    def build_model(self) -> nn.Module:
        torch.manual_seed(3)
        return Transformer(self.options, source_vocabulary_size=15, target_vocabulary_size=15, pad_id=PAD)


class GradientTrainer(Trainer):
    """Keeps the gradient of the update, as the optimizer gets it, and makes none."""

    def _apply_gradient(self, epoch: int) -> Stepped:
        parameters = dict(self.model.named_parameters())
        self.precision.unscale_([p.grad for p in parameters.values()])
        self.gradient = {name: p.grad.clone() for name, p in parameters.items()}
        self.optimizer.zero_grad()
        no = torch.tensor(False)
        return Stepped(torch.tensor(1.0), is_cancelled=no, can_lower_scale=no)


def make_trainer(task: Any, *, is_compiled: bool, world: World = CPU, precision: Any = "fp32") -> Any:
    model = task.build_model()
    if is_compiled:
        compile_model(model, has_one_shape=False)
    options = OptimizationOptions(precision=precision, compile=is_compiled)
    return GradientTrainer(task, model, options, world=world, seed=1, updates_per_epoch=1)


def gradients(trainer: Any, cuts: list[list[int]] = CUTS) -> list[dict[str, Tensor]]:
    found = []
    for indices in cuts:
        trainer.train_step([MicroBatch(collate(indices), 1.0, indices)])
        found.append(trainer.gradient)
    return found


def relative_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    difference = sum((found[name] - expected[name]).square().sum() for name in expected)
    return float((difference / sum(each.square().sum() for each in expected.values())).sqrt())


@pytest.mark.slow
def test_a_compiled_transformer_has_the_gradient_of_the_plain_one_for_batches_of_all_shapes() -> None:
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    found = gradients(make_trainer(WiderTask(), is_compiled=True))
    for gradient, expected in zip(
        found, gradients(make_trainer(WiderTask(), is_compiled=False)), strict=True
    ):
        assert relative_error(gradient, expected) < 1e-5
    assert all(torch.equal(found[0][name], found[-1][name]) for name in found[0])
    # One program, from which nothing sends torch back to Python; torch may make it once more where two sizes of
    # the first batch were equal by chance.
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] <= 2


@pytest.mark.slow
def test_a_compiled_transformer_computes_in_bfloat16_and_its_layers_twice() -> None:
    """As far from the plain one as two orders of rounding may be: see test_precision.py."""
    torch._dynamo.reset()
    task = WiderTask(activation_checkpointing=True)
    (found,) = gradients(make_trainer(task, is_compiled=True, precision="bf16"), CUTS[:1])
    (expected,) = gradients(make_trainer(task, is_compiled=False, precision="bf16"), CUTS[:1])
    assert 0 < relative_error(found, expected) < 18 * 2**-8


@pytest.mark.slow
def test_the_masks_of_a_compiled_update_are_those_of_its_seed() -> None:
    torch._dynamo.reset()
    trainer = make_trainer(WiderTask(dropout=0.3, attention_dropout=0.3), is_compiled=True)
    first, again = gradients(trainer, [CUTS[0], CUTS[0]])
    assert all(torch.equal(first[name], again[name]) for name in first)
    trainer.update += 1
    (other,) = gradients(trainer, CUTS[:1])
    assert relative_error(other, first) > 0.1


def save_gradients(world: World, folder: str) -> None:
    task = WiderTask()
    trainer = make_trainer(task, is_compiled=True, world=world)
    shares = [[0, 1, 2], [3, 4]] if world.is_main else [[5, 6], [7, 8, 9]]
    trainer.train_step([MicroBatch(collate(indices), 1.0, indices) for indices in shares])
    torch.save(trainer.gradient, f"{folder}/{world.rank}.pt")


@pytest.mark.slow
def test_two_compiled_ranks_have_the_gradient_of_a_plain_one(tmp_path: Path) -> None:
    run_ranks(save_gradients, str(tmp_path), size=2)
    (expected,) = gradients(make_trainer(WiderTask(), is_compiled=False), [list(range(10))])
    for rank in range(2):
        assert relative_error(torch.load(tmp_path / f"{rank}.pt"), expected) < 1e-5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_run_on_images_is_the_same_compiled_or_not_and_one_goes_on_as_the_other(tmp_path: Path) -> None:
    torch._dynamo.reset()
    folders = {
        "train_dir": write_folders(tmp_path / "train", {"red": 8, "green": 6, "blue": 6}),
        "val_dir": write_folders(tmp_path / "val", {"red": 3, "green": 2, "blue": 2}),
    }

    def run(name: str, *, is_compiled: bool, max_update: int) -> None:
        train(
            TrainConfig(
                task="image_classification",
                task_options=ImageClassificationOptions(**folders, model="timm/test_byobnet", image_size=32),
                save_dir=tmp_path / name,
                batching=BatchingOptions(max_tokens=None, batch_size=8, required_batch_size_multiple=1),
                optimization=OptimizationOptions(
                    lr=1e-3, warmup_updates=0, max_update=max_update, ema_decay=0.9, compile=is_compiled
                ),
                checkpoints=CheckpointOptions(keep_last=9),
                device="cpu",
                log_interval=1,
            )
        )

    run("plain", is_compiled=False, max_update=6)
    run("compiled", is_compiled=True, max_update=4)
    run("compiled", is_compiled=False, max_update=6)

    def records(name: str) -> list[dict[str, Any]]:
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if record["kind"] == "train"]

    for found, expected in zip(records("compiled"), records("plain"), strict=True):
        assert found["update"] == expected["update"]
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3)
    for file in ("model", "optimizer"):
        paths = (
            tmp_path / name / "checkpoints" / "last" / f"{file}.safetensors" for name in ("compiled", "plain")
        )
        ours, theirs = map(load_file, paths)
        assert ours.keys() == theirs.keys()


@pytest.mark.slow
def test_a_missing_compiler_is_one_line(tmp_path: Path) -> None:
    """In a process of its own, since torch looks for a compiler once."""
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from support.toy_run import config
from nmt.cli.command import run_command
from nmt.train_loop import train
run_command("nmt-train", lambda: train(config(Path({str(tmp_path)!r}) / "run", optimization=dict(compile=True))))
"""
    environment = {
        "PATH": "/nonexistent",
        "CXX": "/nonexistent/c++",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
    }
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    *table, line = done.stderr.splitlines()  # the run has told by then what it is going to be
    assert line.startswith("nmt-train: error: `compile` must have a C++ compiler (g++, clang++, ")
    assert not any("error" in row.lower() or "Traceback" in row for row in table)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_what_torch_says_when_it_cannot_compile_is_one_line_and_other_errors_pass() -> None:
    failure = torch._dynamo.exc.InternalTorchDynamoError("this is\n\nmore than a line")
    line = r"^`compile` must be off .* it says: this is\. Leave it out\.$"
    with pytest.raises(UserError, match=line), compile_failures(True):
        raise failure
    with pytest.raises(torch._dynamo.exc.InternalTorchDynamoError), compile_failures(False):
        raise failure
    with pytest.raises(RuntimeError, match="size of tensor"), compile_failures(True):
        torch.zeros(2) + torch.zeros(3)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is compiled, whether for all shapes, and each call of it; it computes as it is."""
    found: list[Any] = []

    def compile_(function: Callable[..., Any], *, dynamic: bool) -> Callable[..., Any]:
        name = type(function.__self__).__name__  # type: ignore[attr-defined]
        found.append(f"{name} {'for all shapes' if dynamic else 'for each shape'}")

        def compiled(*args: Any, **kwargs: Any) -> Any:
            found.append(name)
            return function(*args, **kwargs)

        return compiled

    monkeypatch.setattr(torch, "compile", compile_)
    return found


def test_a_translation_model_is_compiled_for_updates_alone(calls: list[Any]) -> None:
    task = WiderTask()
    plain, model = task.build_model(), task.build_model()
    compile_model(model, has_one_shape=False)
    assert calls == ["Transformer for all shapes"]
    assert weights(model).keys() == weights(plain).keys()
    calls.clear()
    model.train()
    assert isinstance(model, Transformer)
    loss = task.compute_loss(model, collate([0, 1])).loss
    assert calls == ["Transformer"]
    assert torch.equal(loss, task.compute_loss(plain, collate([0, 1])).loss)
    calls.clear()
    model.eval()
    task.compute_loss(model, collate([0, 1]))
    model.train()
    with torch.no_grad():
        task.compute_loss(model, collate([0, 1]))
    assert calls == []


def test_the_hooks_of_a_compiled_model_stay_outside(calls: list[Any]) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    compile_model(model, has_one_shape=True)
    assert calls == ["Sequential for each shape"]
    model.register_forward_pre_hook(lambda module, args: calls.append("hook"))
    model(torch.ones(1, 2))
    assert calls[1:] == ["hook", "Sequential"]


@pytest.mark.slow
def test_what_is_to_be_observed_can_be_called_uncompiled() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(2, 3))
    compile_model(model, has_one_shape=True)
    torch._dynamo.utils.counters.clear()
    with uncompiled():
        model(torch.ones(4, 2))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
    model(torch.ones(4, 2))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
