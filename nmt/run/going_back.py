"""Which checkpoint a run goes back to after too many updates without a finite gradient."""

from collections.abc import Sequence

from nmt.errors import UserError
from nmt.trainer import Trainer

_LOWEST_LR_SCALE = 2.0**-5  # five halvings are allowed


def checkpoint_to_go_back_to(saved: Sequence[int], trainer: Trainer, *, limit: int) -> tuple[int, float]:
    """Return the update of a good checkpoint, and the factor of the learning rate from there on.

    Args:
        saved: Updates of the existing checkpoints, oldest first.
        trainer: It has made bad updates.
        limit: The number of bad updates in a row that was reached.

    Raises:
        UserError: There is no such checkpoint, or this has been tried too often.
    """
    fault = f"The gradient must be finite, but was not in {limit} updates in a row"
    remedy = "Lower `lr`, set `clip-norm`, or look at the examples that train.log names."
    lr_scale = trainer.lr_scale / 2
    if not saved:
        raise UserError(f"{fault}, before the first checkpoint. {remedy}")
    # The weights right before the first bad update may be the reason for it, at any learning rate.
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
