"""Learning-rate schedules, computed by hand, and against torch's where it has the same."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nmt.options import OptimizationOptions
from nmt.update.schedule import Plateau, build_schedule, num_warmup_updates


def factors(updates: list[int], *, updates_per_epoch: int = 1, **options: object) -> list[float]:
    """The factor at each update, in the epoch that it falls into."""
    schedule = build_schedule(OptimizationOptions(**options), updates_per_epoch=updates_per_epoch)  # type: ignore[arg-type]
    return [schedule(update, (update - 1) // updates_per_epoch + 1) for update in updates]


def test_inverse_square_root_rises_linearly_and_falls_with_the_root() -> None:
    # A quarter of the way up, all the way, and after four and sixteen times as many updates.
    expected = [0.25, 1.0, 0.5, 0.25]
    assert factors([25, 100, 400, 1600], lr_scheduler="inverse_sqrt", warmup_updates=100) == expected
    assert factors([1, 4], lr_scheduler="inverse_sqrt", warmup_updates=0) == [1.0, 0.5]
    assert factors([2000, 4000, 16000]) == [0.5, 1.0, 0.5]  # unless told otherwise: 4000 updates of warm-up


def test_cosine_falls_from_one_to_almost_zero() -> None:
    found = factors([50, 100, 101, 151, 201, 301], max_update=300, lr_scheduler="cosine", warmup_updates=100)
    expected = [0.5, 1.0, 1.0, 0.5 * (1 + math.cos(math.pi / 4)), 0.5, 0.0]
    assert found == pytest.approx(expected, abs=1e-12)


def test_cosine_by_epoch_stays_the_same_within_an_epoch_and_is_torchs() -> None:
    """Four epochs of ten updates: 1, then (1 + cos(pi e / 4)) / 2 after e epochs."""
    found = factors(
        [1, 10, 11, 20, 21, 31, 40],
        updates_per_epoch=10,
        lr_scheduler="cosine",
        lr_unit="epoch",
        max_epoch=4,
        warmup_updates=0,
    )
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
    by_epoch = []
    for _ in range(4):
        by_epoch.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    first, second, third, fourth = by_epoch
    assert found == pytest.approx([first, first, second, second, third, fourth, fourth])


def test_an_end_in_epochs_is_the_end_of_a_schedule_by_update() -> None:
    options = {"lr_scheduler": "cosine", "warmup_updates": 0}
    by_epochs = factors([1, 13, 40], updates_per_epoch=10, max_epoch=4, **options)
    assert by_epochs == factors([1, 13, 40], max_update=40, **options)
    # Whichever comes first is the end.
    both = factors([1, 13, 40], updates_per_epoch=10, max_epoch=4, max_update=1000, **options)
    assert both == by_epochs


def test_polynomial_goes_to_its_end_with_its_power() -> None:
    options = {"lr": 1.0, "lr_scheduler": "polynomial", "warmup_updates": 0, "end_learning_rate": 0.2}
    line = factors([1, 6, 11, 99], max_update=10, **options)
    assert line == pytest.approx([1.0, 0.6, 0.2, 0.2])
    square = factors([6], max_update=10, power=2.0, **options)
    assert square == pytest.approx([0.2 + 0.8 * 0.25])


def test_milestones_multiply_after_the_update_or_epoch_they_name() -> None:
    options = {"lr_scheduler": "milestones", "lr_milestones": (3, 5), "lr_shrink": 0.5, "warmup_updates": 0}
    assert factors([3, 4, 5, 6], **options) == [1.0, 0.5, 0.5, 0.25]
    by_epoch = factors([6, 7, 10, 11], updates_per_epoch=2, lr_unit="epoch", **options)
    assert by_epoch == [1.0, 0.5, 0.5, 0.25]


def test_constant_stays_after_its_warm_up() -> None:
    assert factors([1, 2, 3, 1000], lr_scheduler="constant", warmup_updates=2) == [0.5, 1.0, 1.0, 1.0]


def test_a_warm_up_in_epochs_is_one_in_updates() -> None:
    options = OptimizationOptions(lr_scheduler="constant", warmup_epochs=1.5)
    assert num_warmup_updates(options, updates_per_epoch=20) == 30
    assert factors([15, 30], updates_per_epoch=20, lr_scheduler="constant", warmup_epochs=1.5) == [0.5, 1.0]


@given(
    st.sampled_from(["inverse_sqrt", "cosine", "polynomial", "constant"]),
    st.sampled_from(["update", "epoch"]),
    st.integers(0, 30),
    st.integers(1, 9),
)
def test_every_schedule_rises_to_its_peak_and_never_rises_again(
    name: str, unit: str, warmup: int, updates_per_epoch: int
) -> None:
    if name == "constant":
        unit = "update"
    rates = factors(
        list(range(1, 61)),
        updates_per_epoch=updates_per_epoch,
        lr_scheduler=name,
        lr_unit=unit,
        warmup_updates=warmup,
        max_update=60,
    )
    assert all(0.0 < rate <= 1.0 for rate in rates)
    assert rates[max(warmup, 1) - 1] == 1.0
    assert rates[: max(warmup, 1)] == sorted(rates[: max(warmup, 1)])
    assert rates[max(warmup, 1) :] == sorted(rates[max(warmup, 1) :], reverse=True)


@given(
    st.lists(st.floats(0.1, 10.0) | st.just(math.nan), max_size=30),
    st.integers(0, 3),
    st.sampled_from(["min", "max"]),
)
def test_plateau_is_torchs(values: list[float], patience: int, better: str) -> None:
    options = OptimizationOptions(
        lr_scheduler="plateau", lr_patience=patience, lr_shrink=0.5, lr_threshold=0.01
    )
    plateau = Plateau()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer,
        mode=better,  # type: ignore[arg-type]
        factor=0.5,
        patience=patience,
        threshold=0.01,
        eps=0.0,
    )
    for value in values:
        plateau.note(value, options, better=better)  # type: ignore[arg-type]
        theirs.step(value)
        assert plateau.factor == optimizer.param_groups[0]["lr"]
