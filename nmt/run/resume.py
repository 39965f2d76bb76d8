"""What has changed when a run is resumed: a line for each change, also kept in the record of the run."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nmt.config.fields import key_of
from nmt.config.values import to_text
from nmt.data.batch_iterator import BatchIterator
from nmt.errors import UserError
from nmt.options import TrainConfig
from nmt.run.run_log import RunLog
from nmt.run.same_ranks import fingerprints
from nmt.run.state import Position, RunState, Surroundings
from nmt.task import Examples
from nmt.trainer import Trainer
from nmt.update.schedule import build_schedule, num_updates

_SAYS_NOTHING = ("dry_run",)  # options that do not change the run
_WITH_AN_END = ("cosine", "polynomial")
_NOTABLE = 1e-3  # as a share of the learning rate


@dataclass(frozen=True)
class Change:
    """Something that has changed."""

    name: str
    before: Any
    now: Any

    def __str__(self) -> str:
        before, now = ("none" if value is None else value for value in (self.before, self.now))
        return f"{self.name} {before} -> {now}"


@dataclass(frozen=True)
class Resumption:
    """How a run goes on."""

    begins: str
    """Where from."""
    changes: Sequence[Change]
    warnings: Sequence[str]
    position: Position

    @property
    def lines(self) -> list[str]:
        """The lines for the log."""
        changes = [f"resume: {change}" for change in self.changes]
        return [f"resume: {self.begins}", *changes, *(f"warning: {warning}" for warning in self.warnings)]

    def report(self, log: RunLog, *, update: int, epoch: int) -> None:
        """Write the lines, and keep the changes in the record, if there are any."""
        for line in self.lines:
            log.say(line)
        if self.changes or self.warnings:
            changed = {change.name: [change.before, change.now] for change in self.changes}
            record = {"update": update, "epoch": epoch, "changed": changed, "warnings": list(self.warnings)}
            log.record("resume", record)


def surroundings(
    trainer: Trainer,
    batches: BatchIterator,
    *,
    train_examples: Examples[Any],
    valid_examples: Examples[Any],
) -> Surroundings:
    """Find out what a run depends on besides its options; every rank must call this."""
    world = trainer.world
    train_data, valid_data = fingerprints({"training": train_examples, "validation": valid_examples}, world)
    return Surroundings(
        ranks=world.size,
        device=world.device.type,
        precision=str(trainer.precision.dtype).removeprefix("torch."),
        updates_per_epoch=batches.updates_per_epoch,
        num_examples=batches.num_examples,
        train_data=train_data,
        valid_data=valid_data,
    )


def compare(
    before: TrainConfig[Any],
    now: TrainConfig[Any],
    state: RunState,
    here: Surroundings,
    *,
    folder: Path,
) -> Resumption:
    """Find out what has changed since a checkpoint, and where in the data the run goes on.

    Args:
        before: The options of the checkpoint.
        now: The options from here on.
        state: Of the checkpoint.
        here: The present surroundings.
        folder: The checkpoint.

    Raises:
        UserError: The training examples have changed within an epoch, and the options do not accept that.
    """
    then = state.surroundings
    changes = list(changed_options(before, now))
    position, warning = position_in_data(state, here, accepts_changed=now.accept_changed_data)
    warnings = [] if warning is None else [warning]
    updates_per_epoch = here.updates_per_epoch
    if then is not None:
        changes += _changed_surroundings(then, here)
        updates_per_epoch = then.updates_per_epoch
        if then.valid_data != here.valid_data:
            warnings.append(
                "the validation examples differ from those of the checkpoint: what was measured before does not "
                "compare with what is measured from here on, also where the best checkpoint is chosen"
            )
    trainer = state.trainer
    moved = _moved_rate(
        before,
        now,
        update=state.update + 1,
        epoch=position["epoch"],
        scale=trainer["lr_scale"] * trainer["plateau"].get("factor", 1.0),
        updates_per_epoch=(updates_per_epoch, here.updates_per_epoch),
    )
    if moved is not None:
        warnings.append(moved)
    begins = f"from {folder}, update {state.update}, epoch {position['epoch']}"
    return Resumption(begins, changes, warnings, position)


def changed_options(before: Any, now: Any) -> Iterator[Change]:
    """Yield the options of a nest that differ, under their names as flags."""
    for field in dataclasses.fields(before):
        old, new = getattr(before, field.name), getattr(now, field.name)
        if dataclasses.is_dataclass(old) and type(old) is type(new):
            yield from changed_options(old, new)
        elif old != new and field.name not in _SAYS_NOTHING:
            yield Change(key_of(field.name), to_text(old), to_text(new))


def _changed_surroundings(then: Surroundings, now: Surroundings) -> Iterator[Change]:
    for key, name in (
        ("ranks", "ranks"),
        ("device", "kind of device"),
        ("precision", "type of the updates"),
        ("num_examples", "training examples of an epoch"),
        ("updates_per_epoch", "updates an epoch"),
    ):
        before, value = getattr(then, key), getattr(now, key)
        if before != value:
            yield Change(name, before, value)


def position_in_data(
    state: RunState, now: Surroundings, *, accepts_changed: bool
) -> tuple[Position, str | None]:
    """Return where in the training data a run goes on, and a line if the data have changed since the checkpoint.

    Args:
        state: Of the checkpoint.
        now: The surroundings from here on.
        accepts_changed: Whether an epoch may begin anew with other data.

    Raises:
        UserError: The data have changed within an epoch, and it may not begin anew.
    """
    then, position = state.surroundings, state.batches
    if then is None or then.train_data == now.train_data:
        return position, None
    epoch, num_consumed = position["epoch"], position["examples_consumed"]
    is_done = num_consumed >= then.num_examples
    counts = f"{then.num_examples:,} then, {now.num_examples:,} now"
    if num_consumed and not is_done and not accepts_changed:
        raise UserError(
            f"The training data must stay the same within an epoch, but the examples differ from those that epoch "
            f"{epoch} began with ({counts}). Use the same data, name another `save-dir`, or begin the epoch anew "
            "with these by `accept-changed-data`."
        )
    begins = {**position, "epoch": epoch + is_done, "window": 0, "cuts": [], "examples_consumed": 0}
    anew = " anew: those that it has had may come again" if num_consumed and not is_done else ""
    return begins, (
        f"the training examples differ from those of the checkpoint ({counts}): epoch {epoch + is_done} begins "
        f"with these{anew}"
    )


def _moved_rate(
    before: TrainConfig[Any],
    now: TrainConfig[Any],
    *,
    update: int,
    epoch: int,
    scale: float,
    updates_per_epoch: tuple[int, int],
) -> str | None:
    """Return a line if the changes move the end of a schedule, or the learning rate of the next update."""
    rates, ends = [], []
    for config, length in zip((before, now), updates_per_epoch, strict=True):
        options = config.optimization
        factor = build_schedule(options, updates_per_epoch=length)(update, epoch)
        rates.append(options.lr * factor * scale)
        ends.append(num_updates(options, updates_per_epoch=length))
    schedule = now.optimization.lr_scheduler
    has_end = schedule in _WITH_AN_END and schedule == before.optimization.lr_scheduler
    differs = abs(rates[0] - rates[1]) > _NOTABLE * max(rates)
    jump = f"the learning rate of update {update:,} is {rates[1]:.2e} instead of {rates[0]:.2e}"
    if has_end and ends[0] != ends[1]:
        return f"the end of `lr-scheduler` {schedule} moves from update {ends[0]:,} to {ends[1]:,}: {jump}"
    return jump if differs else None
