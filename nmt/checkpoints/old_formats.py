"""Checkpoints of earlier format versions, brought up to date when they are read.

Version 2 keeps more about a run than version 1: the time it has taken, averaged weights, cancelled updates, the
effect of a plateau on the learning rate. A state of version 1 gets the values of a run that never used these.
"""

from typing import Any


def upgrade_state(state: dict[str, Any], *, num_optimizer_tensors: int) -> dict[str, Any]:
    """Return the content of an older `state.json` as the present version has it; a present one is returned as is.

    Args:
        state: As read.
        num_optimizer_tensors: Number of tensors in the optimizer's file.
    """
    if state.get("version", 1) > 1:
        return state
    trainer, progress = state["trainer"], dict(state["progress"])
    training_seconds = progress.pop("interval_seconds", 0.0)
    return {
        **state,
        "trainer": {
            "num_optimizer_tensors": num_optimizer_tensors,
            "plateau": {"factor": 1.0, "best": None, "num_without_better": 0},
            "precision": {},
            "lr": trainer["metrics"][0].get("epoch", {}).get("gauges", {}).get("lr", 0.0),
            "lr_scale": 1.0,
            "num_cancelled_in_a_row": 0,
            **trainer,
        },
        "progress": {"kept": [], **progress},
        "clock": {"seconds_before": 0.0, "training_seconds": training_seconds},
        "split_above": None,
    }
