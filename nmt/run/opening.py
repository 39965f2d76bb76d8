"""The parts of a run: opens its data, model and log and puts them together; nothing is written."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from nmt.checkpoints.run_folder import CheckpointFolder
from nmt.data.batch_iterator import BatchIterator
from nmt.data.limits import are_all_equal
from nmt.data.ordered_batches import OrderedBatches
from nmt.distributed import World
from nmt.options import TrainConfig
from nmt.run.agenda import Due, Moment, due
from nmt.run.clock import Clock
from nmt.run.following import Followed
from nmt.run.memory_probe import with_max_tokens
from nmt.run.packing import Packing, notes_on_padding, packing
from nmt.run.reports import Reports
from nmt.run.resume import surroundings
from nmt.run.run_log import RunLog
from nmt.run.state import RunState, Surroundings
from nmt.run.stop_votes import StopVotes
from nmt.run.validation_history import Progress
from nmt.system.places import check_outside_of_data
from nmt.system.signals import StopRequest
from nmt.task import Examples, Task
from nmt.task_extras import folders_of
from nmt.trainer import Trainer
from nmt.update.compilation import compile_model

_GPU_WORKERS = 2  # a GPU needs batches faster than the process that launches its work can read them


@dataclass(kw_only=True)
class Run:
    """The parts of a run, and where it stands. Its story is `nmt/train_loop.py`."""

    config: TrainConfig[Any]
    """The given configuration, with a number for `max-tokens` auto."""
    world: World
    votes: StopVotes
    task: Task[Any]
    followed: Followed
    train_examples: Examples[Any]
    valid_examples: Examples[Any]
    packing: Packing | None
    batches: BatchIterator
    valid_batches: OrderedBatches
    trainer: Trainer
    checkpoints: CheckpointFolder
    log: RunLog
    reports: Reports
    surroundings: Surroundings
    chosen: Sequence[str]
    """Lines on what was chosen for this run."""

    # `batches.epoch` moves on when its iteration ends. If a run is resumed after the last update of an epoch, that
    # iteration yields nothing, and then `batches.epoch` moves on.
    epoch: int
    """That of the last update."""
    progress: Progress = field(default_factory=Progress)
    clock: Clock = field(default_factory=Clock)
    told_seconds: float = 0.0
    """Time spent on the run, as rank 0 told it last."""

    def due(self) -> Due:
        """Return what is due where the run stands."""
        batches, trainer, update = self.batches, self.trainer, self.trainer.update
        moment = Moment(
            update=update,
            epoch=self.epoch,
            is_epoch_complete=batches.examples_consumed == batches.num_examples,
            is_epoch_over=batches.epoch > self.epoch,
            is_validated=update in self.progress.values,
            is_kept=update in self.progress.kept,
            is_asked_to_stop=self.votes.is_agreed,
            num_without_better=self.progress.num_without_better,
            seconds=self.told_seconds,
            lr=trainer.lr,
            is_past_warmup=trainer.is_past_warmup,
        )
        return due(moment, self.config)

    def state(self, trainer_state: dict[str, Any]) -> RunState:
        """Return what a checkpoint must remember, including the trainer's part."""
        return RunState(
            trainer=trainer_state,
            batches=self.batches.state_dict(),
            split_above=self.batches.split_above,
            surroundings=self.surroundings,
            progress=self.progress,
            clock=self.clock.stopped(),
            records_size=self.log.records_size(),
        )

    def look_at_clock(self) -> None:
        """If a time limit is set, note how long the run has taken; rank 0's clock counts for all."""
        if self.config.optimization.stop_time_hours is not None:
            self.told_seconds = self.world.broadcast(self.clock.seconds)

    def link_best_and_prune(self) -> None:
        """Point the links at the best checkpoints that are there, and remove those that need not be kept."""
        self.followed.link_best_and_prune(
            self.checkpoints,
            self.progress,
            self.config.checkpoints,
            update=self.trainer.update,
            # While updates are bad, the newest checkpoints are useless (`go_back`) and must not replace good ones.
            may_prune=not self.trainer.cancellations.known_in_a_row(),
        )

    def close(self) -> None:
        """End the processes that read batches ahead, and close the log."""
        self.batches.close()
        self.valid_batches.close()
        self.trainer.close()
        self.log.close()


def open_run(config: TrainConfig[Any], world: World, stop: StopRequest) -> Run:
    """Open the data and build the model; on a GPU with `max-tokens` auto, find out how large batches may be.

    Every rank must call this.

    Raises:
        UserError: The configuration and the data do not fit.
    """
    task: Task[Any] = config.task_options.build(None)
    followed = Followed.of(config, task)
    train_examples, valid_examples = task.open_split("train"), task.open_split("valid")
    for examples in (train_examples, valid_examples):
        check_outside_of_data(config.save_dir, folders_of(examples), name="save-dir")
    torch.manual_seed(config.seed)
    model = task.build_model().to(world.device)
    checkpoints = CheckpointFolder(config.save_dir / "checkpoints")
    config, chosen = with_max_tokens(
        config, task, model, train_examples, world=world, checkpoints=checkpoints
    )
    packed = packing(config, task, model, train_examples, world.device)
    chosen += notes_on_padding(config, task, model, train_examples, world.device)
    if config.optimization.compile and packed is None:
        compile_model(model, has_one_shape=are_all_equal(train_examples.sizes))
    batches, valid_batches = _open_batches(config, world, train_examples, valid_examples, packed)
    trainer = Trainer(
        task,
        model,
        config.optimization,
        world=world,
        seed=config.seed,
        updates_per_epoch=batches.updates_per_epoch,
        has_one_shape=packed is not None,
    )
    log = RunLog(config.save_dir, is_writer=world.is_main, tensorboard=config.tensorboard)
    return Run(
        config=config,
        world=world,
        votes=StopVotes(stop, batches, world),
        task=task,
        followed=followed,
        train_examples=train_examples,
        valid_examples=valid_examples,
        packing=packed,
        batches=batches,
        valid_batches=valid_batches,
        trainer=trainer,
        checkpoints=checkpoints,
        log=log,
        reports=Reports(log, trainer, batches, config),
        surroundings=surroundings(
            trainer, batches, train_examples=train_examples, valid_examples=valid_examples
        ),
        chosen=chosen,
        epoch=batches.epoch,
    )


def _open_batches(
    config: TrainConfig[Any],
    world: World,
    train_examples: Examples[Any],
    valid_examples: Examples[Any],
    packed: Packing | None,
) -> tuple[BatchIterator, OrderedBatches]:
    """Return the batches of training and those of validation, this rank's share of each."""
    pin_memory = world.device.type == "cuda"
    num_workers = config.batching.num_workers
    if num_workers == "auto":
        num_workers = _GPU_WORKERS if world.device.type == "cuda" else 0
    batches = BatchIterator(
        train_examples,
        config.batching,
        seed=config.seed,
        rank=world.rank,
        world_size=world.size,
        num_workers=num_workers,
        pin_memory=pin_memory,
        limits=None if packed is None else packed.limits,
    )
    valid_batches = OrderedBatches(
        valid_examples, config.batching, rank=world.rank, world_size=world.size, pin_memory=pin_memory
    )
    return batches, valid_batches
