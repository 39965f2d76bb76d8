"""What is other than it was when a run is taken up: said, kept, and refused where an epoch would be mixed."""

import shutil
from collections import Counter
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.toy_run import OPTIMIZATION, assert_bit_equal, config, log, records, tensors
from support.toy_task import PointExamples, PointOptions, Points, PointTask

from nmt.data.indexed_dataset import IndexedDatasetWriter
from nmt.data.options import BatchingOptions
from nmt.data.vocabulary import Vocabulary
from nmt.errors import UserError
from nmt.run.resume import changed_options, compare
from nmt.run.state import RunState, Surroundings
from nmt.train_loop import train
from nmt.translation.assets import is_same_file
from nmt.update.schedule import build_schedule

pytestmark = pytest.mark.usefixtures("points_plugin")


class SeenExamples(PointExamples):
    """Points that know themselves, and note which of them come into batches of training."""

    def __init__(self, size: int, seed: int, seen: list[float] | None = None) -> None:
        super().__init__(size, seed)
        self.seen = seen

    def fingerprint(self) -> str:
        return blake2b(self.xy.tobytes()).hexdigest()

    def collate(self, items: list[np.ndarray]) -> Points:
        if self.seen is not None:
            self.seen += [float(item[0]) for item in items]
        return super().collate(items)


class DataTask(PointTask):
    """Points that are drawn from seeds of choice."""

    def __init__(self, seeds: dict[str, int], seen: list[float]) -> None:
        self.seeds, self.seen = seeds, seen

    def open_split(self, split: str) -> SeenExamples:
        size = {"train": 96, "valid": 20}[split]
        return SeenExamples(size, self.seeds[split], self.seen if split == "train" else None)


@dataclass(frozen=True)
class DataOptions(PointOptions):
    train_seed: int = 1
    valid_seed: int = 2
    seen: list[float] = field(default_factory=list, compare=False)

    def build(self, assets: Path | None) -> PointTask:
        return DataTask({"train": self.train_seed, "valid": self.valid_seed}, self.seen)


def resumed_lines(folder: Path) -> list[str]:
    """The lines since the run was taken up last."""
    lines = [line.split(" ", 2)[2] for line in log(folder).splitlines()]
    last = max(i for i, line in enumerate(lines) if line.startswith("resume: from"))
    return lines[last:]


def of_data(folder: Path, max_update: int, **changes: Any) -> Any:
    """16 points a batch: 6 updates an epoch."""
    options = DataOptions(
        **{name: changes.pop(name) for name in ("train_seed", "valid_seed") if name in changes}
    )
    return config(
        folder,
        task_options=options,
        batching=BatchingOptions(max_tokens=None, batch_size=16),
        optimization={"max_update": max_update},
        **changes,
    )


def test_what_is_other_is_said_in_a_line_each_and_kept(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(config(folder, optimization={"max_update": 20}))
    train(
        config(
            folder,
            optimization={"max_update": 30, "lr": 0.01, "lr_scheduler": "constant", "clip_norm": 1.0},
            batching=BatchingOptions(max_tokens=None, batch_size=50),
        )
    )
    lines = resumed_lines(folder)
    for line in (
        "resume: lr 0.02 -> 0.01",
        "resume: lr-scheduler inverse_sqrt -> constant",
        "resume: max-update 20 -> 30",
        "resume: clip-norm 0.0 -> 1.0",
        "resume: batch-size 32 -> 50",
        "resume: updates an epoch 16 -> 11",
    ):
        assert line in lines
    (record,) = records(folder, "resume")
    assert record["update"] == 20 and record["changed"]["lr"] == ["0.02", "0.01"]
    assert record["changed"]["updates an epoch"] == [16, 11]
    assert len(record["changed"]) == sum(" -> " in line for line in lines) == 6


def test_a_dry_run_of_a_run_that_goes_on_tells_what_the_run_will_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    train(config(folder, optimization={"lr_scheduler": "cosine", "max_update": 20}))
    changed = {"optimization": {"lr_scheduler": "cosine", "max_update": 30, "clip_norm": 1.0}}
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    capsys.readouterr()
    train(config(folder, **changed, dry_run=True))
    said = capsys.readouterr().out.splitlines()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    train(config(folder, **changed))
    lines = resumed_lines(folder)[:4]
    assert [line.partition(" ")[0] for line in lines] == ["resume:", "resume:", "resume:", "warning:"]
    assert lines[0].endswith("update-0000020, update 20, epoch 2")
    assert said[:4] == lines


def test_a_dry_run_refuses_what_the_run_would(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(config(folder, optimization={"max_update": 10}))
    with pytest.raises(UserError, match="`seed` may not change when a run is resumed: it was 1 in"):
        train(config(folder, seed=2, dry_run=True))


def test_a_run_that_goes_on_as_it_was_says_and_keeps_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for _ in range(2):
        train(config(folder, optimization={"max_update": 20}))
    assert records(folder, "resume") == []
    assert not any(" -> " in line or "warning" in line for line in resumed_lines(folder))


@pytest.mark.parametrize("schedule", ["cosine", "polynomial"])
@pytest.mark.parametrize("unit", ["max_update", "max_epoch"])
def test_a_schedule_whose_end_moves_warns_of_the_jump(tmp_path: Path, schedule: str, unit: str) -> None:
    folder = tmp_path / "run"
    lengths = (32, 64) if unit == "max_update" else (2, 4)  # 16 updates an epoch
    both = [{"lr_scheduler": schedule, "max_update": None, unit: length} for length in lengths]
    train(config(folder, optimization=both[0]))
    train(config(folder, optimization=both[1]))
    before, now = (
        0.02 * build_schedule(replace(OPTIMIZATION, **options), updates_per_epoch=16)(33, 3)
        for options in both
    )
    assert before == 0.0 and now > 0.005
    line = (
        f"warning: the end of `lr-scheduler` {schedule} moves from update 32 to 64: the learning rate of update "
        f"33 is {now:.2e} instead of {before:.2e}"
    )
    assert line in resumed_lines(folder)
    assert [line.removeprefix("warning: ")] == records(folder, "resume")[0]["warnings"]


def test_a_warm_up_that_moves_is_said_and_a_longer_run_of_a_constant_rate_is_no_jump(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(config(folder, optimization={"max_update": 10, "warmup_updates": 5, "lr_scheduler": "constant"}))
    train(config(folder, optimization={"max_update": 20, "warmup_updates": 5, "lr_scheduler": "constant"}))
    assert not any("warning" in line for line in resumed_lines(folder))
    train(config(folder, optimization={"max_update": 30, "warmup_updates": 42, "lr_scheduler": "constant"}))
    assert "warning: the learning rate of update 21 is 1.00e-02 instead of 2.00e-02" in resumed_lines(folder)


def test_other_data_within_an_epoch_are_refused_though_they_are_as_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    before = of_data(folder, 8)  # 2 updates into the second epoch
    train(before)
    monkeypatch.setattr("nmt.run.taking_up.load_config", lambda _: before)
    monkeypatch.setattr("nmt.checkpoints.same_run.load_config", lambda _: before)
    with pytest.raises(UserError, match=r"differ from those that epoch 2 began with \(96 then, 96 now\)"):
        train(of_data(folder, 12, train_seed=3))
    train(of_data(folder, 12))  # the run has taken no harm
    assert not any("warning" in line for line in resumed_lines(folder))


def test_other_data_within_an_epoch_begin_it_anew_if_that_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    before = of_data(folder, 8)
    train(before)
    monkeypatch.setattr("nmt.run.taking_up.load_config", lambda _: before)
    monkeypatch.setattr("nmt.checkpoints.same_run.load_config", lambda _: before)
    again = of_data(folder, 14, train_seed=3, accept_changed_data=True)
    monkeypatch.setattr("nmt.train_loop.look_ahead", lambda run: [])  # which reads some batches
    train(again)
    points = SeenExamples(96, 3).xy[:, 0]
    assert Counter(again.task_options.seen) == Counter(map(float, points))  # 6 updates, each once
    assert any("epoch 2 begins with these anew" in line for line in resumed_lines(folder))


def test_other_data_between_epochs_are_taken_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    before = of_data(folder, 6)  # the end of the first epoch
    train(before)
    monkeypatch.setattr("nmt.run.taking_up.load_config", lambda _: before)
    monkeypatch.setattr("nmt.checkpoints.same_run.load_config", lambda _: before)
    again = of_data(folder, 12, train_seed=3, valid_seed=4)
    monkeypatch.setattr("nmt.train_loop.look_ahead", lambda run: [])
    train(again)
    assert Counter(again.task_options.seen) == Counter(map(float, SeenExamples(96, 3).xy[:, 0]))
    lines = resumed_lines(folder)
    assert any("(96 then, 96 now): epoch 2 begins with these" in line for line in lines)
    assert any("warning: the validation examples differ" in line for line in lines)


def test_a_checkpoint_that_does_not_know_its_data_goes_on_as_before(tmp_path: Path) -> None:
    """As those of an older release."""
    import json

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(config(whole, optimization={"max_update": 30}))
    train(config(parts, optimization={"max_update": 20}))
    path = parts / "checkpoints" / "update-0000020" / "state.json"
    state = json.loads(path.read_text())
    del state["surroundings"], state["progress"]["measured"]
    path.write_text(json.dumps(state))
    train(config(parts, optimization={"max_update": 30}))
    assert_bit_equal(tensors(whole, 30), tensors(parts, 30))


SENTENCES = st.lists(st.lists(st.integers(4, 300), min_size=1, max_size=5), min_size=1, max_size=6)


@given(SENTENCES, SENTENCES)
def test_sequences_have_one_digest_for_what_they_hold(
    tmp_path_factory: pytest.TempPathFactory, one: list[list[int]], other: list[list[int]]
) -> None:
    from nmt.data.indexed_dataset import IndexedDataset

    folder = tmp_path_factory.mktemp("digest")

    def digest(name: str, sentences: list[list[int]], dtype: str) -> bytes:
        with IndexedDatasetWriter(folder / name, np.dtype(dtype)) as writer:
            for ids in sentences:
                writer.add(np.array(ids))
        return IndexedDataset(folder / name).digest()

    assert digest("a", one, "<u2") == digest("b", one, "<i4")
    assert (digest("a", one, "<u2") == digest("c", other, "<u2")) == (one == other)
    shutil.rmtree(folder)


TOKENS = st.lists(st.sampled_from("abcdefgh"), unique=True, min_size=1)


@settings(deadline=None)  # it writes files
@given(TOKENS, TOKENS, st.data())
def test_dictionaries_are_told_apart_by_tokens_and_their_order_alone(
    tmp_path_factory: pytest.TempPathFactory, one: list[str], other: list[str], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("dictionaries")
    paths = []
    for name, tokens in (("before", one), ("now", other)):
        counts = data.draw(st.lists(st.integers(0, 9), min_size=len(tokens), max_size=len(tokens)))
        (folder / name).mkdir()
        paths.append(folder / name / "dict.en.txt")
        Vocabulary(tokens, counts).save(paths[-1])
    assert is_same_file(*paths) == (one == other)
    shutil.rmtree(folder)


def test_only_a_dictionary_may_differ_in_its_bytes(tmp_path: Path) -> None:
    for name in ("before", "now"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "languages.json").write_text(name)
    assert not is_same_file(tmp_path / "before" / "languages.json", tmp_path / "now" / "languages.json")


def test_options_that_differ_are_found_at_any_depth(tmp_path: Path) -> None:
    one = config(tmp_path, optimization={"lr": 0.1}, dry_run=True)
    other = config(tmp_path, optimization={"lr": 0.2}, checkpoints={"keep_best": 3})
    assert [str(change) for change in changed_options(one, other)] == ["lr 0.1 -> 0.2", "keep-best 1 -> 3"]


def test_ranks_device_and_type_are_told_from_those_of_the_checkpoint(tmp_path: Path) -> None:
    here = Surroundings(1, "cpu", "float32", 16, 500, "a", "b")
    state = RunState(
        trainer={"update": 0, "lr_scale": 1.0, "plateau": {}},
        batches={"epoch": 1, "examples_consumed": 0},
        surroundings=replace(here, ranks=4, device="cuda", precision="bfloat16"),
    )
    options = config(tmp_path)
    assert [str(change) for change in compare(options, options, state, here, folder=tmp_path).changes] == [
        "ranks 4 -> 1",
        "kind of device cuda -> cpu",
        "type of the updates bfloat16 -> float32",
    ]
