"""Learning-rate schedules, computed by hand, and the options that shape them."""

import math

import pytest
import torch

from nmt.errors import UserError
from nmt.optim import build_optimizer, build_schedule
from nmt.options import OptimizationOptions


def factors(updates: list[int], max_update: int | None = None, **options: object) -> list[float]:
    schedule = build_schedule(OptimizationOptions(**options), max_update=max_update)  # type: ignore[arg-type]
    return [schedule(update) for update in updates]


def test_inverse_square_root_rises_linearly_and_falls_with_the_root() -> None:
    # A quarter of the way up, all the way, and after four and sixteen times as many updates.
    expected = [0.25, 1.0, 0.5, 0.25]
    assert factors([25, 100, 400, 1600], lr_scheduler="inverse_sqrt", warmup_updates=100) == expected
    assert factors([1, 4], lr_scheduler="inverse_sqrt", warmup_updates=0) == [1.0, 0.5]


def test_cosine_falls_from_one_to_almost_zero() -> None:
    at = [50, 100, 150, 200, 300]
    found = factors(at, max_update=300, lr_scheduler="cosine", warmup_updates=100)
    expected = [0.5, 1.0, 0.5 * (1 + math.cos(math.pi / 4)), 0.5, 0.0]
    assert found == pytest.approx(expected, abs=1e-12)


def test_constant_stays_after_its_warm_up() -> None:
    assert factors([1, 2, 3, 1000], lr_scheduler="constant", warmup_updates=2) == [0.5, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lr": 0.0}, "`lr` must be above 0 and finite"),
        ({"lr": math.inf}, "`lr` must be above 0 and finite"),
        ({"warmup_updates": -1}, "`warmup-updates` must be finite and not negative"),
        ({"clip_norm": math.nan}, "`clip-norm` must be finite and not negative"),
        ({"patience": 0}, "`patience` must be at least 1"),
        ({"adam_betas": (0.9, 1.0)}, "`adam-betas`"),
        ({"lr_scheduler": "cosine"}, "`max-update` is not set"),
    ],
)
def test_values_that_make_no_sense_are_refused(options: dict[str, object], text: str) -> None:
    with pytest.raises(UserError, match=text):
        OptimizationOptions(**options).check()  # type: ignore[arg-type]


def test_adam_adds_the_decay_to_the_gradient_and_adamw_does_not() -> None:
    """With a gradient of zero Adam's first step is lr * sign(decay * w); AdamW's is lr * decay * w."""
    steps = {}
    for name in ("adam", "adamw"):
        model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.constant_(model.weight, 2.0)
        optimizer = build_optimizer(model, OptimizationOptions(optimizer=name, lr=0.1, weight_decay=0.01))
        model.weight.grad = torch.zeros_like(model.weight)
        optimizer.step()
        steps[name] = 2.0 - model.weight.item()
    assert steps["adam"] == pytest.approx(0.1, rel=1e-4)
    assert steps["adamw"] == pytest.approx(0.1 * 0.01 * 2.0, rel=1e-3)
