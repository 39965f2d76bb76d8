"""Sharded weights: the same updates, states and model folders as whole ones, on real ranks over Gloo.

That the gradient is exact is in `test_gradient_contract.py`.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from support.image_files import write_folders
from support.random_transformer import VOCABULARY_SIZE, random_transformer
from support.ranks import run_ranks
from support.tiny_translation_model import WORDS
from support.toy_run import assert_bit_equal, config, log, records, tensors, without_time
from torch import Tensor, nn

from nmt.checkpoints.model_folder import load_model
from nmt.data.batch_iterator import MicroBatch
from nmt.data.options import PreprocessOptions
from nmt.data.parallel_dataset import TranslationBatch, collate_pairs
from nmt.data.preprocess import preprocess
from nmt.data.vocabulary import EOS_ID
from nmt.distributed import World, single
from nmt.errors import UserError
from nmt.options import OptimizationOptions, TrainConfig, train_config
from nmt.run.memory_probe import find_split
from nmt.run.packing import notes_on_padding, packing
from nmt.task import LossOutput
from nmt.train_loop import train
from nmt.trainer import Trainer
from nmt.translation.loss import translation_loss
from nmt.translation.r_drop import r_drop_loss
from nmt.update.sharded import parts

CPU, GPU = torch.device("cpu"), torch.device("cuda")
State = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]


class PairTask:
    """A loss of translation without anything around it."""

    metrics = {"loss": "min"}

    def __init__(
        self, *, loss: Callable[..., LossOutput], dtype: torch.dtype = torch.float64, dropout: float = 0.0
    ) -> None:
        self.loss, self.dtype, self.dropout = loss, dtype, dropout

    def build_model(self) -> nn.Module:
        """Make a model of two layers a side. Of a parameter of two rows the last of three ranks has none."""
        model = random_transformer(7, self.dtype)
        model.scale = nn.Parameter(torch.ones(2, dtype=self.dtype))
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = self.dropout
        return model

    def compute_loss(self, model: Any, batch: TranslationBatch) -> LossOutput:
        output = self.loss(model, batch)
        return LossOutput(output.loss * model.scale.mean(), output.sums)

    def summarize(self, sums: dict[str, float]) -> dict[str, float]:
        return {"loss": sums["loss"] / sums["num_targets"]}

    def evaluate(self, model: nn.Module, examples: Any, world: World) -> dict[str, float]:
        return {}


PLAIN = PairTask(loss=partial(translation_loss, label_smoothing=0.1))


def micro_batch(seed: int, *, weight: float = 1.0) -> MicroBatch:
    random = np.random.default_rng(seed)
    sides = random.integers(1, 9, size=(int(random.integers(1, 6)), 2))
    pairs = [tuple(np.append(random.integers(4, VOCABULARY_SIZE, n), EOS_ID) for n in row) for row in sides]
    batch: TranslationBatch = collate_pairs(pairs)  # type: ignore[arg-type]
    return MicroBatch(batch, weight, list(range(seed, seed + len(pairs))))


def make_trainer(world: World, task: PairTask = PLAIN, *, is_sharded: bool, **options: Any) -> Trainer:
    given = {"lr": 0.01, "warmup_updates": 0, "clip_norm": 1.0, "adam_eps": 1e-6, **options}
    optimization = OptimizationOptions(shard_weights=is_sharded, **given)
    return Trainer(task, task.build_model(), optimization, world=world, seed=1, updates_per_epoch=1)


def make_updates(trainer: Trainer, numbers: range) -> None:
    for number in numbers:
        rank = trainer.world.rank
        trainer.train_step([micro_batch(100 * number + 10 * rank + i) for i in range(2)])


def state_of(trainer: Trainer) -> State:
    """What a checkpoint would hold, on every rank."""
    with trainer.evaluated_weights():
        optimizer, values = trainer.state_dict()
        return trainer.world.broadcast((copies(trainer.whole_weights()), copies(optimizer), values))


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def take_up(trainer: Trainer, state: State) -> Trainer:
    weights, optimizer, values = state
    with patch("nmt.trainer.read_weights", lambda *_: weights):
        trainer.load_weights(Path())
    trainer.load_state_dict(copies(optimizer), values)
    return trainer


def assert_close(one: State, other: State) -> None:
    for found, expected in zip(one[:2], other[:2], strict=True):
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-9, atol=1e-9, msg=name)


def check_states(world: World, folder: str) -> None:
    """A state is taken up bit for bit by replicas of either kind, and both go on from it alike."""
    sharded = make_trainer(world, is_sharded=True, ema_decay=0.9)
    make_updates(sharded, range(3))
    state = state_of(sharded)
    other = take_up(make_trainer(world, is_sharded=False, ema_decay=0.9), state)
    again = take_up(make_trainer(world, is_sharded=True, ema_decay=0.9), state_of(other))
    for taken in (other, again):
        for found, expected in zip(state_of(taken)[:2], state[:2], strict=True):
            assert_bit_equal(found, expected)
    for trainer in (sharded, other, again):
        make_updates(trainer, range(3, 6))
    end = state_of(sharded)
    assert_bit_equal(state_of(again)[1], end[1])
    assert_close(state_of(other), end)
    if world.is_main:
        torch.save((state, end), folder)
    own = {name: len(parameter) for name, parameter in sharded.weights.trained.items()}
    assert own["scale"] == [1, 1, 0][world.rank] and own["output_weight"] == [5, 5, 4][world.rank]


def check_cancelled(world: World) -> None:
    """One bad rank cancels the update of all, and is named by all; nothing has changed."""
    trainer = make_trainer(world, is_sharded=True, ema_decay=0.9)
    make_updates(trainer, range(2))
    before = state_of(trainer)
    bad = PairTask(loss=lambda *given: LossOutput(PLAIN.loss(*given).loss * torch.nan, {}))
    with patch.object(trainer.replicas.objective.root.objective, "task", bad if world.rank == 1 else PLAIN):
        trainer.train_step([micro_batch(50 + 10 * world.rank)])
    after = state_of(trainer)
    for found, expected in zip(after[:2], before[:2], strict=True):
        assert_bit_equal(found, expected)
    assert trainer.cancellations.num_in_a_row() == 1
    (cancelled,) = trainer.cancellations.take()
    assert cancelled.update == 3 and min(cancelled.examples) == 60
    make_updates(trainer, range(1))
    assert trainer.cancellations.num_in_a_row() == 0
    assert not any(torch.equal(w, before[0][name]) for name, w in state_of(trainer)[0].items())


def check_losses(world: World) -> None:
    """What calls layers twice, and what computes in bfloat16, has the gradient that whole weights have.

    In bfloat16 the two round differently, since DDP divides by three, and here nothing is divided: as far from
    each other as two orders of rounding may be (see `test_precision.py`).
    """
    r_drop = PairTask(loss=partial(r_drop_loss, label_smoothing=0.1, alpha=5.0), dropout=0.1)
    found, expected = (gradient_of(world, r_drop, is_sharded=is_sharded) for is_sharded in (True, False))
    assert relative_error(found, expected) < 1e-12
    single_precision = PairTask(dtype=torch.float32, loss=PLAIN.loss)
    found, expected, exact = (
        gradient_of(world, single_precision, is_sharded=is_sharded, precision=precision)
        for is_sharded, precision in ((True, "bf16"), (False, "bf16"), (True, "fp32"))
    )
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    assert relative_error(found, expected) < 18 * 2**-8
    assert relative_error(found, exact) > 2**-10


def gradient_of(world: World, task: PairTask, **options: Any) -> dict[str, Tensor]:
    """The whole gradient of an update, as the optimizer gets it."""
    trainer = make_trainer(world, task, **options)
    kept: Any = trainer.weights
    found = {}
    trainer.optimizer.register_step_pre_hook(
        lambda *_: found.update({name: kept.whole(name, p.grad).clone() for name, p in kept.trained.items()})
    )
    make_updates(trainer, range(1))
    return found


def relative_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    difference = sum((found[name] - expected[name]).square().sum() for name in expected)
    return float((difference / sum(each.square().sum() for each in expected.values())).sqrt())


class Apart(PairTask):
    """Uses the weights of a layer without calling it."""

    def __init__(self, use: Callable[[Tensor], Tensor]) -> None:
        super().__init__(loss=PLAIN.loss)
        self.use = use

    def compute_loss(self, model: Any, batch: TranslationBatch) -> LossOutput:
        output = super().compute_loss(model, batch)
        weight = model.encoder.layers[0].feed_forward.expand.weight
        return LossOutput(output.loss + self.use(weight), output.sums)


class WithScalar(PairTask):
    def build_model(self) -> nn.Module:
        model = super().build_model()
        model.scale = nn.Parameter(torch.ones((), dtype=self.dtype))
        return model


class LeavingOut(PairTask):
    def build_model(self) -> nn.Module:
        model = super().build_model()
        model.is_whole = False
        return model


def check_refusals(world: World) -> None:
    """Models that FSDP does not know how to deal out are refused in a line."""
    with pytest.raises(
        UserError, match="`shard-weights` must be off for a model with scalars, such as `scale`"
    ):
        make_trainer(world, WithScalar(loss=PLAIN.loss), is_sharded=True)
    with pytest.raises(UserError, match="`shard-weights` must go without LayerDrop"):
        make_trainer(world, LeavingOut(loss=PLAIN.loss), is_sharded=True)
    for use in (torch.sum, lambda weight: (torch.ones(24, dtype=weight.dtype) @ weight).sum()):
        trainer = make_trainer(world, Apart(use), is_sharded=True)
        with pytest.raises(UserError, match="`shard-weights` must be off for a model, or a loss, that uses"):
            make_updates(trainer, range(1))


def check_all(world: World, folder: str) -> None:
    check_states(world, folder)
    check_cancelled(world)
    check_losses(world)
    check_refusals(world)


@pytest.mark.timeout(240)
def test_states_losses_and_cancelled_updates_are_those_of_whole_weights(tmp_path: Path) -> None:
    """On three ranks, where 14 and 16 rows do not come out even."""
    run_ranks(check_all, str(tmp_path / "state"), size=3)
    state, end = torch.load(tmp_path / "state")
    alone = take_up(make_trainer(single(CPU), is_sharded=True, ema_decay=0.9), state)
    for number in range(3, 6):
        batches = [micro_batch(100 * number + 10 * rank + i) for rank in range(3) for i in range(2)]
        alone.train_step(batches)
    assert_close(state_of(alone), end)


def write_data(folder: Path) -> Path:
    random = np.random.default_rng(1)
    for split, size in (("train", 60), ("valid", 5)):
        lines = [[WORDS[i] for i in random.integers(len(WORDS), size=n)] for n in random.integers(1, 8, size)]
        for language, step in (("en", 1), ("de", -1)):
            text = "".join(" ".join(line[::step]) + "\n" for line in lines)
            (folder / f"{split}.{language}").write_text(text)
    languages = {"source_lang": "en", "target_lang": "de", "destdir": folder / "data", "vocab_size": 330}
    files = {"trainpref": f"{folder}/train", "validpref": f"{folder}/valid"}
    preprocess(PreprocessOptions(**languages, **files), log=lambda _: None)
    return folder / "data"


def points(folder: Path, max_update: int, *, shard_weights: bool) -> TrainConfig[Any]:
    """Points in the plane, by a model with batch norm, whose statistics have a running mean of their own."""
    optimization = {"max_update": max_update, "ema_decay": 0.9, "clip_norm": 0.5}
    return config(folder, optimization={**optimization, "shard_weights": shard_weights})


def translation(folder: Path, max_update: int, *, shard_weights: bool) -> TrainConfig[Any]:
    """A small Transformer, with all at once that goes together with sharding."""
    sizes = {"layers": 1, "embed_dim": 16, "ffn_embed_dim": 24, "attention_heads": 2}
    return train_config(
        data=folder.parent / "data",
        save_dir=folder,
        device="cpu",
        max_tokens=60,
        update_freq=2,
        precision="bf16",
        activation_checkpointing=True,
        share_all_embeddings=True,
        warmup_updates=4,
        max_update=max_update,
        shard_weights=shard_weights,
        **{f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in sizes.items()},
    )


def images(folder: Path, max_update: int, *, shard_weights: bool) -> TrainConfig[Any]:
    return train_config(
        task="image_classification",
        train_dir=folder.parent / "train",
        val_dir=folder.parent / "val",
        save_dir=folder,
        model="timm/test_byobnet",
        image_size=32,
        precision="bf16",
        device="cpu",
        batch_size=8,
        warmup_updates=0,
        lr_scheduler="constant",
        max_update=max_update,
        shard_weights=shard_weights,
    )


# Each with the updates of the whole and of its first part.
RUNS: dict[str, tuple[Callable[..., TrainConfig[Any]], int, int]] = {
    "points": (points, 20, 7),
    "translation": (translation, 6, 3),
    "images": (images, 3, 1),
}


def train_runs(world: World, folder: str) -> None:
    """Train each kind of run at once, and in two parts."""
    with patch("nmt.train_loop.join_world", lambda *_, **__: nullcontext(world)):
        for name, (make, end, stop) in RUNS.items():
            for part, last in (("whole", end), ("parts", stop), ("parts", end)):
                train(make(Path(folder, f"{name}-{part}"), last, shard_weights=True))


@pytest.mark.timeout(240)
@pytest.mark.usefixtures("points_plugin")
def test_runs_are_resumed_bit_for_bit_and_their_checkpoints_are_like_any_others(tmp_path: Path) -> None:
    write_data(tmp_path)
    for split, number in (("train", 8), ("val", 3)):
        write_folders(tmp_path / split, {"red": number, "blue": number})
    run_ranks(train_runs, str(tmp_path), size=2)
    for name, (make, end, _) in RUNS.items():
        whole, parts = tmp_path / f"{name}-whole", tmp_path / f"{name}-parts"
        assert_bit_equal(tensors(whole, end), tensors(parts, end))
        validations = [without_time(records(folder, "valid"))[-1] for folder in (whole, parts)]
        assert validations[0] == validations[1]
        load_model(whole)
        # A single rank that keeps the whole writes the same, and goes on from there.
        train(make(tmp_path / name, 1, shard_weights=False))
        sizes = [
            {key: (tensor.dtype, tensor.shape) for key, tensor in tensors(folder, update).items()}
            for folder, update in ((whole, end), (tmp_path / name, 1))
        ]
        assert sizes[0] == sizes[1]
        train(make(whole, end + 1, shard_weights=False))
        assert "resume: shard-weights true -> false" in log(whole) and "resume: ranks 2 -> 1" in log(whole)


def test_what_cannot_go_with_sharding_is_refused_in_a_line(tmp_path: Path) -> None:
    for options, named in (
        ({"packing": "on"}, "`packing` must be auto or off with `shard-weights`, but is on"),
        ({"max_tokens": "auto"}, "`max-tokens` must be a number with `shard-weights`"),
        ({"compile": True}, "`shard-weights` must be off with `compile`"),
        ({"optimizer": "adafactor"}, "`shard-weights` must be off with `optimizer` adafactor"),
    ):
        with pytest.raises(UserError, match=named):
            train_config(data=tmp_path, save_dir=tmp_path / "run", shard_weights=True, **options)


def test_batches_are_padded_where_they_would_be_packed_and_a_line_says_so(tmp_path: Path) -> None:
    write_data(tmp_path)
    for is_sharded in (False, True):
        options = translation(tmp_path / "run", 1, shard_weights=is_sharded)
        task = options.task_options.build(None)
        model, examples = task.build_model(), task.open_split("train")
        assert (packing(options, task, model, examples, GPU) is None) == is_sharded
        reasons = [line.split(": ")[1] for line in notes_on_padding(options, task, model, examples, GPU)]
        assert reasons == ["weights are sharded"] * is_sharded
        assert notes_on_padding(options, task, model, examples, CPU) == []


def test_a_batch_without_room_ends_the_run_since_no_rank_can_try_a_smaller_one_alone() -> None:
    def probe(_: Any) -> None:
        raise torch.OutOfMemoryError

    class OneExample:
        sizes = np.ones((1, 2), np.int32)

        def __getitem__(self, index: int) -> int:
            return index

        def collate(self, items: list[int]) -> list[int]:
            return items

    def split_with(*, can_run_alone: bool) -> None:
        replicas = SimpleNamespace(can_run_alone=can_run_alone)
        trainer: Any = SimpleNamespace(probe=probe, replicas=replicas, world=single(CPU))
        find_split(trainer, OneExample(), [np.arange(1)])  # type: ignore[arg-type]

    with pytest.raises(UserError, match="one of length 1 alone does not"):
        split_with(can_run_alone=True)
    with pytest.raises(UserError, match=r"must be so small .* with `shard-weights`"):
        split_with(can_run_alone=False)


@pytest.mark.parametrize("seed", range(4))
def test_each_weight_is_in_one_part_and_tied_ones_stay_with_the_rest(seed: int) -> None:
    model = random_transformer(seed, torch.float32)
    found = parts(model, with_batch_norm=False)
    layers = [*model.encoder.layers, *model.decoder.layers]
    assert {id(layer) for layer in layers} <= {id(part) for part in found}
    assert [part for part in found if part not in layers] == [
        layer.cross_attention for layer in model.decoder.layers
    ]
    for layer in model.decoder.layers:
        assert found.index(layer.cross_attention) < found.index(layer), "what is inside comes first"
    layers[0].feed_forward.expand.bias = layers[-1].feed_forward.expand.bias
    assert not {id(layers[0]), id(layers[-1])} & {id(part) for part in parts(model, with_batch_norm=False)}


def test_batch_norms_keep_their_own_type_by_being_parts_of_their_own() -> None:
    norm = nn.BatchNorm1d(2)
    layer = nn.Sequential(nn.Linear(2, 2), norm)
    model = nn.Sequential(layer, nn.ReLU())
    assert parts(model, with_batch_norm=False) == [layer]
    assert parts(model, with_batch_norm=True) == [norm, layer]
