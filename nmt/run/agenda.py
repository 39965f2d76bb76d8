"""What is due now in a run: a pure function of where the run stands and of its options.

The loop asks after each update, at the end of an epoch, when a run is resumed and at its end. It asks again after
everything that may change the answer: a report looks at the clock, a validation may use up the patience, and while
a checkpoint is written the ranks ask each other whether to stop.
"""

from dataclasses import dataclass
from typing import Any

from nmt.options import OptimizationOptions, TrainConfig


@dataclass(frozen=True)
class Moment:
    """Where a run stands between two updates. It is the same on every rank."""

    update: int
    """Updates that have been made."""
    epoch: int
    """The epoch of the last update."""
    is_epoch_complete: bool = False
    """All batches of that epoch have been used."""
    is_epoch_over: bool = False
    """The iteration over that epoch has ended, too: the next update belongs to the next epoch."""
    is_validated: bool = False
    """The weights after this update have been validated and saved."""
    is_kept: bool = False
    """The checkpoint of this update is known to be kept for good."""
    is_asked_to_stop: bool = False
    num_without_better: int = 0
    """Validations since the best one, by the metric that patience follows."""
    seconds: float = 0.0
    """Time spent on the run, as rank 0 told it last."""
    lr: float = 0.0
    """Of the last update."""
    is_past_warmup: bool = False
    """The learning rate has reached its peak."""


@dataclass(frozen=True)
class Due:
    """What is to be done, in this order."""

    report: bool
    """Report what has been seen since the last report."""
    validate: bool
    """Validate, and save with it."""
    save: bool
    """Save without a validation."""
    keep: bool
    """A checkpoint of this update, saved for any reason, is kept for good."""
    reason: str | None
    """The limit that the run has reached, in words."""
    is_last: bool
    """No update follows: a limit is reached, or there was a request to stop."""
    validate_at_end: bool
    """The run has reached a limit, and its last weights have not been validated."""


def due(moment: Moment, config: TrainConfig[Any]) -> Due:
    """Return what is due."""
    options, update = config.checkpoints, moment.update
    reason = _reason_to_stop(moment, config)
    is_interrupted = moment.is_asked_to_stop and reason is None
    ends_epoch = moment.is_epoch_complete or moment.is_epoch_over

    validates_by_epoch = ends_epoch and _is_due(moment.epoch, options.validate_interval)
    validates_now = _is_due(update, options.validate_interval_updates) or (
        moment.is_epoch_over and validates_by_epoch
    )
    keeps_by_update = _is_due(update, options.keep_every_updates)
    saves_by_update = keeps_by_update or _is_due(update, options.save_interval_updates)
    keeps_by_epoch = ends_epoch and _is_due(moment.epoch, options.keep_every_epochs)
    # With `keeps_by_epoch`, the save at the end of the epoch comes for the same weights: one is enough.
    saves_now = keeps_by_epoch if moment.is_epoch_over else saves_by_update and not keeps_by_epoch
    # A validation saves, too: now, at the end of the epoch, or at the end of the run.
    will_validate = validates_now or validates_by_epoch or reason is not None

    # After a request to stop nothing else is begun: a resumed run makes up for what is due now.
    is_open = not moment.is_validated and not is_interrupted
    return Due(
        report=update % config.log_interval == 0,
        validate=is_open and validates_now,
        save=is_open and saves_now and not will_validate,
        keep=not moment.is_kept
        and moment.epoch >= options.keep_from_epoch
        and (keeps_by_update or keeps_by_epoch),
        reason=reason,
        is_last=reason is not None or moment.is_asked_to_stop,
        validate_at_end=reason is not None and not moment.is_validated,
    )


def _reason_to_stop(moment: Moment, config: TrainConfig[Any]) -> str | None:
    """Return the limit that is reached, in words."""
    options: OptimizationOptions = config.optimization
    next_epoch = moment.epoch + moment.is_epoch_over
    if options.max_update is not None and moment.update >= options.max_update:
        return f"reached max-update {options.max_update}"
    if options.max_epoch is not None and next_epoch > options.max_epoch:
        return f"reached max-epoch {options.max_epoch}"
    if options.patience is not None and moment.num_without_better >= options.patience:
        metric = options.patience_metric or config.checkpoints.best_checkpoint_metric
        return f"{metric} has not become better in {options.patience} validations (patience)"
    if options.stop_time_hours is not None and moment.seconds >= options.stop_time_hours * 3600:
        return f"reached stop-time-hours {options.stop_time_hours:g}"
    if options.stop_min_lr is not None and moment.is_past_warmup and moment.lr <= options.stop_min_lr:
        return f"the learning rate has fallen to stop-min-lr {options.stop_min_lr:g}"
    return None


def _is_due(count: int, interval: int | None) -> bool:
    return interval is not None and count % interval == 0
