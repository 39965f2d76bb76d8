"""What a run is going to be, told before its first update: model, data, work, memory and time."""

import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nmt.compilation import uncompiled
from nmt.data.batch_iterator import BatchIterator
from nmt.data.batching import padded_size
from nmt.flops import FlopCounter
from nmt.memory import peak_memory
from nmt.options import TrainConfig
from nmt.schedule import num_updates
from nmt.trainer import Trainer

if TYPE_CHECKING:
    from nmt.task import Examples

_BLOCK = 2**20


def forecast(
    config: TrainConfig[Any],
    trainer: Trainer,
    batches: BatchIterator,
    *,
    train_examples: "Examples[Any]",
    valid_examples: "Examples[Any]",
) -> list[str]:
    """Return the lines of a table; takes the time of two or three batches.

    Call it after the worst batch has been probed (`nmt.memory`), so that the memory is known.
    """
    world, options = trainer.world, config.optimization
    per_epoch = batches.updates_per_epoch
    total_updates = num_updates(options, updates_per_epoch=per_epoch)
    device = f"{world.size} x {world.device.type}"
    flop, seconds = _measure(trainer, train_examples, batches)
    seconds *= config.batching.update_freq
    counts = parameter_counts(trainer.model)
    rows = [("model", f"{sum(counts.values()):,} parameters")]
    rows += [("", f"{count:>13,} {part}") for part, count in counts.items()]
    sums = sum_of_sizes(train_examples)
    sizes = " / ".join(f"{size:,}" for size in sums)
    # Where each example has the size 1 there is nothing to add.
    in_size = "" if sums == [len(train_examples)] else f" of {sizes} in size"
    rows += [
        (
            "data",
            f"{len(train_examples):,} training examples{in_size}, "
            f"{len(valid_examples):,} validation examples",
        ),
        ("updates", f"{per_epoch:,} an epoch, of about {sums[-1] / per_epoch:,.0f} targets on {device}"),
        ("work", f"{_scaled(flop)}FLOP a target in matrix products"),
        ("memory", f"{peak_memory(world.device) / 2**20:,.0f} MiB at most, after the largest batch"),
    ]
    if batches.split_above is not None:
        rows.append(
            ("", f"batches above {batches.split_above:,} (examples x longest) are run in parts to fit")
        )
    speed = f"about {seconds:.2g} s an update"
    if total_updates is None:
        rows.append(("time", f"{speed}; no end is set"))
    else:
        rows.append(("time", f"{speed}, {duration(seconds * total_updates)} for {total_updates:,} updates"))
    return [f"{name:<9}{text}" for name, text in rows]


def parameter_counts(model: torch.nn.Module) -> dict[str, int]:
    """Return the number of parameters of each part, modules two deep; tied ones count where they come first."""
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        module = name.removesuffix(".weight").removesuffix(".bias")
        part = ".".join(module.split(".")[:2])
        counts[part] = counts.get(part, 0) + parameter.numel()
    return counts


def sum_of_sizes(examples: "Examples[Any]") -> list[int]:
    """Return the sum of each column of the sizes: source and target tokens, for one."""
    sizes = examples.sizes
    starts = range(0, len(sizes), _BLOCK)
    sums = [np.asarray(sizes[start : start + _BLOCK]).sum(axis=0, dtype=np.int64) for start in starts]
    return np.sum(sums, axis=0).tolist() if sums else []


def duration(seconds: float) -> str:
    """Say a time to two figures: 41 s, 3 min 20 s, 5 h 10 min, 3 d 4 h."""
    units = [("d", 86400), ("h", 3600), ("min", 60), ("s", 1)]
    left = round(seconds)
    parts: list[tuple[int, str]] = []
    for name, size in units:
        count, left = divmod(left, size)
        if count or (parts and len(parts) < 2):
            parts.append((count, name))
    return " ".join(f"{count} {name}" for count, name in parts[:2] if count) or "0 s"


def _measure(trainer: Trainer, examples: "Examples[Any]", batches: BatchIterator) -> tuple[float, float]:
    """Return the floating-point operations a target and the seconds of a batch of middling size."""
    ordered = sorted(batches.first_batches, key=lambda batch: padded_size(examples.sizes, batch))
    middling = ordered[len(ordered) // 2]
    if batches.split_above is not None:
        middling = middling[
            : max(1, len(middling) * batches.split_above // padded_size(examples.sizes, middling))
        ]
    batch = examples.collate([examples[index] for index in middling.tolist()])
    in_steps = uncompiled() if trainer.options.compile else nullcontext()
    with in_steps, FlopCounter() as counter:
        trainer.probe(batch)
    _wait(trainer.world.device)
    start = time.perf_counter()
    trainer.probe(batch)
    _wait(trainer.world.device)
    seconds = time.perf_counter() - start
    return counter.total / max(batch.num_targets, 1), seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _scaled(number: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f} "
