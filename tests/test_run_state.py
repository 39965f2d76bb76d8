"""The state of a run goes into a checkpoint and comes back."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.toy_run import config

from nmt.checkpoints.run_folder import CheckpointFolder
from nmt.checkpoints.run_state import RUN_STATE
from nmt.config.records import check_record
from nmt.errors import DamagedError
from nmt.run.clock import Clock
from nmt.run.state import RunState, Surroundings
from nmt.run.validation_history import Progress
from nmt.train_loop import train

COUNTS = st.integers(0, 10**9)
NUMBERS = st.floats(allow_nan=False)
UPDATES = st.integers(1, 10**9)
TRAINER: dict[str, Any] = {
    "update": 7,
    "num_optimizer_tensors": 0,
    "plateau": {"factor": 0.5, "best": None, "num_without_better": 1},
    "precision": {},
    "lr": 0.1,
    "lr_scale": 1.0,
    "num_cancelled_in_a_row": 0,
    "metrics": [{"train": {"sums": {"loss": 1.5}, "gauges": {}}}],
}
BATCHES = {
    "epoch": 2,
    "window": 0,
    "cuts": [[{"max_tokens": None, "max_sentences": 32, "multiple": 1, "max_positions": None}, 64]],
    "examples_consumed": 64,
    "seed": 1,
    "window_size": 1000,
    "dataset_size": 500,
}
STATES = st.builds(
    RunState,
    trainer=st.just(TRAINER),
    batches=st.just(BATCHES),
    split_above=st.none() | UPDATES,
    surroundings=st.none()
    | st.builds(
        Surroundings,
        ranks=st.integers(1, 64),
        device=st.just("cpu"),
        precision=st.just("float32"),
        updates_per_epoch=COUNTS,
        num_examples=COUNTS,
    ),
    progress=st.builds(
        Progress,
        values=st.dictionaries(UPDATES, NUMBERS),
        num_without_better=COUNTS,
        kept=st.lists(UPDATES),
        measured=st.dictionaries(UPDATES, st.dictionaries(st.text(), NUMBERS)),
    ),
    clock=st.builds(Clock, st.floats(0.0, 1e9), st.floats(0.0, 1e9)),
    records_size=COUNTS,
)


@given(STATES)
def test_what_is_saved_is_what_may_be_read_and_comes_back_the_same(state: RunState) -> None:
    text = json.dumps(state.to_json())
    read = check_record(RUN_STATE, json.loads(text), where="state.json", error=DamagedError)
    assert RunState.from_json(read) == state


def test_the_state_of_an_older_release_knows_less() -> None:
    least = RunState(trainer=TRAINER, batches=BATCHES)
    state = least.to_json()
    del state["progress"]["measured"]
    assert "surroundings" not in state
    assert RunState.from_json(state) == least


@pytest.mark.usefixtures("points_plugin")
def test_a_run_saves_all_of_it(tmp_path: Path) -> None:
    train(config(tmp_path, optimization={"max_update": 3}))
    _, saved = CheckpointFolder(tmp_path / "checkpoints").load_state(3)
    state = RunState.from_json(saved)
    assert state.update == 3 and state.progress.values and state.clock.seconds_before > 0
    assert state.surroundings is not None and state.surroundings.num_examples == 500
    assert {**state.to_json(), "progress": saved["progress"]} == {
        key: value for key, value in saved.items() if key != "version"
    }
