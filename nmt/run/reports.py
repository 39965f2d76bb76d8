"""The reports of a run in progress: the metrics, the speed, and the time that is left."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nmt.data.batch_iterator import BatchIterator
from nmt.options import TrainConfig
from nmt.run.busy_cores import BusyCores
from nmt.run.clock import Clock
from nmt.run.following import Followed
from nmt.run.forecast import duration
from nmt.run.memory_probe import peak_memory
from nmt.run.pace import Pace
from nmt.run.run_log import RunLog
from nmt.run.validation_history import Progress
from nmt.run.waiting import WaitForData, wait_for_ranks
from nmt.task import Examples
from nmt.task_extras import next_command_of, remarks_of, words_of
from nmt.trainer import Trainer
from nmt.update.summary import summarize

_NUM_SHOWN = 20  # examples of a cancelled update that are named in a line


class Reports:
    """Writes the trainer's metrics to the log of a run."""

    def __init__(
        self, log: RunLog, trainer: Trainer, batches: BatchIterator, config: TrainConfig[Any]
    ) -> None:
        self.log = log
        self.trainer = trainer
        self.batches = batches
        self.config = config
        self.words = words_of(trainer.task)
        self.pace = Pace()
        self.waiting = WaitForData(trainer.world.device)
        self._busy_cores = BusyCores(trainer.world.device)
        self._trained = 0.0  # the clock's `trained` at the last update
        self._has_told_time = False

    def scope(self, scope: str, *, epoch: int, clock: Clock) -> None:
        """Log what a scope has seen, then empty it; every rank must call this."""
        metrics = self.trainer.metrics
        sums = metrics.sums(scope, self.trainer.world)  # waits for the device
        record: dict[str, Any] = {"update": self.trainer.update, "epoch": epoch}
        if sums["num_targets"]:  # 0 if every update was cancelled
            record.update(summarize(self.trainer.task, sums))
        if scope == "train":
            seconds = clock.take_training_seconds()
            record["targets/s"] = sums["num_targets"] / seconds
            record["waited for data"] = round(min(self.waiting.take_seconds() / seconds, 1.0), 4)
            world = self.trainer.world
            waited = min(world.waited.take_seconds() / seconds, 1.0)
            # Sharded ranks wait for each other within the passes, layer by layer, which is not measured.
            if world.size > 1 and not self.config.optimization.shard_weights:
                record.update(wait_for_ranks(world.gather(waited)))
            record.update(metrics.gauges(scope))
            record["memory MiB"] = round(peak_memory(self.trainer.world.device) / 2**20)
            if (left := self._seconds_left()) is not None:
                record["hours left"] = round(left / 3600, 6)
        elif "lr" in (gauges := metrics.gauges(scope)):
            record["lr"] = gauges["lr"]
        record["hours"] = clock.hours
        if sums.get("num_cancelled"):  # the oldest checkpoints do not have it
            record["cancelled updates"] = round(sums["num_cancelled"])
        self.log.report(scope, record, shown=self._shown(record))
        metrics.reset(scope)

    def validation(self, record: dict[str, Any]) -> None:
        """Log what a validation has measured."""
        self.log.report("valid", record, shown=self._shown(record))

    def end(self, reason: str, *, best: Path, progress: Progress, followed: Followed) -> None:
        """Say why the run ends, what its best checkpoint is worth, and what to do with it."""
        parts, metric = [f"finished: {reason}"], followed.best
        if ranking := progress.ranking(followed.better[metric]):
            value = progress.values[ranking[0]]
            parts.append(f"best {metric} {value:.4g} after update {ranking[0]:,}: {best}")
        self.log.say(" | ".join([*parts, f"next: {next_command_of(self.trainer.task, best)}"]))

    def remarks(self, examples: Examples[Any], results: Mapping[str, float]) -> None:
        """Log what the task says after a validation; every rank must call this."""
        trainer = self.trainer
        with torch.no_grad(), trainer.evaluated_model() as model:
            lines = remarks_of(trainer.task, model, examples, results, trainer.world)
        for line in lines:
            self.log.say(line)

    def _shown(self, record: Mapping[str, Any]) -> dict[str, str]:
        """Return some of the numbers in a form for people."""
        last_update = self._last_update()
        shown = {"update": f"update {record['update']}" + (f"/{last_update}" if last_update else "")}
        if "targets/s" in record:
            shown["targets/s"] = f"{self.words.targets}/s {record['targets/s']:,.0f}"
        if "waited for data" in record:
            shown["waited for data"] = f"waited for data {record['waited for data']:.1%}"
        if "waited for ranks" in record:
            shown["waited for ranks"] = f"waited for ranks {record['waited for ranks']:.1%}"
            slowest, its_share = record["slowest rank"], record["slowest rank waited"]
            shown["slowest rank"] = f"slowest rank {slowest}, which waited {its_share:.1%}"
            shown["slowest rank waited"] = ""
        if "memory MiB" in record:
            shown["memory MiB"] = f"memory {record['memory MiB']:,} MiB"
        if "hours left" in record:
            more = " and validations" if self.pace.validation_seconds is None else ""
            shown["hours left"] = f"left {duration(record['hours left'] * 3600)}{more}"
        return shown

    def update(self, *, epoch: int, clock: Clock) -> None:
        """Move the progress bar after an update, name cancelled ones, and say once how long the rest will take."""
        last_update = self._last_update()
        self.log.progress(self.trainer.update, epoch=epoch, total=last_update)
        self.cancelled()
        self.pace.note_update(clock.trained - self._trained)
        self._trained = clock.trained
        if (warning := self._busy_cores.warning()) is not None:
            self.log.say(warning)
        if self._has_told_time or not self.pace.is_known or (left := self._seconds_left()) is None:
            return
        self._has_told_time = True
        apart = ", validation apart" if self.pace.validation_seconds is None else ""
        speed = f"{self.pace.seconds_per_update:.2g} s an update"
        self.log.say(f"time: {speed}; {duration(left)} to update {last_update:,}{apart}")

    def cancelled(self) -> None:
        """Log the updates that are newly known to have been cancelled."""
        for cancelled in self.trainer.cancellations.take():
            if cancelled.is_overflow:
                self.log.say(
                    f"update {cancelled.update} cancelled: an overflow in fp16; the loss scale is halved"
                )
                continue
            shown = " ".join(map(str, cancelled.examples[:_NUM_SHOWN]))
            more = f" and {left:,} more" if (left := len(cancelled.examples) - _NUM_SHOWN) > 0 else ""
            self.log.say(
                f"update {cancelled.update} cancelled: the gradient is not finite; training examples {shown}{more}"
            )

    def _last_update(self) -> int | None:
        """Estimate the update at which the run will end."""
        options = self.config.optimization
        ends = [] if options.max_update is None else [options.max_update]
        if options.max_epoch is not None:
            # Count from the present place, since earlier epochs may have had other batches.
            epochs_left = max(options.max_epoch - self._epochs_done(), 0.0)
            ends.append(self.trainer.update + round(epochs_left * self.batches.updates_per_epoch))
        return min(ends, default=None)

    def _epochs_done(self) -> float:
        return self.batches.epoch - 1 + self.batches.examples_consumed / self.batches.num_examples

    def _seconds_left(self) -> float | None:
        """Estimate how long the rest of the run takes, if its end and its speed are known."""
        last_update = self._last_update()
        if last_update is None or not self.pace.is_known:
            return None
        num_updates = max(last_update - self.trainer.update, 0)
        options = self.config.checkpoints
        interval = options.validate_interval * self.batches.updates_per_epoch
        num_validations = num_updates / interval
        if (every := options.validate_interval_updates) is not None:
            num_validations += num_updates / every
        return self.pace.seconds_left(num_updates, num_validations)
