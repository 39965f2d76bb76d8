"""The story of a run: epochs, updates, reports, validation, checkpoints, and when to stop."""

import filecmp
import math
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch

from nmt.checkpoint import CheckpointFolder, load_config, load_weights
from nmt.config import changed_fixed_options, check_options, write_yaml
from nmt.data.batch_iterator import BatchIterator, ordered_batches
from nmt.determinism import deterministic_algorithms
from nmt.distributed import World, join_world
from nmt.errors import UserError
from nmt.options import TrainConfig
from nmt.run_log import RunLog
from nmt.signals import StopRequest
from nmt.task import Examples, Task
from nmt.trainer import Trainer

Direction = Literal["min", "max"]


def train(config: TrainConfig[Any], *, stop: StopRequest | None = None) -> Path:
    """Train until a limit of the configuration is reached, going on from the last checkpoint if there is one.

    Under torchrun every rank calls this.

    Args:
        config: Everything that determines the run.
        stop: A way to end the run early: at the request of any rank all of them finish an update and save.

    Returns:
        The folder of the best checkpoint; of the last one if the run was ended before its first validation.

    Raises:
        LostRankError: Another rank has ended, or does not answer.
        UserError: The configuration, the data or the checkpoint to go on from do not fit.
    """
    check_options(config)
    timeout = timedelta(minutes=config.rank_timeout)
    with (
        deterministic_algorithms(config.deterministic),
        join_world(config.device, timeout=timeout) as world,
        closing(Run(config, world, stop or StopRequest())) as run,
    ):
        return run.train()


@dataclass
class Progress:
    """What a run remembers besides the trainer's state and its place in the data.

    Attributes:
        values: The value of `best-checkpoint-metric` after each update that was validated.
        num_without_better: Validations since the best one.
        interval_seconds: Time spent in training since the last report.
    """

    values: dict[int, float] = field(default_factory=dict)
    num_without_better: int = 0
    interval_seconds: float = 0.0

    def note(self, update: int, value: float, *, better: Direction) -> None:
        """Take in a validation."""
        self.values[update] = value
        self.num_without_better = 0 if self.ranking(better)[0] == update else self.num_without_better + 1

    def ranking(self, better: Direction) -> list[int]:
        """Return the validated updates, best first; the earlier of equals first, what is not a number last."""
        sign = 1 if better == "min" else -1

        def rank(update: int) -> tuple[bool, float, int]:
            value = self.values[update]
            return (True, 0.0, update) if math.isnan(value) else (False, sign * value, update)

        return sorted(self.values, key=rank)


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
        train_examples = self.task.open_split("train")
        self.valid_examples: Examples[Any] = self.task.open_split("valid")
        self.batches = BatchIterator(
            train_examples,
            config.batching,
            seed=config.seed,
            rank=world.rank,
            world_size=world.size,
            pin_memory=world.device.type == "cuda",
        )
        torch.manual_seed(config.seed)
        model = self.task.build_model()
        self.trainer = Trainer(self.task, model, config.optimization, world=world, seed=config.seed)
        self.checkpoints = CheckpointFolder(config.save_dir / "checkpoints")
        self.log = RunLog(config.save_dir, is_writer=world.is_main)
        self.progress = Progress()
        # Epoch of the last update. That of `batches` moves on when its iteration ends; one that is taken up after
        # an epoch's last update yields nothing more, and then moves on.
        self.epoch = self.batches.epoch
        self.clock = time.monotonic()

    def train(self) -> Path:
        """Go from where the run stands to its end; return the folder of the best checkpoint."""
        self.log.open()
        self._check_lengths()
        self._resume_or_start()
        while not (reason := self._reason_to_stop()) and not self.is_stopping:
            self._train_epoch()
        if reason is None:
            return self._end_early()
        if self.trainer.update not in self.progress.values:
            self._validate_and_save()
        self.log.say(f"finished: {reason}")
        return self.checkpoints.path / "best"

    def close(self) -> None:
        """End the processes that read batches ahead, and close the log."""
        self.batches.close()
        self.trainer.close()
        self.log.close()

    def _train_epoch(self) -> None:
        """Make the updates that are left of this epoch, or fewer if the run ends within it."""
        options, metrics = self.config.checkpoints, self.trainer.metrics
        self.epoch = self.batches.epoch
        self.clock = time.monotonic()
        for micro_batches in self.batches:
            # "train" is what has been seen since the last report, "epoch" since the epoch began.
            with metrics.scope("epoch"), metrics.scope("train"):
                self.trainer.train_step(micro_batches, wants_stop=self.stop.reason is not None)
            self._note_stop()
            self._count_time()
            self._show_progress()
            update = self.trainer.update
            if update % self.config.log_interval == 0:
                self._report("train")
            if self.is_stopping and self._reason_to_stop() is None:
                return  # what else is due now is made up for when the run is taken up
            if _is_due(update, options.validate_interval_updates):
                self._validate_and_save()
            elif _is_due(update, options.save_interval_updates) and not self._will_validate():
                self._save()
            if self._reason_to_stop() or self.is_stopping:
                return  # at the end of an epoch too: it is reported if the run is resumed with a later end
            self.clock = time.monotonic()  # reports, validation and checkpoints are no time of training
        self._report("epoch")
        if _is_due(self.epoch, options.validate_interval) and self.trainer.update not in self.progress.values:
            self._validate_and_save()

    def _will_validate(self) -> bool:
        """Return whether a validation, which saves too, follows before the next update."""
        is_end_of_epoch = self.batches.examples_consumed == self.batches.num_examples
        is_due = is_end_of_epoch and _is_due(self.epoch, self.config.checkpoints.validate_interval)
        return is_due or self._reason_to_stop() is not None

    def _reason_to_stop(self) -> str | None:
        options = self.config.optimization
        if options.max_update is not None and self.trainer.update >= options.max_update:
            return f"reached max-update {options.max_update}"
        if options.max_epoch is not None and self.batches.epoch > options.max_epoch:
            return f"reached max-epoch {options.max_epoch}"
        if options.patience is not None and self.progress.num_without_better >= options.patience:
            return f"{self.metric} has not become better in {options.patience} validations (patience)"
        return None

    def _validate_and_save(self) -> None:
        """Measure the validation set, note the value that decides which checkpoint is best, and save."""
        share = ordered_batches(
            self.valid_examples,
            self.config.batching,
            rank=self.world.rank,
            world_size=self.world.size,
            pin_memory=self.world.device.type == "cuda",
        )
        # Rank 0 decides for all: a difference in the last bit must not stop one rank and not another.
        results = self.world.broadcast(self.trainer.validate(self.valid_examples, share))
        self.progress.note(self.trainer.update, results[self.metric], better=self.better)
        best = self.progress.values[self.progress.ranking(self.better)[0]]
        position = {"update": self.trainer.update, "epoch": self.epoch}
        self.log.report("valid", {**position, **results, f"best {self.metric}": best})
        self._save()

    def _save(self) -> None:
        """Write a checkpoint, point the links at it, and remove those that need not be kept."""
        optimizer, trainer_state = self.trainer.state_dict()
        if self.world.is_main:
            state = {
                "trainer": trainer_state,
                "batches": self.batches.state_dict(),
                "progress": asdict(self.progress),
                "records_size": self.log.records_size(),
            }
            self.checkpoints.save(
                self.trainer.update,
                model=self.trainer.model,
                task=self.task,
                config=self.config,
                optimizer=optimizer,
                state=state,
            )
            self._link_best_and_prune()
        self._agree_to_stop()  # which is a barrier, too

    def _end_early(self) -> Path:
        """Save where the run stands; return the best checkpoint, or else the last one."""
        update, path = self.trainer.update, self.checkpoints.path
        if update and update not in self.world.broadcast(self.checkpoints.updates()):
            self._save()
        reasons = self.world.gather(self.stop.reason)
        named = next((reason for reason in reasons if reason is not None), "a request")
        done = f"after update {update}, which is saved" if update else "before the first update"
        self.log.say(f"stopped: {named} {done}; the same command goes on from there")
        return path / "best" if (path / "best").exists() else path / "last"

    def _note_stop(self) -> None:
        """Take in what the update has told about the ranks' wishes: all take in the same."""
        is_single = self.world.size == 1
        self.is_stopping = self.stop.reason is not None if is_single else self.trainer.num_wanting_stop > 0

    def _agree_to_stop(self) -> None:
        """Ask all ranks whether one of them wants to stop, and wait for their answers."""
        wishes = torch.tensor([float(self.stop.reason is not None)], device=self.world.device)
        self.is_stopping = self.world.sum_(wishes).item() > 0

    def _link_best_and_prune(self) -> None:
        """Point `best` at the best checkpoint that is there, and remove those that need not be kept."""
        options, saved = self.config.checkpoints, self.checkpoints.updates()
        best = [update for update in self.progress.ranking(self.better) if update in saved]
        if best:
            self.checkpoints.link("best", best[0])
        self.checkpoints.prune({*saved[-options.keep_last :], *best[: options.keep_best]})

    def _resume_or_start(self) -> None:
        """Take the newest checkpoint up, or note the configuration of a new run."""
        saved = self.world.broadcast(self.checkpoints.updates())
        if saved:
            self._resume(saved[-1])
            if self._misses_validation():
                self._validate_and_save()
        else:
            self.log.cut_records(0)
            size = sum(parameter.numel() for parameter in self.trainer.model.parameters())
            self.log.say(
                f"start: {size:,} parameters, {self.batches.num_examples:,} training examples, "
                f"{len(self.valid_examples):,} validation examples, {self.world.size} x {self.world.device.type}"
            )
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
        self._refuse_other_run(folder)
        optimizer, state = self.checkpoints.load_state(update)
        load_weights(self.trainer.model, folder)
        self.trainer.load_state_dict(optimizer, state["trainer"])
        self.batches.load_state_dict(state["batches"])
        self.progress = _progress_from(state["progress"])
        self.epoch = self.batches.epoch
        self.log.cut_records(state["records_size"])
        # No rank may still be reading when rank 0 removes old checkpoints.
        self.world.barrier()
        if self.world.is_main:
            # A process may have been killed before it did this.
            self.checkpoints.link("last", update)
            self._link_best_and_prune()
        self.log.say(f"resume: from {folder}, update {self.trainer.update}, epoch {self.batches.epoch}")

    def _refuse_other_run(self, folder: Path) -> None:
        """Raise `UserError` if the checkpoint is of another model, task or vocabulary than the configuration."""
        for name, before, now in changed_fixed_options(load_config(folder), self.config):
            raise UserError(
                f"`{name}` may not change when a run is resumed: it was {before} in `{folder}`, but is {now}. "
                "Set it back or name another `save-dir`."
            )
        with TemporaryDirectory() as temporary:
            self.task.save_assets(Path(temporary))
            for path in sorted(Path(temporary).rglob("*")):
                before_path = folder / path.relative_to(temporary)
                if path.is_file() and not (
                    before_path.is_file() and filecmp.cmp(path, before_path, shallow=False)
                ):
                    raise UserError(
                        f"`{path.name}` of the data must be the one that the run began with, but differs from "
                        f"`{before_path}`. Use the same data or name another `save-dir`."
                    )

    def _check_lengths(self) -> None:
        """Say how many examples are left out because of their length; raise `UserError` if all are."""
        num_left_out, num_left = self.batches.num_too_long, self.batches.num_examples
        if num_left == 0:
            raise UserError(
                f"`max-tokens` must be at least the length of some examples, but is "
                f"{self.config.batching.max_tokens} and all {num_left_out:,} are longer. Raise it."
            )
        if num_left_out:
            share = num_left_out / (num_left_out + num_left)
            warning = "warning: " if share > 0.01 else ""
            self.log.say(
                f"{warning}left out: {num_left_out:,} of {num_left_out + num_left:,} training examples "
                f"({share:.2%}) are longer than max-tokens"
            )

    def _report(self, scope: str) -> None:
        """Log what a scope has seen, then empty it."""
        metrics = self.trainer.metrics
        sums = metrics.sums(scope, self.world)
        record: dict[str, Any] = {"update": self.trainer.update, "epoch": self.epoch}
        if sums["num_targets"]:  # none where every update was cancelled
            record.update(self.task.summarize(sums))
        if scope == "train":
            self._count_time()  # reading the sums has waited for the device
            record["targets/s"] = sums["num_targets"] / max(self.progress.interval_seconds, 1e-9)
            record.update(metrics.gauges(scope))
            self.progress.interval_seconds = 0.0
        if sums["num_cancelled"]:
            record["cancelled updates"] = round(sums["num_cancelled"])
        self.log.report(scope, record)
        metrics.reset(scope)

    def _count_time(self) -> None:
        """Count what has passed since the clock was last read as time of training."""
        now = time.monotonic()
        self.progress.interval_seconds += now - self.clock
        self.clock = now

    def _show_progress(self) -> None:
        """Move the progress bar, towards an estimate of the update at which the run will end."""
        options = self.config.optimization
        ends = [] if options.max_update is None else [options.max_update]
        if options.max_epoch is not None:
            share = self.batches.examples_consumed / self.batches.num_examples
            epochs_done = self.batches.epoch - 1 + share
            ends.append(round(self.trainer.update * options.max_epoch / max(epochs_done, 1e-9)))
        self.log.progress(self.trainer.update, epoch=self.epoch, total=min(ends, default=None))


def _is_due(count: int, interval: int | None) -> bool:
    return interval is not None and count % interval == 0


def _progress_from(state: Mapping[str, Any]) -> Progress:
    """Undo `asdict` and JSON, which has only text for keys."""
    return Progress(**{**state, "values": {int(update): value for update, value in state["values"].items()}})
