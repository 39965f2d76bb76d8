"""What may be a mistake, although the run can go on: one line each, before the first update."""

import math
from collections.abc import Iterator
from typing import Any

from nmt.errors import counted
from nmt.options import TrainConfig
from nmt.run.state import Surroundings
from nmt.update.schedule import num_updates, num_warmup_updates

# Far above the rates that optimizers learn with. Adam's updates have the size of the rate, for any gradient.
_HIGH_RATES = {"adam": 0.05, "adamw": 0.05, "adafactor": 0.5, "sgd": 3.0}


def advice(config: TrainConfig[Any], surroundings: Surroundings) -> Iterator[str]:
    """Yield warnings on options that make sense alone, but perhaps not together."""
    options = config.optimization
    lengths = {"updates_per_epoch": surroundings.updates_per_epoch}
    warmup, end = num_warmup_updates(options, **lengths), num_updates(options, **lengths)
    if end is not None and warmup >= max(end, 2):
        reached = options.lr * end / warmup
        yield (
            f"warning: the warm-up of {counted(warmup, 'update')} is as long as the run of {end:,} or longer: the "
            f"learning rate only rises, to {reached:.2e} of {options.lr:.2e}. Lower `warmup-updates`"
        )
    if options.lr > (usual := _HIGH_RATES.get(options.optimizer, math.inf)):
        yield (
            f"warning: `lr` {options.lr:g} is far above what {options.optimizer} learns with (at most {usual:g}): "
            "the loss will hardly fall"
        )
    if options.shard_weights and surroundings.ranks == 1:
        yield (
            "warning: `shard-weights` deals a model out to several ranks, but here is one, which keeps the whole. "
            "Start with torchrun, or leave it out"
        )
    if surroundings.train_data == surroundings.valid_data:
        yield (
            "warning: the validation examples are the training examples: what is measured of them does not tell "
            "how good the model is. Name others"
        )
