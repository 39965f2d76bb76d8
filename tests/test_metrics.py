"""Metric scopes: who sees what, and what is kept."""

import json

import pytest
import torch

from nmt.distributed import single
from nmt.update.metrics import Metrics, merge_states

WORLD = single(torch.device("cpu"))


def test_every_open_scope_sees_a_value_logged_once() -> None:
    metrics = Metrics()
    with metrics.scope("train"):
        metrics.add({"loss": 1.0})
        with metrics.scope("interval"):
            metrics.add({"loss": 2.0, "targets": 3})
    assert metrics.sums("train", WORLD) == {"loss": 3.0, "targets": 3.0}
    assert metrics.sums("interval", WORLD) == {"loss": 2.0, "targets": 3.0}


def test_entering_a_scope_again_goes_on_accumulating_until_it_is_reset() -> None:
    metrics = Metrics()
    for _ in range(2):
        with metrics.scope("train"), metrics.scope("interval"):
            metrics.add({"loss": 1.0})
    metrics.reset("interval")
    assert metrics.sums("interval", WORLD) == {}
    assert metrics.sums("train", WORLD) == {"loss": 2.0}


def test_a_scope_that_is_reset_while_open_stays_open() -> None:
    metrics = Metrics()
    with metrics.scope("train"):
        metrics.add({"loss": 1.0})
        metrics.reset("train")
        metrics.add({"loss": 5.0})
    assert metrics.sums("train", WORLD) == {"loss": 5.0}


def test_a_scope_inside_itself_counts_once() -> None:
    metrics = Metrics()
    with metrics.scope("train"), metrics.scope("train"):
        metrics.add({"loss": 1.0})
    assert metrics.sums("train", WORLD) == {"loss": 1.0}


def test_a_scope_closes_on_an_exception() -> None:
    metrics = Metrics()
    with pytest.raises(KeyError), metrics.scope("train"), metrics.scope("interval"):
        raise KeyError
    metrics.add({"loss": 1.0})
    assert metrics.sums("train", WORLD) == {}


def test_a_scope_decorates_a_function() -> None:
    metrics = Metrics()

    @metrics.scope("valid")
    def validate() -> None:
        metrics.add({"loss": 1.0})

    validate()
    validate()
    assert metrics.sums("valid", WORLD) == {"loss": 2.0}


def test_nothing_is_kept_without_an_open_scope() -> None:
    metrics = Metrics()
    metrics.add({"loss": 1.0})
    assert metrics.state_dict() == {}


def test_sums_are_kept_in_float64() -> None:
    metrics = Metrics()
    with metrics.scope("train"):
        metrics.add({"targets": torch.tensor(2**24, dtype=torch.float32)})
        for _ in range(3):
            metrics.add({"targets": torch.tensor(1, dtype=torch.int64)})
    assert metrics.sums("train", WORLD) == {"targets": 2.0**24 + 3}


def test_a_tensor_is_copied_and_cut_from_the_graph() -> None:
    metrics = Metrics()
    loss = torch.ones(1, dtype=torch.float64, requires_grad=True)
    with metrics.scope("train"):
        metrics.add({"loss": loss})
        metrics.gauge("norm", loss)
        with torch.no_grad():
            loss.fill_(9.0)
        metrics.add({"loss": loss})
    assert metrics.sums("train", WORLD) == {"loss": 10.0}
    assert metrics.gauges("train") == {"norm": 1.0}


def test_reading_changes_nothing() -> None:
    metrics = Metrics()
    with metrics.scope("train"):
        metrics.add({"loss": torch.tensor(1.0)})
    assert metrics.sums("train", WORLD) == metrics.sums("train", WORLD) == {"loss": 1.0}


def test_a_gauge_is_the_last_value() -> None:
    metrics = Metrics()
    with metrics.scope("train"):
        metrics.gauge("lr", 0.1)
        metrics.gauge("lr", torch.tensor(0.25))
    assert metrics.gauges("train") == {"lr": 0.25}
    assert metrics.sums("train", WORLD) == {}


def test_more_than_one_number_is_refused() -> None:
    metrics = Metrics()
    with metrics.scope("train"), pytest.raises(AssertionError, match="one number"):
        metrics.add({"loss": torch.ones(2)})


def test_a_restored_state_goes_on_exactly() -> None:
    metrics = Metrics()
    with metrics.scope("train"):
        metrics.add({"loss": torch.tensor(0.1, dtype=torch.float64) / 3})
        metrics.gauge("lr", 0.1)
    state = json.loads(json.dumps(metrics.state_dict()))

    restored = Metrics()
    with restored.scope("train"):
        restored.add({"old": 1.0})
        restored.load_state_dict(state)
        restored.add({"loss": torch.tensor(0.7)})
    with metrics.scope("train"):
        metrics.add({"loss": torch.tensor(0.7)})
    assert restored.sums("train", WORLD) == metrics.sums("train", WORLD)
    assert restored.gauges("train") == {"lr": 0.1}


def test_merged_states_add_up_and_keep_the_gauges_of_the_first() -> None:
    states = []
    for rank in range(2):
        metrics = Metrics()
        with metrics.scope("train"):
            metrics.add({"loss": 1.0 + rank, f"only_{rank}": 5.0})
            metrics.gauge("lr", rank)
        states.append(metrics.state_dict())
    assert merge_states(states) == {
        "train": {"sums": {"loss": 3.0, "only_0": 5.0, "only_1": 5.0}, "gauges": {"lr": 0.0}}
    }
    assert states[0]["train"]["sums"]["loss"] == 1.0
