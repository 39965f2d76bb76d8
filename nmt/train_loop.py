"""The story of a run: epochs, updates, reports, validation, checkpoints, and when to stop."""

from contextlib import closing
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from nmt.checkpoint import CheckpointFolder, load_weights
from nmt.compilation import compile_failures, compile_model
from nmt.config import check_options, write_yaml
from nmt.data.batch_iterator import BatchIterator, OrderedBatches
from nmt.determinism import deterministic_algorithms
from nmt.distributed import World, join_world
from nmt.errors import UserError
from nmt.forecast import forecast
from nmt.memory import find_packed_split, find_split
from nmt.options import TrainConfig
from nmt.preparation import left_out, packing, refuse_other_run, with_max_tokens
from nmt.progress import Direction, Progress
from nmt.reports import Clock, Reports
from nmt.run_log import RunLog, read_records
from nmt.signals import StopRequest
from nmt.task import Examples, Task
from nmt.trainer import Trainer

_GPU_WORKERS = 2  # a GPU takes batches faster than the process that launches its work could read them
_LOWEST_LR_SCALE = 2.0**-5  # of five times back the last one has failed


@dataclass(frozen=True)
class TrainingResult:
    """What has come of a run."""

    best: Path
    """The folder of the best checkpoint, or the last one if none was validated: a model, ready to use."""
    history: list[dict[str, Any]]
    """What the run has reported, oldest first, also before it was resumed: the records of metrics.jsonl. Each has
    its "kind" ("train" since the last report, "epoch", "valid"), its "update", and what was measured."""
    stopped_because: str
    """The limit that was reached."""


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
    check_options(config)
    timeout = timedelta(minutes=config.rank_timeout)
    with (
        compile_failures(config.optimization.compile),
        deterministic_algorithms(config.deterministic),
        join_world(config.device, timeout=timeout) as world,
        closing(Run(config, world, stop or StopRequest())) as run,
    ):
        if config.dry_run:
            lines = run.describe()
            if world.is_main:
                print("\n".join(lines))
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
        self.metric = config.checkpoints.best_checkpoint_metric
        if self.metric not in self.task.metrics:
            known = ", ".join(self.task.metrics)
            raise UserError(
                f"`best-checkpoint-metric` must be one of {known}, but is {self.metric}. Name one."
            )
        self.better: Direction = self.task.metrics[self.metric]
        self.train_examples: Examples[Any] = self.task.open_split("train")
        self.valid_examples: Examples[Any] = self.task.open_split("valid")
        torch.manual_seed(config.seed)
        model = self.task.build_model().to(world.device)
        self.checkpoints = CheckpointFolder(config.save_dir / "checkpoints")
        self.config = config = with_max_tokens(
            config, self.task, model, self.train_examples, world=world, checkpoints=self.checkpoints
        )
        self.packing = packing(config, self.task, self.train_examples, world.device)
        if config.optimization.compile and self.packing is None:
            sizes = self.train_examples.sizes
            compile_model(model, has_one_shape=bool((sizes == sizes[:1]).all()))
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
        self.reports = Reports(self.log, self.trainer, self.batches, config.optimization)
        self.progress = Progress()
        # Epoch of the last update. That of `batches` moves on when its iteration ends; one that is taken up after
        # an epoch's last update yields nothing more, and then moves on.
        self.epoch = self.batches.epoch
        self.clock = Clock()
        self.is_out_of_time = False

    def train(self) -> TrainingResult:
        """Go from where the run stands to its end."""
        self.log.open()
        self._resume_or_start()
        while not (reason := self._reason_to_stop()) and not self.is_stopping:
            self._train_epoch()
        if reason is None:
            return self._end_early()
        if self.trainer.update not in self.progress.values:
            self._validate_and_save()
        self.log.say(f"finished: {reason}")
        return self._result(reason)

    def describe(self) -> list[str]:
        """Return the lines that tell what the run is going to be; changes nothing."""
        lines = left_out(self.batches, self.config)  # first, since it ends the run if nothing is left
        self._decide_split()
        return lines + forecast(
            self.config,
            self.trainer,
            self.batches,
            train_examples=self.batches.examples,
            valid_examples=self.valid_examples,
        )

    def _decide_split(self) -> None:
        """Find out whether batches fit into memory, and let those that do not be run in parts."""
        first_batches, max_tokens = self.batches.first_batches, self.config.batching.max_tokens
        if self.packing is None:
            found = find_split(self.trainer, self.train_examples, first_batches)
        else:
            assert isinstance(max_tokens, int)
            found = find_packed_split(
                self.trainer, self.packing.pack, first_batches[0][:1], max_tokens=max_tokens
            )
        # What a run was split by stays, or it would round otherwise when it is resumed with more memory.
        limits = [limit for limit in (found, self.batches.split_above) if limit is not None]
        self.batches.split_above = min(limits, default=None)
        if self.packing is not None and isinstance(max_tokens, int):
            self.batches.collate_with(self.packing.pack(min([max_tokens, *limits])))

    def close(self) -> None:
        """End the processes that read batches ahead, and close the log."""
        self.batches.close()
        self.valid_batches.close()
        self.trainer.close()
        self.log.close()

    def _train_epoch(self) -> None:
        """Make the updates that are left of this epoch, or fewer if the run ends within it."""
        options, metrics = self.config.checkpoints, self.trainer.metrics
        self.epoch = self.batches.epoch
        self.clock.start_training()
        for micro_batches in self.batches:
            # "train" is what has been seen since the last report, "epoch" since the epoch began.
            with metrics.scope("epoch"), metrics.scope("train"):
                self.trainer.train_step(
                    micro_batches, epoch=self.epoch, wants_stop=self.stop.reason is not None
                )
            self._note_stop()
            self.clock.count_training()
            self.reports.update(epoch=self.epoch, clock=self.clock)
            if self.trainer.cancellations.known_in_a_row() >= self.config.optimization.max_bad_updates:
                self._go_back()
                return
            update = self.trainer.update
            if update % self.config.log_interval == 0:
                self._report("train")
            if self.is_stopping and self._reason_to_stop() is None:
                return  # what else is due now is made up for when the run is taken up
            if _is_due(update, options.validate_interval_updates):
                self._validate_and_save()
            elif (
                _is_due(update, options.save_interval_updates) or _is_due(update, options.keep_every_updates)
            ) and not self._will_validate():
                self._save()
            if self._reason_to_stop() or self.is_stopping:
                return  # at the end of an epoch too: it is reported if the run is resumed with a later end
            self.clock.start_training()
        self._report("epoch")
        if _is_due(self.epoch, options.validate_interval) and self.trainer.update not in self.progress.values:
            self._validate_and_save()
        elif _is_due(self.epoch, options.keep_every_epochs):
            self._save()

    def _will_validate(self) -> bool:
        """Return whether a validation, which saves too, follows before the next update."""
        is_due = self._is_end_of_epoch() and _is_due(self.epoch, self.config.checkpoints.validate_interval)
        return is_due or self._reason_to_stop() is not None

    def _is_end_of_epoch(self) -> bool:
        has_moved_on = self.batches.epoch > self.epoch
        return has_moved_on or self.batches.examples_consumed == self.batches.num_examples

    def _reason_to_stop(self) -> str | None:
        options = self.config.optimization
        if options.max_update is not None and self.trainer.update >= options.max_update:
            return f"reached max-update {options.max_update}"
        if options.max_epoch is not None and self.batches.epoch > options.max_epoch:
            return f"reached max-epoch {options.max_epoch}"
        if options.patience is not None and self.progress.num_without_better >= options.patience:
            return f"{self.metric} has not become better in {options.patience} validations (patience)"
        if self.is_out_of_time:
            return f"reached stop-time-hours {options.stop_time_hours:g}"
        if (
            options.stop_min_lr is not None
            and self.trainer.is_past_warmup
            and self.trainer.lr <= options.stop_min_lr
        ):
            return f"the learning rate has fallen to stop-min-lr {options.stop_min_lr:g}"
        return None

    def _validate_and_save(self) -> None:
        """Measure the validation set, note the value that decides which checkpoint is best, and save."""
        # Rank 0 decides for all: a difference in the last bit must not stop one rank and not another.
        results = self.world.broadcast(self.trainer.validate(self.valid_examples, self.valid_batches))
        self.progress.note(self.trainer.update, results[self.metric], better=self.better)
        if self.config.optimization.lr_scheduler == "plateau":
            self.trainer.plateau.note(results[self.metric], self.config.optimization, better=self.better)
        best = self.progress.values[self.progress.ranking(self.better)[0]]
        position = {"update": self.trainer.update, "epoch": self.epoch}
        best_so_far = {f"best {self.metric}": best, "hours": self.clock.hours}
        self.log.report("valid", {**position, **results, **best_so_far})
        if self.config.tensorboard:
            self.log.illustrate(self.trainer.update, self.trainer.illustrate(self.valid_examples))
        self._save()

    def _save(self) -> None:
        """Write a checkpoint, point the links at it, and remove those that need not be kept."""
        self._check_time()
        if self._is_kept_for_good():
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
                    optimizer=optimizer,
                    state={
                        "trainer": trainer_state,
                        "batches": self.batches.state_dict(),
                        "split_above": self.batches.split_above,
                        "progress": asdict(self.progress),
                        "clock": asdict(replace(self.clock, seconds_before=self.clock.seconds)),
                        "records_size": self.log.records_size(),
                    },
                )
                self._link_best_and_prune()
        self._agree_to_stop()  # which is a barrier, too

    def _end_early(self) -> TrainingResult:
        """Save where the run stands, after a request to stop."""
        update = self.trainer.update
        if update and update not in self.world.broadcast(self.checkpoints.updates()):
            self._save()
        reasons = self.world.gather(self.stop.reason)
        named = next((reason for reason in reasons if reason is not None), "a request")
        done = f"after update {update}, which is saved" if update else "before the first update"
        self.log.say(f"stopped: {named} {done}; the same command goes on from there")
        return self._result(named)

    def _result(self, reason: str) -> TrainingResult:
        path = self.checkpoints.path
        history = read_records(self.config.save_dir)[0] if self.world.is_main else []
        # A run that was ended before its first validation has no best one.
        best = self.checkpoints.linked("best" if (path / "best").exists() else "last")
        return TrainingResult(best, self.world.broadcast(history), reason)

    def _note_stop(self) -> None:
        """Take in what the update has told about the ranks' wishes: all take in the same."""
        is_single = self.world.size == 1
        self.is_stopping = self.stop.reason is not None if is_single else self.trainer.num_wanting_stop > 0

    def _agree_to_stop(self) -> None:
        """Ask all ranks whether one of them wants to stop, and wait for their answers."""
        wishes = torch.tensor([float(self.stop.reason is not None)], device=self.world.device)
        self.is_stopping = self.world.sum_(wishes).item() > 0

    def _is_kept_for_good(self) -> bool:
        options, update = self.config.checkpoints, self.trainer.update
        if self.epoch < options.keep_from_epoch or update in self.progress.kept:
            return False
        at_epoch = self._is_end_of_epoch() and _is_due(self.epoch, options.keep_every_epochs)
        return at_epoch or _is_due(update, options.keep_every_updates)

    def _link_best_and_prune(self) -> None:
        """Point `best` at the best checkpoint that is there, and remove those that need not be kept."""
        options = self.config.checkpoints
        # Later ones are of a part that the run has gone back behind.
        saved = [update for update in self.checkpoints.updates() if update <= self.trainer.update]
        best = [update for update in self.progress.ranking(self.better) if update in saved]
        if best:
            self.checkpoints.link("best", best[0])
        else:
            (self.checkpoints.path / "best").unlink(missing_ok=True)
        keep = {*saved[-options.keep_last :], *best[: options.keep_best], *self.progress.kept}
        # While updates are bad the newest are of no use (`_go_back`), and must not displace those that are.
        if not self.trainer.cancellations.known_in_a_row():
            self.checkpoints.prune(keep)

    def _resume_or_start(self) -> None:
        """Take the newest checkpoint up, or note the configuration of a new run."""
        saved = self.world.broadcast(self.checkpoints.updates())
        if saved:
            self._resume(saved[-1])
            self._check_time()  # may be up already, or be longer now
            if self._misses_validation():
                self._validate_and_save()
        else:
            self.log.cut_records(0, update=0)
        for line in self.describe():
            self.log.say(line)
        if self.world.is_main:
            write_yaml(self.config, self.config.save_dir / "config.yaml")
        self._agree_to_stop()

    def _misses_validation(self) -> bool:
        """Return whether the run was stopped right before a validation within an epoch."""
        update = self.trainer.update
        is_due = _is_due(update, self.config.checkpoints.validate_interval_updates)
        return is_due and update not in self.progress.values

    def _resume(self, update: int) -> None:
        folder = self.checkpoints.at(update)
        refuse_other_run(self.task, self.config, folder)
        self._load(update)
        self.log.say(f"resume: from {folder}, update {self.trainer.update}, epoch {self.batches.epoch}")

    def _load(self, update: int) -> None:
        """Take the state of a checkpoint over."""
        folder = self.checkpoints.at(update)
        optimizer, state = self.checkpoints.load_state(update)
        load_weights(self.trainer.model, folder)
        self.trainer.load_state_dict(optimizer, state["trainer"])
        self.batches.load_state_dict(state["batches"])
        self.batches.split_above = state["split_above"]
        self.progress = Progress.from_json(state["progress"])
        self.clock = Clock(**state["clock"])
        self.epoch = self.batches.epoch
        self.log.cut_records(state["records_size"], update=update)
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
        fault = f"The gradient must be finite, but was not in {limit} updates in a row"
        remedy = "Lower `lr`, set `clip-norm`, or look at the examples that train.log names."
        saved = self.world.broadcast(self.checkpoints.updates())
        lr_scale = self.trainer.lr_scale / 2
        if not saved:
            raise UserError(f"{fault}, before the first checkpoint. {remedy}")
        # The first of them may be bad by the weights that the update before it has made, at any learning rate.
        last_good = self.trainer.update - self.trainer.cancellations.known_in_a_row() - 2
        good = [update for update in saved if update <= last_good]
        if not good:
            raise UserError(
                f"{fault}, and no checkpoint is of earlier weights. Lower `lr` or set `clip-norm`, and "
                "begin a new run."
            )
        if lr_scale < _LOWEST_LR_SCALE:
            raise UserError(f"{fault}, with {self.trainer.lr_scale:g} of the learning rate too. {remedy}")
        seconds = self.clock.seconds
        self._load(good[-1])
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
        """Find out whether the time is up; rank 0's clock counts for all."""
        hours = self.config.optimization.stop_time_hours
        if hours is not None:
            self.is_out_of_time = self.world.broadcast(self.clock.seconds) >= hours * 3600


def _num_workers(config: TrainConfig[Any], world: World) -> int:
    chosen = config.batching.num_workers
    if chosen != "auto":
        return chosen
    return _GPU_WORKERS if world.device.type == "cuda" else 0


def _is_due(count: int, interval: int | None) -> bool:
    return interval is not None and count % interval == 0
