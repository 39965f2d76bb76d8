"""Optimizers from torch, and learning-rate schedules as functions of the update."""

import math
from collections.abc import Callable

import torch
from torch import nn

from nmt.options import OptimizationOptions

Schedule = Callable[[int], float]


def build_optimizer(model: nn.Module, options: OptimizationOptions) -> torch.optim.Optimizer:
    """Build Adam (Kingma and Ba, 2015) or AdamW (Loshchilov and Hutter, 2019) over all parameters.

    Both are torch's fused form, which skips an update on the device when its `found_inf` flag is set.
    """
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[options.optimizer]
    return kind(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=options.lr,
        betas=options.adam_betas,
        eps=options.adam_eps,
        weight_decay=options.weight_decay,
        fused=True,
    )


def build_schedule(options: OptimizationOptions, *, max_update: int | None) -> Schedule:
    """Return the factor by which update n (counted from 1) multiplies the learning rate.

    All begin with a linear warm-up, n / warmup_updates, and reach 1 at its end. Then:

    - inverse_sqrt: sqrt(warmup_updates / n), as fairseq's inverse_square_root_schedule.py;
    - cosine: half a cosine from 1 at the end of the warm-up to 0 at the last update;
    - constant: 1.
    """
    warmup = options.warmup_updates

    def after_warmup(update: int) -> float:
        if options.lr_scheduler == "inverse_sqrt":
            return math.sqrt(max(warmup, 1) / update)
        if options.lr_scheduler == "cosine":
            assert max_update is not None
            done = (update - warmup) / max(max_update - warmup, 1)
            return 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))
        return 1.0

    def factor(update: int) -> float:
        return update / warmup if update < warmup else after_warmup(update)

    return factor
