#!/usr/bin/env python3
"""Show on a configuration of yours, and on this machine, that an update does not depend on how it is dealt out.

    .venv/bin/python scripts/verify_gradients.py CONFIG.yaml [--option value ...]

Takes a few batches of the training data of the configuration (any task) and makes the same updates as 1x1, 1x4,
2x2 and 4x1 ranks x micro-batches, in real processes. Each is compared with plain autograd over all examples of an
update in one batch, divided by their number of targets, in a process that knows nothing of ranks.

It computes in float64, where what is left is round-off, and in evaluation mode: dropout and batch statistics
depend on the batch by their nature. What `__getitem__` draws at random is seeded by the example. Batches are
small (`--max-tokens 512`, or `--batch-size 4` where examples have no length) unless you give a limit. Without
`--device` it runs on the CPU; with `--device cuda` layouts with more ranks than GPUs are left out.

Exit code: 0 if all agree, 1 if one does not, 2 for what is wrong with the configuration.
"""

import hashlib
import os
import random
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from nmt.cli.command import run_command
from nmt.config.mapping import parse_command, peek, read_yaml
from nmt.data.batch_iterator import BatchIterator, MicroBatch
from nmt.distributed import World, join_world
from nmt.errors import UserError
from nmt.options import TrainConfig
from nmt.task import Examples, Task, load_task
from nmt.trainer import Trainer
from nmt.update.optim import build_optimizer
from nmt.update.schedule import build_schedule

PROG = "verify_gradients"
LAYOUTS = [(1, 1), (1, 4), (2, 2), (4, 1)]  # ranks x micro-batches; 1x1 gets the update in one batch
BATCHES_PER_UPDATE = 4
NUM_UPDATES = 4
# Relative to the norm of the gradient, and of what the updates have changed. In float64 round-off is about 1e-15;
# optimizers that divide by the root of a small second moment magnify it.
GRADIENT_TOLERANCE = 1e-11
CHANGE_TOLERANCE = 1e-6
# Entries of the gradient below this share of its largest one are zero but for round-off; what an optimizer that
# normalises makes of them says nothing.
NOISE = 1e-10


@dataclass(frozen=True)
class Job:
    """What every process is told."""

    config: TrainConfig[Any]
    indices: list[int]  # the examples of the training data that make up an epoch
    updates: list[list[int]]  # those of each update, as places in `indices`


class ChosenExamples:
    """Some examples of a split; what reading one draws at random depends on nothing but the example."""

    def __init__(self, examples: Examples[Any], indices: Sequence[int]) -> None:
        self._examples = examples
        self._indices = indices
        self.sizes = examples.sizes[np.asarray(indices)]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Any:
        for seed in (torch.manual_seed, np.random.seed, random.seed):
            seed(self._indices[index])
        return self._examples[self._indices[index]]

    def collate(self, items: list[Any]) -> Any:
        return self._examples.collate(items)


class Places:
    """In place of examples, where they are."""

    def __init__(self, sizes: np.ndarray) -> None:
        self.sizes = sizes

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> int:
        return index

    def collate(self, items: list[int]) -> list[int]:
        return items


def main() -> None:
    """Parse the command line, run all layouts, print a table and a verdict."""
    is_right = False

    def body() -> None:
        nonlocal is_right
        is_right = verify(read_config(sys.argv[1:]))

    run_command(PROG, body)
    raise SystemExit(0 if is_right else 1)


def read_config(argv: Sequence[str]) -> TrainConfig[Any]:
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        raise SystemExit(0 if argv else 2)
    path, *overrides = argv
    task_options = load_task(peek(overrides, "--task") or read_yaml(Path(path)).get("task") or "translation")
    config: TrainConfig[Any] = parse_command(
        TrainConfig[task_options],  # type: ignore[valid-type]
        ["--config", path, *overrides],
        prog=PROG,
        description="The options of nmt-train.",
    )
    if peek(overrides, "--device") is None:
        config = replace(config, device="cpu")
    if peek(overrides, "--max-tokens") is None and peek(overrides, "--batch-size") is None:
        limits = {"max_tokens": 512} if config.batching.max_tokens is not None else {"batch_size": 4}
        config = replace(config, batching=replace(config.batching, **limits))
    return config


def verify(config: TrainConfig[Any]) -> bool:
    task = config.task_options.build(None)
    job = choose_examples(config, task.open_split("train"))
    print(f"{sum(map(len, job.updates))} examples in {len(job.updates)} updates, float64, {config.device}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        expected = slow_updates(job)
        print(f"{'ranks x batches':>16} {'fillers':>8} {'gradient':>10} {'parameters':>11} {'seconds':>8}")
        verdicts = [check_layout(job, expected, folder, *layout) for layout in LAYOUTS]
    checked = [verdict for verdict in verdicts if verdict is not None]
    is_right = all(checked)
    print(
        f"{'The same update' if is_right else 'NOT the same update'} in {len(checked)} of {len(LAYOUTS)} layouts: "
        f"gradients within {GRADIENT_TOLERANCE:g} of plain autograd's (relative), what {len(job.updates)} updates "
        f"change within {CHANGE_TOLERANCE:g}."
    )
    return is_right


def choose_examples(config: TrainConfig[Any], examples: Examples[Any]) -> Job:
    """Choose so many examples that an epoch is two updates, the second with a batch too few: a filler."""
    count = len(examples)
    order = np.random.default_rng(config.seed).permutation(count).tolist()
    size, step = 0, 1
    best: list[list[MicroBatch]] = []
    while size < count:
        size = min(size + step, count)
        step = max(1, size // 64)
        sizes = examples.sizes[np.asarray(order[:size])]
        try:
            best = list(updates_of(config, Places(sizes), BATCHES_PER_UPDATE, num_updates=2))
        except UserError:
            continue  # too long, all of them so far
        if [len(update) for update in best] == [BATCHES_PER_UPDATE, BATCHES_PER_UPDATE - 1]:
            break
    if not best:
        raise UserError("the training data must hold an example within `max-tokens`, but has none. Raise it.")
    indices = order[:size]
    sizes = examples.sizes[np.asarray(indices)]
    updates = updates_of(config, Places(sizes), BATCHES_PER_UPDATE, num_updates=NUM_UPDATES)
    return Job(
        config,
        indices,
        [[place for micro_batch in update for place in micro_batch.batch] for update in updates],
    )


def updates_of(
    config: TrainConfig[Any],
    examples: Any,
    update_freq: int,
    *,
    num_updates: int = NUM_UPDATES,
    world: World | None = None,
) -> Iterator[list[MicroBatch]]:
    """Yield this rank's batches of each update, over several epochs if need be."""
    rank, size = (world.rank, world.size) if world else (0, 1)
    batching = replace(config.batching, update_freq=update_freq, num_workers=0)
    batches = BatchIterator(examples, batching, seed=config.seed, rank=rank, world_size=size)
    count = 0
    while True:
        for update in batches:
            if count == num_updates:
                return
            yield update
            count += 1


def build(config: TrainConfig[Any], device: torch.device) -> tuple[Task[Any], nn.Module]:
    """Make the task and its model in float64, which stays in evaluation mode."""
    task: Task[Any] = config.task_options.build(None)
    torch.manual_seed(config.seed)
    model = task.build_model().double().to(device).eval()
    for module in model.modules():
        module.register_forward_pre_hook(widen, with_kwargs=True)  # images come in float32
    model.train = lambda mode=True: model  # type: ignore[method-assign]
    return task, model


def widen(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    def double(value: Any) -> Any:
        is_single = isinstance(value, Tensor) and value.dtype == torch.float32
        return value.double() if is_single else value

    return tuple(map(double, args)), {name: double(value) for name, value in kwargs.items()}


def flat(tensors: Sequence[Tensor | None], model: nn.Module) -> Tensor:
    """Join tensors, one a parameter, to one on the CPU; a missing gradient is zero."""
    parts = [
        torch.zeros(parameter.shape, dtype=parameter.dtype) if tensor is None else tensor.detach()
        for tensor, parameter in zip(tensors, model.parameters(), strict=True)
    ]
    return torch.cat([part.flatten().cpu() for part in parts])


def slow_updates(job: Job) -> dict[str, Any]:
    """Make the updates one after the other, each from one batch, without the trainer."""
    config = job.config
    with join_world(config.device) as world:
        task, model = build(config, world.device)
        optimizer = build_optimizer(model.parameters(), config.optimization)
        schedule = build_schedule(config.optimization, updates_per_epoch=len(job.updates))
        examples = ChosenExamples(task.open_split("train"), job.indices)
        parameters = list(model.parameters())
        start = flat(parameters, model)
        gradients = []
        for number, places in enumerate(job.updates, start=1):
            batch = examples.collate([examples[place] for place in places])
            num_targets = batch.num_targets
            task.compute_loss(model, batch.to(world.device)).loss.backward()
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad /= num_targets
            if config.optimization.clip_norm:
                nn.utils.clip_grad_norm_(parameters, config.optimization.clip_norm)
            gradients.append(flat([parameter.grad for parameter in parameters], model))
            for group in optimizer.param_groups:
                group["lr"] = config.optimization.lr * schedule(number, 1)
            optimizer.step()
            optimizer.zero_grad()
        return {"gradients": gradients, "start": start, "parameters": flat(parameters, model)}


def check_layout(
    job: Job, expected: dict[str, Any], folder: Path, num_ranks: int, num_batches: int
) -> bool | None:
    """Run a layout, print its line, and return whether it agrees; None if there are too few GPUs for it."""
    name = f"{num_ranks} x {num_batches}"
    if job.config.device == "cuda" and num_ranks > torch.cuda.device_count():
        print(f"{name:>16} left out: {torch.cuda.device_count()} GPUs")
        return None
    began = time.monotonic()
    run_ranks(train_rank, job, num_batches, str(folder), size=num_ranks)
    found = torch.load(folder / "layout.pt")
    gradient_error = max(
        distance(one, other) / max(other.norm().item(), 1e-300)
        for one, other in zip(found["gradients"], expected["gradients"], strict=True)
    )
    counts = torch.ones(len(expected["start"]), dtype=torch.bool)
    for gradient in expected["gradients"]:
        size = gradient.abs()
        counts &= (size == 0) | (size > NOISE * size.max())
    change = (expected["parameters"] - expected["start"])[counts]
    change_error = distance(found["parameters"][counts], expected["parameters"][counts])
    change_error /= max(change.norm().item(), 1e-300)
    is_right = (
        gradient_error < GRADIENT_TOLERANCE and change_error < CHANGE_TOLERANCE and found["ranks agree"]
    )
    seconds = time.monotonic() - began
    verdict = "" if is_right else "  DIFFERS" if found["ranks agree"] else "  RANKS DIFFER"
    print(
        f"{name:>16} {found['fillers']:>8} {gradient_error:>10.1e} {change_error:>11.1e} {seconds:>8.1f}{verdict}"
    )
    return is_right


def distance(one: Tensor, other: Tensor) -> float:
    return (one - other).norm().item()


def train_rank(world: World, job: Job, num_batches: int, folder: str) -> None:
    """Make the updates through the trainer, as this rank, and let rank 0 write what came of them."""
    task, model = build(job.config, world.device)
    examples = ChosenExamples(task.open_split("train"), job.indices)
    if world.size * num_batches == 1:
        updates = [
            [MicroBatch(examples.collate([examples[place] for place in places]), 1.0)]
            for places in job.updates
        ]
    else:
        updates = list(updates_of(job.config, examples, num_batches, world=world))
    trainer = Trainer(
        task,
        model,
        replace(job.config.optimization, precision="fp32"),  # that is, in the model's own float64
        world=world,
        seed=job.config.seed,
        updates_per_epoch=len(job.updates),
    )
    kept, names = trainer.weights, [name for name, _ in model.named_parameters()]

    def gradient(name: str) -> Tensor | None:
        part = kept.trained[name].grad if name in kept.trained else None
        return None if part is None else kept.whole(name, part)

    gradients: list[Tensor] = []
    trainer.optimizer.register_step_pre_hook(
        lambda *_: gradients.append(flat([gradient(name) for name in names], model))
    )
    with trainer.metrics.scope("train"):
        for micro_batches in updates:
            trainer.train_step(micro_batches)
    parameters = flat([kept.whole(name, kept.tensors()[name]) for name in names], model)
    digests = world.gather(hashlib.sha256(parameters.numpy()).hexdigest())
    fillers = sum(world.gather(sum(micro_batch.weight == 0 for update in updates for micro_batch in update)))
    if world.is_main:
        found = {"gradients": gradients, "parameters": parameters, "fillers": fillers}
        torch.save({**found, "ranks agree": len(set(digests)) == 1}, Path(folder) / "layout.pt")


def run_ranks(function: Callable[..., None], *args: Any, size: int) -> None:
    """Call `function(world, *args)` on each of `size` ranks, in processes of their own."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    mp.spawn(run_rank, args=(function, args, size, port), nprocs=size)


def run_rank(rank: int, function: Callable[..., None], args: tuple[Any, ...], size: int, port: int) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    os.environ |= dict(zip(names, map(str, (rank, rank, size, "127.0.0.1", port)), strict=True))
    job = args[0]
    with join_world(job.config.device) as world:
        function(world, *args)


if __name__ == "__main__":
    main()
