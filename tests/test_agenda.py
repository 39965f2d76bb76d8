"""What is due in a run, as a table: each line is a moment, some options and what is to be done then."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.toy_run import config, records

from nmt.checkpoints.run_folder import CheckpointFolder
from nmt.options import TrainConfig
from nmt.run.agenda import Due, Moment, due
from nmt.train_loop import train

NO_END = {"max_update": None}
# In the middle of the second epoch, after update 20, which is none of those that are reported.
MIDDLE = Moment(20, 2)
# After update 32, the last one of the second epoch; then when its reading has ended, too.
LAST_OF_EPOCH = Moment(32, 2, is_epoch_complete=True)
OVER = replace(LAST_OF_EPOCH, is_epoch_over=True)


def what_is_due(moment: Moment, checkpoints: dict[str, Any], optimization: dict[str, Any]) -> set[str]:
    """The names of what is due, and the reason in words."""
    options = config(
        Path("run"), log_interval=7, checkpoints=checkpoints, optimization={**NO_END, **optimization}
    )
    found = due(moment, options)
    return {name if value is True else str(value) for name, value in vars(found).items() if value}


TABLE: list[tuple[Moment, dict[str, Any], dict[str, Any], set[str]]] = [
    # Nothing, a report, and what has an interval in updates.
    (MIDDLE, {}, {}, set()),
    (replace(MIDDLE, update=21), {}, {}, {"report"}),
    (MIDDLE, {"validate_interval_updates": 10}, {}, {"validate"}),
    (MIDDLE, {"validate_interval_updates": 11}, {}, set()),
    (MIDDLE, {"save_interval_updates": 5}, {}, {"save"}),
    (MIDDLE, {"save_interval_updates": 7}, {}, set()),
    (MIDDLE, {"keep_every_updates": 4}, {}, {"save", "keep"}),
    (MIDDLE, {"keep_every_epochs": 2}, {}, set()),
    # A validation saves; there is one checkpoint where both are due.
    (MIDDLE, {"validate_interval_updates": 10, "save_interval_updates": 5}, {}, {"validate"}),
    (MIDDLE, {"validate_interval_updates": 10, "keep_every_updates": 5}, {}, {"validate", "keep"}),
    (replace(MIDDLE, is_validated=True), {"validate_interval_updates": 10}, {}, set()),
    # The last update of an epoch: what the end of the epoch brings is not saved before it.
    (LAST_OF_EPOCH, {}, {}, set()),
    (LAST_OF_EPOCH, {"save_interval_updates": 2}, {}, set()),
    (LAST_OF_EPOCH, {"save_interval_updates": 2, "validate_interval": 3}, {}, {"save"}),
    (
        LAST_OF_EPOCH,
        {"save_interval_updates": 2, "validate_interval": 3, "keep_every_epochs": 2},
        {},
        {"keep"},  # by what is saved when the epoch is over
    ),
    (LAST_OF_EPOCH, {"validate_interval_updates": 16}, {}, {"validate"}),
    (LAST_OF_EPOCH, {"validate_interval_updates": 16, "keep_every_epochs": 2}, {}, {"validate", "keep"}),
    # The epoch is over.
    (OVER, {}, {}, {"validate"}),
    (OVER, {"validate_interval": 2}, {}, {"validate"}),
    (OVER, {"validate_interval": 3}, {}, set()),
    (OVER, {"validate_interval": 3, "keep_every_epochs": 2}, {}, {"save", "keep"}),
    (OVER, {"validate_interval": 3, "keep_every_epochs": 3}, {}, set()),
    (OVER, {"validate_interval": 3, "save_interval_updates": 2}, {}, set()),  # it was saved before
    (replace(OVER, is_validated=True), {}, {}, set()),  # as an interval of updates had it
    (replace(OVER, is_validated=True, is_kept=True), {"keep_every_epochs": 2}, {}, set()),
    # What is kept for good: from an epoch on, and noted once.
    (MIDDLE, {"keep_every_updates": 4, "keep_from_epoch": 2}, {}, {"save", "keep"}),
    (MIDDLE, {"keep_every_updates": 4, "keep_from_epoch": 3}, {}, {"save"}),
    (OVER, {"keep_every_epochs": 2, "keep_from_epoch": 3}, {}, {"validate"}),
    (replace(MIDDLE, is_kept=True), {"keep_every_updates": 4}, {}, {"save"}),
    # The limits. The weights at the end are validated once, whatever else is due.
    (MIDDLE, {}, {"max_update": 20}, {"reached max-update 20", "is_last", "validate_at_end"}),
    (MIDDLE, {}, {"max_update": 21}, set()),
    (
        MIDDLE,
        {"save_interval_updates": 5},
        {"max_update": 20},
        {"reached max-update 20", "is_last", "validate_at_end"},
    ),
    (
        MIDDLE,
        {"validate_interval_updates": 5},
        {"max_update": 20},
        {"validate", "reached max-update 20", "is_last", "validate_at_end"},
    ),
    (replace(MIDDLE, is_validated=True), {}, {"max_update": 20}, {"reached max-update 20", "is_last"}),
    (LAST_OF_EPOCH, {}, {"max_epoch": 2}, set()),
    (OVER, {}, {"max_epoch": 3}, {"validate"}),
    (
        OVER,
        {},
        {"max_epoch": 2},
        {"validate", "reached max-epoch 2", "is_last", "validate_at_end"},
    ),
    (  # one checkpoint, which knows its validation
        OVER,
        {"validate_interval": 3, "keep_every_epochs": 2},
        {"max_epoch": 2},
        {"keep", "reached max-epoch 2", "is_last", "validate_at_end"},
    ),
    (
        replace(MIDDLE, is_validated=True, num_without_better=2),
        {"best_checkpoint_metric": "accuracy"},
        {"patience": 2},
        {"accuracy has not become better in 2 validations (patience)", "is_last"},
    ),
    (
        replace(MIDDLE, is_validated=True, num_without_better=3),
        {"best_checkpoint_metric": "accuracy"},
        {"patience": 2, "patience_metric": "loss"},
        {"loss has not become better in 2 validations (patience)", "is_last"},
    ),
    (replace(MIDDLE, num_without_better=2), {}, {"patience": 3}, set()),
    (replace(MIDDLE, num_without_better=2), {}, {}, set()),
    (replace(MIDDLE, seconds=7199.0), {}, {"stop_time_hours": 2.0}, set()),
    (
        replace(MIDDLE, seconds=7200.0),
        {},
        {"stop_time_hours": 2.0},
        {"reached stop-time-hours 2", "is_last", "validate_at_end"},
    ),
    (MIDDLE, {}, {"stop_time_hours": 1e-9}, set()),  # nobody has looked at the clock yet
    (replace(MIDDLE, lr=0.01), {}, {"stop_min_lr": 0.01}, set()),  # in the warm-up it is low, too
    (replace(MIDDLE, lr=0.011, is_past_warmup=True), {}, {"stop_min_lr": 0.01}, set()),
    (
        replace(MIDDLE, lr=0.01, is_past_warmup=True),
        {},
        {"stop_min_lr": 0.01},
        {"the learning rate has fallen to stop-min-lr 0.01", "is_last", "validate_at_end"},
    ),
    (replace(MIDDLE, lr=0.0, is_past_warmup=True), {}, {}, set()),
    # Somebody has asked to stop: what is due is made up for later, unless the run has come to its end anyway.
    (replace(MIDDLE, is_asked_to_stop=True), {"validate_interval_updates": 10}, {}, {"is_last"}),
    (replace(MIDDLE, is_asked_to_stop=True), {"save_interval_updates": 10}, {}, {"is_last"}),
    (replace(MIDDLE, is_asked_to_stop=True), {"keep_every_updates": 10}, {}, {"is_last", "keep"}),
    (replace(OVER, is_asked_to_stop=True), {}, {}, {"is_last"}),
    (
        replace(MIDDLE, is_asked_to_stop=True),
        {"validate_interval_updates": 10},
        {"max_update": 20},
        {"validate", "is_last", "reached max-update 20", "validate_at_end"},
    ),
]


@pytest.mark.parametrize(("moment", "checkpoints", "optimization", "expected"), TABLE)
def test_what_is_due(
    moment: Moment, checkpoints: dict[str, Any], optimization: dict[str, Any], expected: set[str]
) -> None:
    assert what_is_due(moment, checkpoints, optimization) == expected


def walk(options: TrainConfig[Any], *, updates_per_epoch: int) -> Iterator[tuple[str, int]]:
    """What a run does without a model: yield ("validate" or "save" or "keep" or "end", after which update)."""
    moment = Moment(0, 1)
    validated: set[int] = set()
    kept: set[int] = set()

    def now(**changes: bool) -> Due:
        nonlocal moment
        is_known = {"is_validated": moment.update in validated, "is_kept": moment.update in kept}
        moment = replace(moment, **{**is_known, **changes})
        return due(moment, options)

    def do(found: Due, *, at_end: bool = False) -> Iterator[tuple[str, int]]:
        is_validation = found.validate or (at_end and found.validate_at_end)
        if not (is_validation or found.save):
            return
        yield ("validate" if is_validation else "save"), moment.update
        if is_validation:
            validated.add(moment.update)
        if found.keep:
            yield "keep", moment.update
            kept.add(moment.update)

    while not now().is_last:
        is_complete = (moment.update + 1) % updates_per_epoch == 0
        moment = replace(
            moment,
            update=moment.update + 1,
            epoch=moment.update // updates_per_epoch + 1,
            is_epoch_complete=is_complete,
            is_epoch_over=False,
        )
        yield from do(now())
        if is_complete and not now().is_last:
            yield from do(now(is_epoch_over=True))
    yield from do(now(), at_end=True)
    yield "end", moment.update


def at(events: Iterator[tuple[str, int]], *names: str) -> list[int]:
    return [update for name, update in events if name in names]


def test_a_run_stops_after_an_epoch_and_validates_at_the_end_of_each() -> None:
    options = config(Path("run"), optimization={"max_update": None, "max_epoch": 2})
    assert list(walk(options, updates_per_epoch=16)) == [("validate", 16), ("validate", 32), ("end", 32)]


def test_what_is_kept_for_good_is_so_from_an_epoch_on() -> None:
    given = {"validate_interval": 100, "keep_from_epoch": 3}
    by_epoch = config(Path("run"), checkpoints={**given, "keep_every_epochs": 2})
    assert at(walk(by_epoch, updates_per_epoch=16), "keep") == [64, 96]
    by_update = config(Path("run"), checkpoints={**given, "keep_every_updates": 20})
    assert at(walk(by_update, updates_per_epoch=16), "keep") == [40, 60, 80, 100]


INTERVALS = st.none() | st.integers(1, 12)


@given(
    checkpoints=st.fixed_dictionaries(
        {
            "validate_interval": st.integers(1, 4),
            "validate_interval_updates": INTERVALS,
            "save_interval_updates": INTERVALS,
            "keep_every_updates": INTERVALS,
            "keep_every_epochs": INTERVALS,
        }
    ),
    max_update=st.integers(1, 40),
    updates_per_epoch=st.integers(1, 9),
)
def test_each_update_is_saved_once_and_none_that_is_due_is_missed(
    checkpoints: dict[str, Any], max_update: int, updates_per_epoch: int
) -> None:
    """The slow reference asks of each update alone what the intervals say."""
    options = config(Path("run"), checkpoints=checkpoints, optimization={"max_update": max_update})
    events = list(walk(options, updates_per_epoch=updates_per_epoch))

    def are_due(count_of: str, interval: str) -> set[int]:
        every = checkpoints[interval]
        if every is None:
            return set()
        unit = {"updates": 1, "epochs": updates_per_epoch}[count_of]
        return {update for update in range(1, max_update + 1) if update % (unit * every) == 0}

    validated = are_due("updates", "validate_interval_updates") | {max_update}
    validated |= are_due("epochs", "validate_interval")
    kept = are_due("updates", "keep_every_updates") | are_due("epochs", "keep_every_epochs")
    saved = validated | kept | are_due("updates", "save_interval_updates")
    assert at(iter(events), "validate") == sorted(validated)
    assert at(iter(events), "keep") == sorted(kept)
    assert at(iter(events), "validate", "save") == sorted(saved)


@pytest.mark.usefixtures("points_plugin")
def test_a_run_does_what_the_agenda_says(tmp_path: Path) -> None:
    """All at once, so that intervals meet: in 52 updates of 16 an epoch."""
    checkpoints = {
        "validate_interval": 2,
        "validate_interval_updates": 12,
        "save_interval_updates": 10,
        "keep_every_updates": 13,
        "keep_every_epochs": 3,
        "keep_from_epoch": 2,
        "keep_last": 100,
    }
    options = config(tmp_path, checkpoints=checkpoints, optimization={"max_update": 52})
    train(options)
    events = list(walk(options, updates_per_epoch=16))
    validated = at(iter(events), "validate")
    assert validated == [12, 24, 32, 36, 48, 52]
    assert [record["update"] for record in records(tmp_path, "valid")] == validated
    folder = CheckpointFolder(tmp_path / "checkpoints")
    assert folder.updates() == at(iter(events), "validate", "save")
    state = json.loads((folder.at(52) / "state.json").read_text())
    assert state["progress"]["kept"] == at(iter(events), "keep") == [26, 39, 48, 52]
    for update in validated:  # where a save falls on a validation there is one checkpoint, which knows of it
        state = json.loads((folder.at(update) / "state.json").read_text())
        assert str(update) in state["progress"]["values"]
