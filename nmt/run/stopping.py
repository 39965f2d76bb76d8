"""When a run has reached an end that its options set."""

from nmt.options import OptimizationOptions
from nmt.run.following import Followed
from nmt.run.validation_history import Progress
from nmt.trainer import Trainer


def reason_to_stop(
    options: OptimizationOptions,
    trainer: Trainer,
    progress: Progress,
    followed: Followed,
    *,
    epoch: int,
    is_out_of_time: bool,
) -> str | None:
    """Return the limit that is reached, in words, or None.

    Args:
        options: Set the limits.
        trainer: Knows the update and the learning rate.
        progress: Of the validations.
        followed: Names the metric that patience looks at.
        epoch: That the next update is of.
        is_out_of_time: Whether `stop-time-hours` are up.
    """
    if options.max_update is not None and trainer.update >= options.max_update:
        return f"reached max-update {options.max_update}"
    if options.max_epoch is not None and epoch > options.max_epoch:
        return f"reached max-epoch {options.max_epoch}"
    if options.patience is not None and progress.num_without_better >= options.patience:
        return f"{followed.patience} has not become better in {options.patience} validations (patience)"
    if is_out_of_time:
        return f"reached stop-time-hours {options.stop_time_hours:g}"
    lowest = options.stop_min_lr
    if lowest is not None and trainer.is_past_warmup and trainer.lr <= lowest:
        return f"the learning rate has fallen to stop-min-lr {lowest:g}"
    return None
