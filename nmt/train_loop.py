"""The story of a run: epochs, updates, reports, validation, checkpoints, and when to stop."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nmt.checkpoints.run_folder import CheckpointFolder, load_config, load_weights
from nmt.config.mapping import check_options, check_types, write_yaml
from nmt.data.batch_iterator import BatchIterator
from nmt.data.batch_loader import refuse_import_by_worker
from nmt.data.limits import are_all_equal
from nmt.data.ordered_batches import OrderedBatches
from nmt.distributed import World, join_world
from nmt.errors import UnreadableExamplesError, UserError, one_line
from nmt.options import TrainConfig
from nmt.run.advice import advice
from nmt.run.agenda import Due, Moment, due
from nmt.run.clock import Clock
from nmt.run.following import Followed
from nmt.run.forecast import cost_rows, size_rows, time_row
from nmt.run.going_back import checkpoint_to_go_back_to
from nmt.run.memory_probe import find_packed_split, find_split
from nmt.run.pace import try_updates
from nmt.run.preparation import (
    check_model,
    left_out,
    notes_on_padding,
    packing,
    refuse_other_run,
    with_max_tokens,
)
from nmt.run.reports import Reports
from nmt.run.resume import Resumption, compare, position_in_data, surroundings
from nmt.run.run_log import RunLog, read_records
from nmt.run.state import Position, RunState, Surroundings
from nmt.run.validation_history import Progress
from nmt.system.determinism import deterministic_algorithms
from nmt.system.places import check_outside_of_data, check_save_dir
from nmt.system.signals import StopRequest
from nmt.system.slower import telling_what_is_slower
from nmt.task import Examples, LooksOver, Task
from nmt.task_extras import folders_of, notes_of
from nmt.trainer import Trainer
from nmt.update.compilation import compile_failures, compile_model

_GPU_WORKERS = 2  # a GPU takes batches faster than the process that launches its work could read them


@dataclass(frozen=True)
class TrainingResult:
    """What has come of a run."""

    best: Path
    """The folder of the best checkpoint, or the last one if none was validated: a model, ready to use."""
    history: list[dict[str, Any]]
    """What the run has reported, oldest first, also before it was resumed: the records of metrics.jsonl. Each has
    its "kind" ("train" since the last report, "epoch", "valid"), its "update", and what was measured."""
    stopped_because: str
    """The limit that was reached, or who asked it to stop."""
    is_finished: bool = True
    """False if the same configuration goes on from here: the run was asked to stop."""


def train(config: TrainConfig[Any], *, stop: StopRequest | None = None) -> TrainingResult:
    """Train until a limit of the configuration is reached, going on from the last checkpoint if there is one.

    Under torchrun every rank calls this, and every rank gets the result.

    Args:
        config: Everything that determines the run.
        stop: A way to end the run early: at the request of any rank all of them finish an update and save.

    Raises:
        LostRankError: Another rank has ended, or does not answer.
        UserError: The configuration, the data or the checkpoint to go on from do not fit.
    """
    if not isinstance(config, TrainConfig):
        raise UserError(
            f"`config` must be a configuration, but is a {type(config).__name__}. "
            "Make one with nmt.train_config(data=..., save_dir=...)."
        )
    refuse_import_by_worker()
    check_types(config)
    check_options(config)
    check_save_dir(config.save_dir)
    timeout = timedelta(minutes=config.rank_timeout)
    with (
        compile_failures(config.optimization.compile),
        deterministic_algorithms(config.deterministic),
        join_world(config.device, timeout=timeout) as world,
    ):
        if world.was_stopped():  # torchrun takes a stopped rank for a failed one, and starts all again
            if world.is_main:
                print("stopped before torchrun started the ranks again: no update is made", file=sys.stderr)
            return TrainingResult(config.save_dir / "checkpoints" / "last", [], "an earlier request", False)
        return _train(config, world, stop or StopRequest())


def _train(config: TrainConfig[Any], world: World, stop: StopRequest) -> TrainingResult:
    with closing(Run(config, world, stop)) as run:
        if config.dry_run:
            for line in run.preview():
                if world.is_main:
                    print(one_line(line), flush=True)
            return TrainingResult(run.checkpoints.path / "best", [], "dry-run")
        return run.train()


class Run:
    """The parts of a run; `train` is its story."""

    def __init__(self, config: TrainConfig[Any], world: World, stop: StopRequest) -> None:
        """Open the data and build the model; nothing is written yet."""
        self.config = config
        self.world = world
        self.stop = stop
        self.is_stopping = False  # what the ranks have agreed on; `stop` is what this one knows
        self.task: Task[Any] = config.task_options.build(None)
        self.followed = Followed.of(config, self.task)
        self.train_examples: Examples[Any] = self.task.open_split("train")
        self.valid_examples: Examples[Any] = self.task.open_split("valid")
        for examples in (self.train_examples, self.valid_examples):
            check_outside_of_data(config.save_dir, folders_of(examples), name="save-dir")
        torch.manual_seed(config.seed)
        model = self.task.build_model().to(world.device)
        self.checkpoints = CheckpointFolder(config.save_dir / "checkpoints")
        self.config, self.chosen = with_max_tokens(
            config, self.task, model, self.train_examples, world=world, checkpoints=self.checkpoints
        )
        config = self.config
        given = config, self.task, model, self.train_examples, world.device
        self.packing = packing(*given)
        self.chosen += notes_on_padding(*given)
        if config.optimization.compile and self.packing is None:
            compile_model(model, has_one_shape=are_all_equal(self.train_examples.sizes))
        self.batches = BatchIterator(
            self.train_examples,
            config.batching,
            seed=config.seed,
            rank=world.rank,
            world_size=world.size,
            num_workers=_num_workers(config, world),
            pin_memory=world.device.type == "cuda",
            limits=None if self.packing is None else self.packing.limits,
        )
        self.valid_batches = OrderedBatches(
            self.valid_examples,
            config.batching,
            rank=world.rank,
            world_size=world.size,
            pin_memory=world.device.type == "cuda",
        )
        self.trainer = Trainer(
            self.task,
            model,
            config.optimization,
            world=world,
            seed=config.seed,
            updates_per_epoch=self.batches.updates_per_epoch,
            has_one_shape=self.packing is not None,
        )
        self.log = RunLog(config.save_dir, is_writer=world.is_main, tensorboard=config.tensorboard)
        self.reports = Reports(self.log, self.trainer, self.batches, config)
        self.surroundings: Surroundings = surroundings(
            self.trainer, self.batches, train_examples=self.train_examples, valid_examples=self.valid_examples
        )
        self.progress = Progress()
        # Epoch of the last update. That of `batches` moves on when its iteration ends; one that is taken up after
        # an epoch's last update yields nothing more, and then moves on.
        self.epoch = self.batches.epoch
        self.clock = Clock()
        self.told_seconds = 0.0  # of rank 0's clock

    def train(self) -> TrainingResult:
        """Go from where the run stands to its end."""
        self.log.open()
        self._resume_or_start()
        try:
            while not (now := self._due()).is_last:
                self._train_epoch()
            self._raise_refusals()
            if now.validate_at_end:
                self._validate_and_save()
        except UnreadableExamplesError as error:  # all ranks are here
            raise UserError(f"{error} {self._save_where_it_stands()}".rstrip()) from error
        if now.reason is None:
            return self._end_early()
        self.reports.end(now.reason, best=self._best_path(), progress=self.progress, followed=self.followed)
        return self._result(now.reason, is_finished=True)

    def describe(self) -> Iterator[str]:
        """Yield the lines that tell what the run is going to be, as they become known; changes nothing."""
        yield from left_out(self.batches, self.config)  # first, since it ends the run if nothing is left
        yield from self.chosen
        yield from [*notes_of(self.train_examples), *notes_of(self.valid_examples)]
        if isinstance(self.task, LooksOver):
            yield from self.task.look_over(self.train_examples, self.valid_examples, self.world)
        yield from advice(self.config, self.surroundings)
        check_model(self.task, self.trainer.model, self.world)
        yield from size_rows(
            self.trainer,
            self.batches,
            train_examples=self.batches.examples,
            valid_examples=self.valid_examples,
        )
        slower: list[str] = []
        with telling_what_is_slower(slower):  # the first batches try kernels out
            self._decide_split()
            costs = cost_rows(self.trainer, self.batches, train_examples=self.batches.examples)
        yield from [*slower, *costs]

    def preview(self) -> Iterator[str]:
        """Yield the lines that the run would begin with and, later, one on the time; nothing is written.

        Afterwards this process can no longer train.
        """
        saved = self.world.broadcast(self.checkpoints.updates())
        if saved:
            yield from self._take_up(saved[-1])[0].lines
        done = self.trainer.update
        yield from self.describe()
        seconds = try_updates(self.trainer, self.batches)
        yield time_row(self.config, self.batches, seconds=seconds, done=done)

    def _decide_split(self) -> None:
        """Find out whether batches fit into memory, and let those that do not be run in parts."""
        first_batches, max_tokens = self.batches.first_batches, self.config.batching.max_tokens
        if self.packing is None:
            found = find_split(self.trainer, self.train_examples, first_batches)
        else:
            assert isinstance(max_tokens, int)
            longest = self.batches.survey.longest
            found = find_packed_split(
                self.trainer, self.packing.pack, first_batches[0][:1], longest=longest, max_tokens=max_tokens
            )
        # What a run was split by stays, or it would round otherwise when it is resumed with more memory.
        self.batches.split_above = split_above = _lower(found, self.batches.split_above)
        if self.packing is not None and isinstance(max_tokens, int):
            # A run that was padded so far may have been split by less.
            size = max_tokens if split_above is None else min(max_tokens, max(split_above, longest))
            self.batches.collate_with(self.packing.pack(max_tokens=size))

    def close(self) -> None:
        """End the processes that read batches ahead, and close the log."""
        self.batches.close()
        self.valid_batches.close()
        self.trainer.close()
        self.log.close()

    def _train_epoch(self) -> None:
        """Make the updates that are left of this epoch, or fewer if the run ends within it."""
        metrics = self.trainer.metrics
        self.epoch = self.batches.epoch
        self.clock.start_training()
        for micro_batches in self.reports.waiting.watch(self.batches):
            # "train" is what has been seen since the last report, "epoch" since the epoch began.
            with metrics.scope("epoch"), metrics.scope("train"):
                self.trainer.train_step(micro_batches, epoch=self.epoch, wants_stop=self._wants_stop())
            self._note_stop()
            self.clock.count_training()
            self.reports.update(epoch=self.epoch, clock=self.clock)
            if self.trainer.cancellations.known_in_a_row() >= self.config.optimization.max_bad_updates:
                self._go_back()
                return
            if self._due().report:
                self._report("train")
            self._validate_or_save(self._due())
            if self._due().is_last:
                return  # at the end of an epoch too: it is reported if the run is resumed with a later end
            self.clock.start_training()
        self._report("epoch")
        self._validate_or_save(self._due())

    def _due(self) -> Due:
        """Return what is due where the run stands."""
        batches, trainer, update = self.batches, self.trainer, self.trainer.update
        moment = Moment(
            update=update,
            epoch=self.epoch,
            is_epoch_complete=batches.examples_consumed == batches.num_examples,
            is_epoch_over=batches.epoch > self.epoch,
            is_validated=update in self.progress.values,
            is_kept=update in self.progress.kept,
            is_asked_to_stop=self.is_stopping,
            num_without_better=self.progress.num_without_better,
            seconds=self.told_seconds,
            lr=trainer.lr,
            is_past_warmup=trainer.is_past_warmup,
        )
        return due(moment, self.config)

    def _validate_or_save(self, now: Due) -> None:
        if now.validate:
            self._validate_and_save()
        elif now.save:
            self._save()

    def _validate_and_save(self) -> None:
        """Measure the validation set, note the values of the metrics that are followed, and save."""
        start, options = self.clock.seconds, self.config.optimization
        # Rank 0 decides for all: a difference in the last bit must not stop one rank and not another.
        results = self.world.broadcast(self.trainer.validate(self.valid_examples, self.valid_batches))
        self.followed.note(self.progress, self.trainer.update, results)
        if options.lr_scheduler == "plateau":
            metric = self.followed.plateau
            self.trainer.plateau.note(results[metric], options, better=self.followed.better[metric])
        position = {"update": self.trainer.update, "epoch": self.epoch}
        best_so_far = {**self.followed.best_values(self.progress), "hours": self.clock.hours}
        self.reports.validation({**position, **results, **best_so_far})
        self.reports.remarks(self.valid_examples, results)
        if self.config.tensorboard:
            self.log.illustrate(self.trainer.update, self.trainer.illustrate(self.valid_examples))
        self._save()
        self.reports.pace.validation_seconds = self.clock.seconds - start

    def _save(self) -> None:
        """Write a checkpoint, point the links at it, and remove those that need not be kept."""
        self._check_time()
        if self._due().keep:
            self.progress.kept.append(self.trainer.update)
        with self.trainer.evaluated_weights():
            optimizer, trainer_state = self.trainer.state_dict()
            self.reports.cancelled()  # what has just been learned belongs to the updates before this checkpoint
            if self.world.is_main:
                self.checkpoints.save(
                    self.trainer.update,
                    model=self.trainer.model,
                    task=self.task,
                    config=self.config,
                    measured=self.progress.measured.get(self.trainer.update),
                    optimizer=optimizer,
                    state=self._state(trainer_state).to_json(),
                )
                self._link_best_and_prune()
        self._agree_to_stop()  # which is a barrier, too

    def _state(self, trainer_state: Mapping[str, Any]) -> RunState:
        return RunState(
            trainer=trainer_state,
            batches=self.batches.state_dict(),
            split_above=self.batches.split_above,
            surroundings=self.surroundings,
            progress=self.progress,
            clock=self.clock.stopped(),
            records_size=self.log.records_size(),
        )

    def _end_early(self) -> TrainingResult:
        """Save where the run stands, after a request to stop."""
        update = self.trainer.update
        self._save_where_it_stands()
        reasons = self.world.gather(self.stop.reason)
        named = next((reason for reason in reasons if reason is not None), "a request")
        self.world.note_stop()
        done = f"after update {update}, which is saved" if update else "before the first update"
        self.log.say(f"stopped: {named} {done}; the same command goes on from there")
        return self._result(named, is_finished=False)

    def _save_where_it_stands(self) -> str:
        """Save what has been trained, and say so."""
        update = self.trainer.update
        if update and update not in self.world.broadcast(self.checkpoints.updates()):
            self._save()
        return f"Update {update} is saved, and the same command goes on from there." if update else ""

    def _raise_refusals(self) -> None:
        """Raise `UnreadableExamplesError` on every rank if one of them could not read its batch."""
        for refusal in self.world.gather(self.batches.refusal):
            if refusal is not None:
                raise refusal.error()

    def _wants_stop(self) -> bool:
        """Return what this rank alone knows of."""
        return self.stop.reason is not None or self.batches.refusal is not None

    def _result(self, reason: str, *, is_finished: bool) -> TrainingResult:
        history = read_records(self.config.save_dir)[0] if self.world.is_main else []
        return TrainingResult(self._best_path(), self.world.broadcast(history), reason, is_finished)

    def _best_path(self) -> Path:
        path = self.checkpoints.path
        # A run that was ended before its first validation has no best one.
        return self.checkpoints.linked("best" if (path / "best").exists() else "last")

    def _note_stop(self) -> None:
        """Take in what the update has told about the ranks' wishes: all take in the same."""
        is_single = self.world.size == 1
        self.is_stopping = self._wants_stop() if is_single else self.trainer.num_wanting_stop > 0

    def _agree_to_stop(self) -> None:
        """Ask all ranks whether one of them wants to stop, and wait for their answers."""
        wishes = torch.tensor([float(self._wants_stop())], device=self.world.device)
        self.is_stopping = self.world.sum_(wishes).item() > 0

    def _link_best_and_prune(self) -> None:
        """Point the links at the best checkpoints that are there, and remove those that need not be kept."""
        self.followed.link_best_and_prune(
            self.checkpoints,
            self.progress,
            self.config.checkpoints,
            update=self.trainer.update,
            # While updates are bad the newest are of no use (`_go_back`), and must not displace those that are.
            may_prune=not self.trainer.cancellations.known_in_a_row(),
        )

    def _resume_or_start(self) -> None:
        """Take the newest checkpoint up, or note the configuration of a new run."""
        saved = self.world.broadcast(self.checkpoints.updates())
        if saved:
            self._resume(saved[-1])
            self._check_time()  # may be up already, or be longer now
            if self._due().validate:  # the run was stopped right before it
                self._validate_and_save()
        else:
            self.log.cut_records(0, update=0)
        for line in self.describe():
            self.log.say(line)
        if self.world.is_main:
            write_yaml(self.config, self.config.save_dir / "config.yaml")
        self._agree_to_stop()

    def _resume(self, update: int) -> None:
        resumption, state = self._take_up(update)
        self._forget_what_came_after(update, state)
        resumption.report(self.log, update=update, epoch=self.batches.epoch)

    def _take_up(self, update: int) -> tuple[Resumption, RunState]:
        """Take over where a checkpoint stands, and find out what is other than it was then; nothing is written."""
        folder = self.checkpoints.at(update)
        with self.checkpoints.offering_an_earlier(update):
            refuse_other_run(self.task, self.config, folder)
            optimizer, state = self._read(update)
            resumption = compare(load_config(folder), self.config, state, self.surroundings, folder=folder)
            self._load(update, optimizer, state, position=resumption.position)
        return resumption, state

    def _load(
        self, update: int, optimizer: Mapping[str, Tensor], state: RunState, *, position: Position
    ) -> None:
        """Take the state of a checkpoint over, to go on from a position in the data."""
        load_weights(self.trainer.model, self.checkpoints.at(update))
        self.trainer.load_state_dict(optimizer, state.trainer)
        self.batches.load_state_dict(position)
        # What has been found too large for this device stays so where an earlier process had more memory.
        self.batches.split_above = _lower(state.split_above, self.batches.split_above)
        self.progress, self.clock = state.progress, state.clock
        # That of the last update; a run may have been saved after an epoch whose validation could not be made.
        self.epoch = self.batches.epoch - (state.batches["examples_consumed"] == 0)

    def _read(self, update: int) -> tuple[Mapping[str, Tensor], RunState]:
        optimizer, state = self.checkpoints.load_state(update)
        return optimizer, RunState.from_json(state)

    def _forget_what_came_after(self, update: int, state: RunState) -> None:
        """Take back what was reported after the checkpoint that has been loaded, and see to links and old ones."""
        self.log.cut_records(state.records_size, update=update)
        # No rank may still be reading when rank 0 removes old checkpoints.
        self.world.barrier()
        if self.world.is_main:
            # A process may have been killed before it did this.
            self.checkpoints.link("last", update)
            self._link_best_and_prune()

    def _go_back(self) -> None:
        """Take the last good checkpoint up again with half the learning rate, after too many cancelled updates.

        Raises:
            UserError: There is none, or this has been tried too often.
        """
        limit = self.config.optimization.max_bad_updates
        saved = self.world.broadcast(self.checkpoints.updates())
        good, lr_scale = checkpoint_to_go_back_to(saved, self.trainer, limit=limit)
        seconds = self.clock.seconds
        optimizer, state = self._read(good)
        position, _ = position_in_data(state, self.surroundings, accepts_changed=True)
        self._load(good, optimizer, state, position=position)
        self._forget_what_came_after(good, state)
        self.clock.seconds_before = seconds  # what was in vain was spent all the same
        self.trainer.lr_scale = lr_scale
        self.log.report(
            "back",
            {"update": self.trainer.update, "epoch": self.epoch, "lr scale": lr_scale, "bad updates": limit},
        )

    def _report(self, scope: str) -> None:
        """Log what a scope has seen, and empty it."""
        self.reports.scope(scope, epoch=self.epoch, clock=self.clock)
        self._check_time()

    def _check_time(self) -> None:
        """Look at rank 0's clock, which counts for all."""
        if self.config.optimization.stop_time_hours is not None:
            self.told_seconds = self.world.broadcast(self.clock.seconds)


def _num_workers(config: TrainConfig[Any], world: World) -> int:
    chosen = config.batching.num_workers
    if chosen != "auto":
        return chosen
    return _GPU_WORKERS if world.device.type == "cuda" else 0


def _lower(one: int | None, other: int | None) -> int | None:
    return min((limit for limit in (one, other) if limit is not None), default=None)
