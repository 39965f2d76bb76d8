"""Updates of one shape, packed or padded, of a small Transformer: on a CPU and on a GPU."""

from typing import Any

import torch

from nmt.data.batch_iterator import MicroBatch
from nmt.data.packing import PackedTranslationBatch, pack_pairs
from nmt.data.parallel_dataset import collate_pairs
from nmt.distributed import single
from nmt.models.options import TransformerOptions
from nmt.models.transformer import Transformer
from nmt.options import OptimizationOptions
from nmt.task import LossOutput
from nmt.trainer import Trainer
from nmt.translation.loss import packed_translation_loss, translation_loss
from support.packed_pairs import make_pairs, shape_for

CPU, GPU = torch.device("cpu"), torch.device("cuda")
LENGTHS = [(3, 4), (7, 5), (2, 9), (12, 11), (1, 1), (6, 6)]
SIZES = {"layers": 2, "embed_dim": 32, "ffn_embed_dim": 64, "attention_heads": 2}


class PairTask:
    """The translation loss alone."""

    metrics = {"loss": "min"}

    def compute_loss(self, model: Transformer, batch: Any) -> LossOutput:
        if isinstance(batch, PackedTranslationBatch):
            return packed_translation_loss(model, batch, label_smoothing=0.1)
        return translation_loss(model, batch, label_smoothing=0.1)


def make_model(**options: Any) -> Transformer:
    torch.manual_seed(3)
    sizes = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in SIZES.items()}
    return Transformer(
        TransformerOptions(**{**sizes, "dropout": 0.0, **options}),
        source_vocabulary_size=14,
        target_vocabulary_size=14,
        pad_id=1,
    )


def make_trainer(device: torch.device, *, is_packed: bool = True, **options: Any) -> Trainer:
    model_options = options.pop("model", {})
    # A large epsilon: or Adam would magnify gradients that are zero but for round-off, such as of biases of keys.
    given = {"lr": 0.01, "warmup_updates": 4, "clip_norm": 0.5, "adam_eps": 0.01, **options}
    optimization = OptimizationOptions(**given)
    return Trainer(
        PairTask(),
        make_model(**model_options),
        optimization,
        world=single(device),
        seed=1,
        updates_per_epoch=1,
        has_one_shape=is_packed,
    )


def updates(*, is_packed: bool = True, count: int = 8) -> list[list[MicroBatch]]:
    """Updates of two micro-batches and of one, in turn."""
    shape = shape_for(LENGTHS, slack=6)

    def batch(seed: int) -> Any:
        pairs = make_pairs(LENGTHS[seed % 3 :], seed)
        return pack_pairs(pairs, shape) if is_packed else collate_pairs(pairs)

    return [[MicroBatch(batch(2 * n + i), 1.0, [n]) for i in range(1 + n % 2)] for n in range(count)]


def trained(trainer: Trainer, given: list[list[MicroBatch]]) -> dict[str, torch.Tensor]:
    """Make updates; return the weights and the loss of all."""
    with trainer.metrics.scope("train"):
        for micro_batches in given:
            trainer.train_step(micro_batches)
    sums = trainer.metrics.sums("train", trainer.world)
    weights = {name: p.detach().cpu().clone() for name, p in trainer.model.named_parameters()}
    return {**weights, "loss": torch.tensor(sums["loss"]), "targets": torch.tensor(sums["num_targets"])}


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float) -> None:
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=tolerance, atol=tolerance, msg=name)
