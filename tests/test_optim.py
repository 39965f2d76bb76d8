"""Optimizers: what each one does with a gradient, and the options that contradict each other."""

import math

import pytest
import torch

from nmt.errors import UserError
from nmt.options import OptimizationOptions
from nmt.update.optim import build_optimizer, step


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lr": 0.0}, "`lr` must be above 0 and finite"),
        ({"lr": math.inf}, "`lr` must be above 0 and finite"),
        ({"warmup_updates": -1}, "`warmup-updates` must be finite and not negative"),
        ({"clip_norm": math.nan}, "`clip-norm` must be finite and not negative"),
        ({"patience": 0}, "`patience` must be at least 1"),
        ({"adam_betas": (0.9, 1.0)}, "`adam-betas`"),
        ({"lr_scheduler": "cosine"}, "neither `max-update` nor `max-epoch` is set"),
        ({"momentum": 0.5}, "`momentum` must go with `optimizer` sgd, but that is adam"),
        ({"optimizer": "sgd", "adam_eps": 1e-6}, "`adam-eps` must go with `optimizer` adam or adamw"),
        ({"lr_unit": "epoch", "lr_scheduler": "constant"}, "`lr-unit` must go with `lr-scheduler`"),
        ({"lr_scheduler": "milestones"}, "`lr-milestones` must be given"),
        ({"lr_scheduler": "milestones", "lr_milestones": (5, 3)}, "`lr-milestones` must rise"),
        ({"lr_milestones": (5,)}, "`lr-milestones` must go with `lr-scheduler` milestones"),
        ({"warmup_updates": 5, "warmup_epochs": 1.0}, "must be left out"),
        ({"lr_scheduler": "plateau", "lr_shrink": 1.0}, "`lr-shrink` must be above 0 and below 1"),
        ({"ema_decay": 1.0}, "`ema-decay` must be at least 0 and below 1"),
        ({"optimizer": "sgd", "momentum": 0.0, "nesterov": True}, "`nesterov` must have a `momentum`"),
        ({"stop_min_lr": 5e-4}, "`stop-min-lr` must be below `lr`"),
        (
            {"lr_scheduler": "constant", "stop_min_lr": 1e-5},
            "`stop-min-lr` must go with `lr-scheduler` inverse_sqrt or",
        ),
        ({"stop_time_hours": 0.0}, "`stop-time-hours` must be above 0"),
        ({"lr_scheduler": "cosine", "max_epoch": 1, "end_learning_rate": 1.0}, "`end-learning-rate` must be"),
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
        optimizer = build_optimizer(
            model.parameters(), OptimizationOptions(optimizer=name, lr=0.1, weight_decay=0.01)
        )
        model.weight.grad = torch.zeros_like(model.weight)
        optimizer.step()
        steps[name] = 2.0 - model.weight.item()
    assert steps["adam"] == pytest.approx(0.1, rel=1e-4)
    assert steps["adamw"] == pytest.approx(0.1 * 0.01 * 2.0, rel=1e-3)


NOT_CANCELLED, CANCELLED = torch.tensor(False), torch.tensor(True)


def one_weight(value: float = 2.0) -> torch.nn.Linear:
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, value)
    return model


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_has_the_momentum_of_its_definition_even_after_a_cancelled_first_update(nesterov: bool) -> None:
    """v = m v + g; w -= lr v, or lr (g + m v) after Nesterov, in torch's form."""
    model = one_weight()
    options = OptimizationOptions(optimizer="sgd", lr=0.1, momentum=0.5, nesterov=nesterov)
    optimizer = build_optimizer(model.parameters(), options)
    model.weight.grad = torch.full((1, 1), torch.nan)
    step(optimizer, is_cancelled=CANCELLED)
    assert model.weight.item() == 2.0
    weight, velocity = 2.0, 0.0
    for gradient in (1.0, -2.0, 0.5):
        model.weight.grad = torch.full((1, 1), gradient)
        step(optimizer, is_cancelled=NOT_CANCELLED)
        velocity = 0.5 * velocity + gradient
        weight -= 0.1 * (gradient + 0.5 * velocity if nesterov else velocity)
        assert model.weight.item() == pytest.approx(weight, rel=1e-6)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "adafactor"])
def test_a_cancelled_update_changes_neither_weights_nor_state(name: str) -> None:
    torch.manual_seed(0)
    models = [torch.nn.Linear(3, 2) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [
        build_optimizer(m.parameters(), OptimizationOptions(optimizer=name, lr=0.1)) for m in models
    ]  # type: ignore[arg-type]
    gradient = torch.randn(2, 3)
    for number, bad in enumerate((False, True, False)):
        for model, optimizer in zip(models, optimizers, strict=True):
            if bad and model is models[1]:
                continue  # never saw it
            model.weight.grad = torch.full((2, 3), torch.inf) if bad else gradient + number
            model.bias.grad = torch.zeros(2)
            step(optimizer, is_cancelled=CANCELLED if bad else NOT_CANCELLED)
    assert torch.equal(models[0].weight, models[1].weight)


def test_decay_on_matrices_only_leaves_norms_and_biases_alone() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    torch.nn.init.ones_(model[0].bias)
    options = OptimizationOptions(optimizer="sgd", lr=0.5, weight_decay=0.1, decay_matrices_only=True)
    optimizer = build_optimizer(model.parameters(), options)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    step(optimizer, is_cancelled=NOT_CANCELLED)
    for name, parameter in model.named_parameters():
        expected = before[name] * 0.95 if parameter.ndim == 2 else before[name]
        torch.testing.assert_close(parameter.detach(), expected)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "adafactor"])
def test_a_step_is_what_torch_makes_of_it_and_a_cancelled_one_changes_nothing(name: str) -> None:
    torch.manual_seed(1)
    ours, theirs = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    theirs.load_state_dict(ours.state_dict())
    options = OptimizationOptions(optimizer=name, lr=0.1)
    optimizers = [build_optimizer(model.parameters(), options) for model in (ours, theirs)]
    for is_cancelled in (False, True, False):
        x = torch.randn(5, 4)
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().sum().backward()
        before = [parameter.clone() for parameter in ours.parameters()]
        step(optimizers[0], is_cancelled=torch.tensor(is_cancelled))
        if not is_cancelled:
            type(optimizers[1]).__bases__[0].step(optimizers[1])  # torch's own
        for parameter, expected, old in zip(ours.parameters(), theirs.parameters(), before, strict=True):
            assert torch.equal(parameter, expected)
            assert torch.equal(parameter, old) == is_cancelled
            assert parameter.requires_grad


def test_hooks_of_torchs_optimizers_are_called() -> None:
    model = torch.nn.Linear(1, 1)
    optimizer = build_optimizer(model.parameters(), OptimizationOptions())
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    step(optimizer, is_cancelled=torch.tensor(False))
    assert calls == ["before", "after"]
