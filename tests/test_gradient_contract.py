"""The contract of the update: however it is dealt to ranks and micro-batches, it is that of one plain batch.

The reference is slow and knows nothing of the trainer: one process, all examples of an update in one batch, plain
autograd, the sum divided by the number of targets by hand, Adam written out from its formula.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from support.pair_task import SIZES
from support.ranks import run_ranks
from torch import Tensor, nn

from nmt.data.batch_iterator import BatchIterator, MicroBatch
from nmt.data.limits import batch_limits
from nmt.data.options import BatchingOptions
from nmt.data.packing import PackedShape, PackedTranslationBatch, pack_pairs
from nmt.data.parallel_dataset import Pair, TranslationBatch
from nmt.distributed import World, single
from nmt.models.transformer import Transformer
from nmt.options import OptimizationOptions
from nmt.task import LossOutput
from nmt.trainer import Trainer
from nmt.translation.loss import packed_translation_loss, translation_loss

PAD, EOS = 1, 2
VOCABULARY_SIZE = 15
NUM_UPDATES = 5
LAYOUTS = [(1, 1), (1, 4), (2, 2), (4, 1)]  # ranks x micro-batches: 4 batches an update, or all in one
# 27 pairs are 7 batches an epoch, uneven in sentences and in targets: an update of 4 and one of 3, for which one
# of several ranks has a filler.
BATCHING = BatchingOptions(max_tokens=36, batch_size=5, update_freq=4, required_batch_size_multiple=1)
OPTIMIZATION = OptimizationOptions(lr=0.01, warmup_updates=3, clip_norm=0.3, adam_eps=1e-6)


@dataclass(frozen=True)
class NamedBatch(TranslationBatch):
    """A batch that knows which examples it holds."""

    indices: tuple[int, ...] = ()


class PairExamples:
    """Pairs of uneven lengths, from a fixed generator."""

    def __init__(self) -> None:
        random = np.random.default_rng(5)
        lengths = random.integers(1, 9, size=(27, 2))
        self.pairs = [[random.integers(4, VOCABULARY_SIZE, size=n).tolist() for n in row] for row in lengths]
        self.sizes = (lengths + 1).astype(np.int32)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> int:
        return index

    def collate(self, indices: Sequence[int]) -> NamedBatch:
        sources = [self.pairs[i][0] + [EOS] for i in indices]
        targets = [self.pairs[i][1] + [EOS] for i in indices]
        return NamedBatch(
            source=pad(sources),
            target_input=pad([[EOS, *row[:-1]] for row in targets]),
            target=pad(targets),
            num_examples=len(indices),
            num_targets=sum(map(len, targets)),
            indices=tuple(indices),
        )


class PackedPairs(PairExamples):
    """The same pairs, in packed batches."""

    shape = PackedShape.of(max_tokens=36, max_sentences=5, longest=9)

    def collate(self, indices: Sequence[int]) -> PackedTranslationBatch:
        pairs = [tuple(np.array([*side, EOS]) for side in self.pairs[i]) for i in indices]
        return pack_pairs(cast(list[Pair], pairs), self.shape)


class PairTask:
    """The translation loss without anything around it, in float64."""

    metrics = {"loss": "min"}
    sizes = SIZES

    def build_model(self) -> Transformer:
        torch.manual_seed(3)
        model = Transformer(
            self.sizes,
            source_vocabulary_size=VOCABULARY_SIZE,
            target_vocabulary_size=VOCABULARY_SIZE,
            pad_id=PAD,
        )
        return model.double()

    def compute_loss(self, model: Transformer, batch: Any) -> LossOutput:
        if isinstance(batch, PackedTranslationBatch):
            return packed_translation_loss(model, batch, label_smoothing=0.1)
        return translation_loss(model, batch, label_smoothing=0.1)

    def summarize(self, sums: dict[str, float]) -> dict[str, float]:
        return {"loss": sums["loss"] / sums["num_targets"]}

    def evaluate(self, model: nn.Module, examples: Any, world: World) -> dict[str, float]:
        return {}


class RecomputingTask(PairTask):
    """The same; layers are computed once more in the backward pass."""

    sizes = replace(SIZES, activation_checkpointing=True)


def pad(rows: list[list[int]]) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [PAD] * (width - len(row)) for row in rows])


def updates_of(world: World, update_freq: int, *, is_packed: bool = False) -> list[list[MicroBatch]]:
    """This rank's part of the first updates."""
    # 7 packed batches an epoch, too: none has 36 tokens on a side.
    options = replace(BATCHING, update_freq=update_freq, batch_size=4 if is_packed else 5)
    examples = PackedPairs() if is_packed else PairExamples()
    batches = BatchIterator(
        examples,
        options,
        seed=1,
        rank=world.rank,
        world_size=world.size,
        limits=replace(batch_limits(options), is_packed=is_packed),
    )
    updates: list[list[MicroBatch]] = []
    while len(updates) < NUM_UPDATES:
        updates += list(batches)
    return updates[:NUM_UPDATES]


def train(
    updates: list[list[MicroBatch]],
    world: World,
    *,
    is_packed: bool = False,
    is_sharded: bool = False,
    task: PairTask | None = None,
) -> dict[str, Any]:
    """Make the updates; return each one's gradient, norm and parameters, and the sums over all."""
    task = task or PairTask()
    trainer = Trainer(
        task,
        task.build_model(),
        replace(OPTIMIZATION, shard_weights=is_sharded),
        world=world,
        seed=1,
        updates_per_epoch=1,
        has_one_shape=is_packed,
    )
    kept: Any = trainer.weights
    seen: dict[str, Any] = {"gradients": [], "norms": [], "parameters": []}
    # What the optimizer is given: clipped, as the reference's is.
    trainer.optimizer.register_step_pre_hook(
        lambda *_: seen["gradients"].append(
            {name: kept.whole(name, p.grad).clone() for name, p in kept.trained.items()}
        )
    )
    with trainer.metrics.scope("train"):
        for micro_batches in updates:
            trainer.train_step(micro_batches)
            seen["norms"].append(trainer.metrics.gauges("train")["grad"])
            parameters = {name: kept.whole(name, p.detach()).clone() for name, p in kept.trained.items()}
            seen["parameters"].append(parameters)
    return {**seen, "sums": trainer.metrics.sums("train", world)}


def named(model: nn.Module) -> list[tuple[str, Any]]:
    return list(model.named_parameters())


def save_trained(world: World, update_freq: int, folder: str, is_packed: bool = False) -> None:
    updates = updates_of(world, update_freq, is_packed=is_packed)
    weights = [[micro_batch.weight for micro_batch in update] for update in updates]
    targets = [[micro_batch.batch.num_targets for micro_batch in update] for update in updates]
    torch.save(
        {**train(updates, world, is_packed=is_packed), "weights": weights, "targets": targets},
        f"{folder}/{world.rank}.pt",
    )


def reference(updates: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Make the updates, each given as its examples, in the plainest way."""
    examples, task = PairExamples(), PairTask()
    model = task.build_model()
    mean = {name: torch.zeros_like(p) for name, p in named(model)}
    square = {name: torch.zeros_like(p) for name, p in named(model)}
    seen: dict[str, Any] = {"gradients": [], "norms": [], "parameters": []}
    loss_sum, num_targets = 0.0, 0
    beta1, beta2 = OPTIMIZATION.adam_betas
    for n, indices in enumerate(updates, start=1):
        batch = examples.collate(indices)
        loss = task.compute_loss(model, batch).loss
        parameters = dict(named(model))
        gradients = dict(zip(parameters, torch.autograd.grad(loss, parameters.values()), strict=True))
        gradients = {name: gradient / batch.num_targets for name, gradient in gradients.items()}
        norm = math.sqrt(sum((gradient**2).sum().item() for gradient in gradients.values()))
        scale = min(1.0, OPTIMIZATION.clip_norm / (norm + 1e-6))  # torch's clipping adds 1e-6, too
        gradients = {name: gradient * scale for name, gradient in gradients.items()}
        warmup = OPTIMIZATION.warmup_updates
        lr = OPTIMIZATION.lr * (n / warmup if n < warmup else math.sqrt(warmup / n))
        with torch.no_grad():
            for name, p in parameters.items():
                mean[name] = beta1 * mean[name] + (1 - beta1) * gradients[name]
                square[name] = beta2 * square[name] + (1 - beta2) * gradients[name] ** 2
                root = (square[name] / (1 - beta2**n)).sqrt()
                p -= lr * (mean[name] / (1 - beta1**n)) / (root + OPTIMIZATION.adam_eps)
        loss_sum += loss.item()
        num_targets += batch.num_targets
        seen["gradients"].append(gradients)
        seen["norms"].append(norm)
        seen["parameters"].append({name: p.detach().clone() for name, p in named(model)})
    return {**seen, "sums": {"loss": loss_sum, "num_targets": num_targets}}


@pytest.fixture(scope="module")
def examples_of_updates() -> list[list[int]]:
    """The examples of each update, in the order of the data set: that of the batches is left behind."""
    world = single(torch.device("cpu"))
    return [
        sorted(index for micro_batch in update for index in micro_batch.batch.indices)
        for update in updates_of(world, update_freq=4)
    ]


@pytest.fixture(scope="module")
def expected(examples_of_updates: list[list[int]]) -> dict[str, Any]:
    return reference(examples_of_updates)


def assert_as_expected(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for update in range(NUM_UPDATES):
        assert found["norms"][update] == pytest.approx(expected["norms"][update], rel=1e-12)
        # Round-off of a sum of a few hundred products; 1e-16 of the largest entries where entries cancel.
        for name, gradient in expected["gradients"][update].items():
            torch.testing.assert_close(found["gradients"][update][name], gradient, rtol=1e-11, atol=1e-14)
        # Adam divides by a root as small as 1e-6, so that entries that are zero but for round-off, such as the
        # gradient of the keys' biases, are magnified a millionfold.
        for name, parameter in expected["parameters"][update].items():
            torch.testing.assert_close(found["parameters"][update][name], parameter, rtol=1e-10, atol=1e-11)
    for name, value in expected["sums"].items():
        assert found["sums"][name] == pytest.approx(value, rel=1e-11)


def test_the_updates_are_uneven_and_cover_the_data(examples_of_updates: list[list[int]]) -> None:
    updates = updates_of(single(torch.device("cpu")), update_freq=4)
    sizes = [[micro_batch.batch.num_targets for micro_batch in update] for update in updates]
    assert any(len(set(update)) > 2 for update in sizes)
    assert len({len(update) for update in sizes}) == 2, "the last update of an epoch is smaller"
    epoch = next(n for n in range(1, NUM_UPDATES) if len(sizes[n - 1]) < 4)
    assert sorted(index for update in examples_of_updates[:epoch] for index in update) == list(range(27))


@pytest.mark.parametrize(("ranks", "update_freq"), LAYOUTS, ids=[f"{r}x{m}" for r, m in LAYOUTS])
def test_the_update_is_that_of_one_plain_batch(
    ranks: int,
    update_freq: int,
    expected: dict[str, Any],
    examples_of_updates: list[list[int]],
    tmp_path: Path,
) -> None:
    if (ranks, update_freq) == (1, 1):
        examples = PairExamples()
        whole = [[MicroBatch(examples.collate(indices), 1.0)] for indices in examples_of_updates]
        assert_as_expected(train(whole, single(torch.device("cpu"))), expected)
        return
    if ranks == 1:
        save_trained(single(torch.device("cpu")), update_freq, str(tmp_path))
    else:
        run_ranks(save_trained, update_freq, str(tmp_path), size=ranks)
    trained = [torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks)]
    for found in trained:
        assert_as_expected(found, expected)
    weights = [weight for found in trained for update in found["weights"] for weight in update]
    assert weights.count(0.0) == (NUM_UPDATES // 2 if ranks > 1 else 0), "one filler at the end of an epoch"
    targets = [[sum(update) for update in found["targets"]] for found in trained]
    assert ranks == 1 or any(len(set(shares)) > 1 for shares in zip(*targets, strict=True))


@pytest.mark.parametrize(("ranks", "update_freq"), [(1, 4), (2, 2)])
def test_the_update_of_packed_batches_is_that_of_one_padded_batch(
    ranks: int, update_freq: int, tmp_path: Path
) -> None:
    run_ranks(save_trained, update_freq, str(tmp_path), True, size=ranks)
    trained = [torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks)]
    updates = updates_of(single(torch.device("cpu")), update_freq=4, is_packed=True)
    assert any(len(update) % 2 for update in updates), "for which two ranks need a filler"
    examples = [sorted(index for batch in update for index in batch.indices) for update in updates]
    for found in trained:
        assert_as_expected(found, reference(examples))


def save_sharded(world: World, update_freq: int, folder: str) -> None:
    for task in (PairTask(), RecomputingTask()):
        found = train(updates_of(world, update_freq), world, is_sharded=True, task=task)
        torch.save(found, f"{folder}/{type(task).__name__} {world.rank}.pt")


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("ranks", "update_freq"), [(2, 2), (3, 2)])
def test_the_update_of_sharded_weights_is_that_of_one_plain_batch(
    ranks: int, update_freq: int, tmp_path: Path
) -> None:
    """Eight rows do not come out even on three ranks."""
    run_ranks(save_sharded, update_freq, str(tmp_path), size=ranks)
    updates = updates_of(single(torch.device("cpu")), update_freq=ranks * update_freq)
    expected = reference([sorted(i for batch in update for i in batch.batch.indices) for update in updates])
    found = [torch.load(path) for path in tmp_path.iterdir()]
    assert len(found) == 2 * ranks
    for trained in found:
        assert_as_expected(trained, expected)


def test_the_reference_notices_a_mean_over_ranks(
    expected: dict[str, Any], examples_of_updates: list[list[int]]
) -> None:
    """What a mean of means would give differs by far more than is allowed: the comparison can fail."""
    examples, task = PairExamples(), PairTask()
    model = task.build_model()
    half = len(examples_of_updates[0]) // 2
    halves = [examples_of_updates[0][:half], examples_of_updates[0][half:]]
    means = []
    for indices in halves:
        batch = examples.collate(indices)
        loss = task.compute_loss(model, batch).loss / batch.num_targets
        means.append(torch.autograd.grad(loss, model.parameters()))
    largest = max((a - b).abs().max().item() for a, b in zip(*means, strict=True))
    assert largest > 1e-3
    unclipped = expected["norms"][0] / OPTIMIZATION.clip_norm
    mean_of_means = {name: (a + b) / 2 for (name, _), a, b in zip(named(model), *means, strict=True)}
    differences = [
        (mean_of_means[name] - max(1.0, unclipped) * gradient).abs().max().item()
        for name, gradient in expected["gradients"][0].items()
    ]
    assert max(differences) > 1e-6
