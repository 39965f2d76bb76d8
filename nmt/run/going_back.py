"""Which checkpoint a run goes back to after too many updates without a finite gradient."""

from collections.abc import Sequence

from nmt.errors import UserError
from nmt.trainer import Trainer

_LOWEST_LR_SCALE = 2.0**-5  # of five times back the last one has failed


def checkpoint_to_go_back_to(saved: Sequence[int], trainer: Trainer, *, limit: int) -> tuple[int, float]:
    """Return the update of a good checkpoint, and the part of the learning rate to go on with from there.

    Args:
        saved: Updates of the checkpoints that are there, oldest first.
        trainer: Has made bad updates.
        limit: How many.

    Raises:
        UserError: There is no such checkpoint, or this has been tried too often.
    """
    fault = f"The gradient must be finite, but was not in {limit} updates in a row"
    remedy = "Lower `lr`, set `clip-norm`, or look at the examples that train.log names."
    lr_scale = trainer.lr_scale / 2
    if not saved:
        raise UserError(f"{fault}, before the first checkpoint. {remedy}")
    # The first of them may be bad by the weights that the update before it has made, at any learning rate.
    last_good = trainer.update - trainer.cancellations.known_in_a_row() - 2
    good = [update for update in saved if update <= last_good]
    if not good:
        raise UserError(
            f"{fault}, and no checkpoint is of earlier weights. Lower `lr` or set `clip-norm`, and begin a new "
            "run."
        )
    if lr_scale < _LOWEST_LR_SCALE:
        raise UserError(f"{fault}, with {trainer.lr_scale:g} of the learning rate too. {remedy}")
    return good[-1], lr_scale
