"""What may be a mistake is said before the first update, and stops nothing."""

from pathlib import Path

import pytest
from support.toy_run import config, log
from support.toy_task import PointExamples, PointTask

from nmt.data.options import BatchingOptions
from nmt.train_loop import train

pytestmark = pytest.mark.usefixtures("points_plugin")


def warnings(folder: Path) -> list[str]:
    return [line.partition("warning: ")[2] for line in log(folder).splitlines() if "warning: " in line]


def test_a_run_without_mistakes_is_warned_of_nothing(tmp_path: Path) -> None:
    train(config(tmp_path / "run", optimization={"max_update": 20}))
    assert warnings(tmp_path / "run") == []


@pytest.mark.parametrize(
    ("length", "warmup", "reached"),
    [
        ({"max_update": 10}, {"warmup_updates": None}, "5.00e-05"),  # of 4,000 by default: 0.02 * 10 / 4000
        ({"max_update": 10}, {"warmup_updates": 20}, "1.00e-02"),
        ({"max_update": None, "max_epoch": 1}, {"warmup_updates": None, "warmup_epochs": 2.0}, "1.00e-02"),
    ],
)
def test_a_warm_up_longer_than_the_run(
    tmp_path: Path, length: dict[str, int], warmup: dict[str, float], reached: str
) -> None:
    train(config(tmp_path / "run", optimization={**length, **warmup}))
    (line,) = warnings(tmp_path / "run")
    assert (
        line.startswith("the warm-up of ")
        and f"the learning rate only rises, to {reached} of 2.00e-02" in line
    )


@pytest.mark.parametrize(
    ("optimizer", "warned"), [("adam", True), ("adamw", True), ("sgd", True), ("adafactor", True)]
)
def test_a_learning_rate_of_5(tmp_path: Path, optimizer: str, warned: bool) -> None:
    options = {"lr": 5.0, "optimizer": optimizer, "max_update": 6}
    train(config(tmp_path / "run", optimization=options))
    assert any("`lr` 5 is far above" in line for line in warnings(tmp_path / "run")) == warned


def test_validation_examples_that_are_the_training_examples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PointTask, "open_split", lambda self, split: PointExamples(100, 7))
    train(config(tmp_path / "run", optimization={"max_update": 8}))
    (line,) = warnings(tmp_path / "run")
    assert line.startswith("the validation examples are the training examples")


def test_what_a_limit_leaves_out_is_not_counted_in_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_split(self: PointTask, split: str) -> PointExamples:
        examples = PointExamples(400 if split == "train" else 100, 7)
        examples.sizes[::2] = 5
        return examples

    monkeypatch.setattr(PointTask, "open_split", open_split)
    batching = BatchingOptions(max_tokens=4, batch_size=32)
    train(config(tmp_path / "run", batching=batching, optimization={"max_update": 8}))
    assert warnings(tmp_path / "run") == [
        "left out: 200 of 400 training examples (50.00%) are longer than max-tokens"
    ]
    assert "data     200 training examples (200 more are left out), 100 validation examples" in log(
        tmp_path / "run"
    )
    assert "updates  50 an epoch, of about 4 targets" in log(tmp_path / "run")


def test_sharding_on_a_single_rank(tmp_path: Path) -> None:
    for is_sharded in (False, True):
        folder = tmp_path / str(is_sharded)
        train(config(folder, optimization={"max_update": 8, "shard_weights": is_sharded}))
        assert any("`shard-weights` deals a model out" in line for line in warnings(folder)) == is_sharded
