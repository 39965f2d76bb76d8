"""A run whose newest checkpoint is damaged says so in a line, and which one is whole."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support.toy_run import config

from nmt.checkpoints.run_state import RUN_STATE
from nmt.cli.average import main as average
from nmt.errors import DamagedError, UserError
from nmt.train_loop import train

pytestmark = pytest.mark.usefixtures("points_plugin")

NEWEST, BEFORE = 20, 16
METADATA = {"format": "nmt 2"}


def begin(folder: Path) -> Path:
    """Make a run with checkpoints at updates 8, 16 and 20; return the newest."""
    train(options(folder, NEWEST))
    return folder / "checkpoints" / f"update-{NEWEST:07d}"


def options(folder: Path, max_update: int) -> Any:
    return config(
        folder,
        optimization={"max_update": max_update, "lr_scheduler": "constant"},
        checkpoints={"save_interval_updates": 8},
    )


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield where there is a value in a tree of dicts and lists."""
    if place:
        yield place
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*place, key))


def test_every_damage_of_the_state_is_a_line_that_names_the_checkpoint_before(tmp_path: Path) -> None:
    newest = begin(tmp_path / "run")
    path = newest / "state.json"
    whole = path.read_text()
    odd = ["x", [], {}, -1, None, 1e400]
    num_refused = 0
    for number, place in enumerate(places(json.loads(whole))):
        state = json.loads(whole)
        owner = state
        for key in place[:-1]:
            owner = owner[key]
        if number % (len(odd) + 1) == len(odd):
            del owner[place[-1]]
        else:
            owner[place[-1]] = odd[number % (len(odd) + 1)]
        path.write_text(json.dumps(state))
        shutil.copytree(tmp_path / "run", tmp_path / "damaged", symlinks=True)
        try:
            train(options(tmp_path / "damaged", NEWEST + 2))
        except DamagedError as error:
            num_refused += 1
            assert f"The checkpoint of update {BEFORE} is whole: remove `" in str(error)
            assert "\n" not in str(error)
        shutil.rmtree(tmp_path / "damaged")
    assert num_refused > 30


@pytest.mark.parametrize(
    "damage",
    [
        "cut state",
        "deep state",
        "no UTF-8",
        "no state",
        "cut optimizer",
        "cut model",
        "other shapes",
        "no config",
    ],
)
def test_a_damaged_file_is_named_and_what_is_said_leads_on(tmp_path: Path, damage: str) -> None:
    newest = begin(tmp_path / "run")
    state, optimizer, model = (
        newest / "state.json",
        newest / "optimizer.safetensors",
        newest / "model.safetensors",
    )
    if damage == "cut state":
        state.write_bytes(state.read_bytes()[:100])
    elif damage == "deep state":
        state.write_bytes(b'{"trainer": ' * 10_000)
    elif damage == "no UTF-8":
        state.write_bytes(state.read_bytes().replace(b'"loss"', b'"lo\xff\xff"', 1))
    elif damage == "no state":
        state.unlink()
    elif damage == "cut optimizer":
        optimizer.write_bytes(optimizer.read_bytes()[:-7])
    elif damage == "cut model":
        model.write_bytes(model.read_bytes()[:-7])
    elif damage == "other shapes":
        tensors = {
            name: tensor[:1] if tensor.dim() else tensor for name, tensor in load_file(optimizer).items()
        }
        save_file(tensors, optimizer, METADATA)
    else:
        (newest / "config.yaml").unlink()
    # The one before it is damaged too: what is said names both, and the first that is whole.
    (newest.with_name(f"update-{BEFORE:07d}") / "state.json").write_text("{")
    with pytest.raises(DamagedError, match="The checkpoint of update 8 is whole: remove") as error:
        train(options(tmp_path / "run", NEWEST + 2))
    said = str(error.value).partition("is whole: remove")[2]
    doomed = [Path(name) for name in re.findall("`(.*?)`", said)]
    assert len(doomed) == 2
    for path in doomed:
        shutil.rmtree(path)
    train(options(tmp_path / "run", NEWEST + 2))
    assert "resume: from" in (tmp_path / "run" / "train.log").read_text()


def test_with_no_other_checkpoint_the_line_ends_there(tmp_path: Path) -> None:
    newest = begin(tmp_path / "run")
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        if folder.name != newest.name and not folder.is_symlink():
            shutil.rmtree(folder)
    (newest / "state.json").write_text("{")
    with pytest.raises(DamagedError, match=r"state\.json must be complete JSON") as error:
        train(options(tmp_path / "run", NEWEST + 2))
    assert "is whole" not in str(error.value)


def test_another_configuration_is_no_damage(tmp_path: Path) -> None:
    begin(tmp_path / "run")
    with pytest.raises(UserError, match="may not change") as error:
        train(config(tmp_path / "run", seed=2, optimization={"max_update": 22}))
    assert "is whole" not in str(error.value)


def test_averaging_reads_the_state_by_its_schema_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = begin(tmp_path / "run")
    state = json.loads((newest / "state.json").read_text())
    state["progress"] = {"values": {"x": 1.0}, "num_without_better": 0}
    (newest / "state.json").write_text(json.dumps(state))
    with pytest.raises(SystemExit) as end:
        average([str(newest.parent), "--best", "1", "--output", str(tmp_path / "mean")])
    assert end.value.code == 2
    assert "`a name in progress.values` must be an update, but is 'x'" in capsys.readouterr().err


def test_what_is_written_is_what_the_schema_says(tmp_path: Path) -> None:
    newest = begin(tmp_path / "run")
    state = json.loads((newest / "state.json").read_text())
    assert RUN_STATE.check(state, "") == state
