"""The table of a run before its first update: model, data, work and memory; on demand, time."""

from contextlib import nullcontext
from typing import Any

import torch

from nmt.data.batch_iterator import BatchIterator
from nmt.data.batching import padded_size
from nmt.errors import UserError, by_number, counted
from nmt.options import TrainConfig
from nmt.run.flops import FlopCounter
from nmt.run.memory_probe import peak_memory
from nmt.task_extras import Words, words_of
from nmt.trainer import Trainer
from nmt.update.compilation import uncompiled
from nmt.update.schedule import num_updates


def size_rows(trainer: Trainer, batches: BatchIterator, *, num_valid: int) -> list[str]:
    """Return the lines of the table on the model and the data. They need no computation."""
    world, words = trainer.world, words_of(trainer.task)
    per_epoch = batches.updates_per_epoch
    device = f"{world.size} x {world.device.type}"
    counts = parameter_counts(trainer.model)
    rows = [("model", counted(sum(counts.values()), "parameter"))]
    rows += [("", f"{count:>13,} {part}") for part, count in counts.items()]
    sums = batches.survey.sums
    sizes = " / ".join(f"{size:,}" for size in sums)
    # If every example has the size 1, sizes say nothing more than the number of examples.
    in_size = "" if sums == [batches.num_examples] else f" of {sizes} in size"
    left_out = batches.num_too_long
    without = f" ({left_out:,} more {by_number(left_out, 'is', 'are')} left out)" if left_out else ""
    rows += [
        (
            "data",
            f"{_examples(batches.num_examples, 'training', words)}{in_size}{without}, "
            f"{_examples(num_valid, 'validation', words)}",
        ),
        (
            "updates",
            f"{per_epoch:,} an epoch, of about {sums[-1] / per_epoch:,.0f} {words.targets} on {device}",
        ),
    ]
    return [_row(name, text) for name, text in rows]


def cost_rows(trainer: Trainer, batches: BatchIterator) -> list[str]:
    """Return the lines of the table on work and memory; this takes the time of a batch.

    Call it after the worst batch has been probed (`nmt.run.memory_probe`), so that the memory is known.
    """
    flop = _scaled(_flop_a_target(trainer, batches))
    a_target = words_of(trainer.task).a_target
    rows = [
        ("work", f"{flop}FLOP {a_target} in matrix products, forward and backward"),
        ("memory", f"{peak_memory(trainer.world.device) / 2**20:,.0f} MiB at most, after the largest batch"),
    ]
    if batches.split_above is not None:
        size = "tokens" if batches.limits.is_packed else "examples x longest"
        rows.append(("", f"batches above {batches.split_above:,} ({size}) are run in parts to fit"))
    return [_row(name, text) for name, text in rows]


def time_row(config: TrainConfig[Any], batches: BatchIterator, *, seconds: float, done: int) -> str:
    """Return the line of the table on how long a run takes.

    Args:
        config: Says when the run ends.
        batches: Say how many updates an epoch has.
        seconds: The time of an update.
        done: Updates that were made already.
    """
    speed = f"about {seconds:.2g} s an update"
    end = num_updates(config.optimization, updates_per_epoch=batches.updates_per_epoch)
    if end is None:
        return _row("time", f"{speed}; no end is set")
    left = max(end - done, 0)
    after = f" after update {done:,}" if done else ""
    return _row(
        "time", f"{speed}; validation apart, {duration(seconds * left)} for {counted(left, 'update')}{after}"
    )


def left_out(batches: BatchIterator, config: TrainConfig[Any]) -> list[str]:
    """Return a line on how many examples are left out because of their length; none if there are none.

    Raises:
        UserError: All of them are too long.
    """
    num_left_out, num_left = batches.num_too_long, batches.num_examples
    if num_left == 0:
        raise UserError(
            f"`max-tokens` must be at least the length of some examples, but is "
            f"{config.batching.max_tokens} and all ({num_left_out:,}) are longer. Raise it."
        )
    if not num_left_out:
        return []
    share = num_left_out / (num_left_out + num_left)
    warning = "warning: " if share > 0.01 else ""
    return [
        f"{warning}left out: {num_left_out:,} of {counted(num_left_out + num_left, 'training example')} "
        f"({share:.2%}) {by_number(num_left_out, 'is', 'are')} longer than max-tokens"
    ]


def parameter_counts(model: torch.nn.Module) -> dict[str, int]:
    """Return the number of parameters of each part, down to two levels; tied ones count at their first place."""
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        module = name.removesuffix(".weight").removesuffix(".bias")
        part = ".".join(module.split(".")[:2])
        counts[part] = counts.get(part, 0) + parameter.numel()
    return counts


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


def _flop_a_target(trainer: Trainer, batches: BatchIterator) -> float:
    """Return the floating-point operations per target of a batch of medium size."""
    examples = batches.examples
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
    return counter.total / max(batch.num_targets, 1)


def _examples(count: int, kind: str, words: Words) -> str:
    return counted(count, f"{kind} {words.example}", f"{kind} {words.examples}")


def _row(name: str, text: str) -> str:
    return f"{name:<9}{text}"


def _scaled(number: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f} "
