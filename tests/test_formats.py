"""Checkpoints of every format version that is to load: kept in tests/data, and used, not only opened."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from nmt.checkpoints.model_folder import load_config, load_model
from nmt.checkpoints.run_folder import CheckpointFolder
from nmt.checkpoints.tensor_file import FORMAT_VERSION
from nmt.cli.train import main as train
from nmt.errors import UserError
from nmt.translation.translator import Translator

KEPT = sorted((Path(__file__).parent / "data").glob("checkpoints-*"))
UPDATE = "update-0000008"


@pytest.fixture(params=KEPT, ids=lambda path: path.name)
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of a kept run and its data."""
    shutil.copytree(request.param, tmp_path / "kept", symlinks=True)
    return tmp_path / "kept"


def test_the_present_version_has_its_checkpoint() -> None:
    """If this fails, the version is new: run scripts/make_checkpoint_fixture.py and commit what it makes."""
    assert f"checkpoints-{FORMAT_VERSION}" in [path.name for path in KEPT]
    assert sum(path.stat().st_size for path in KEPT[-1].rglob("*") if path.is_file()) < 200_000


def test_a_kept_model_translates(kept: Path) -> None:
    folder = kept / "run" / "checkpoints" / "best"
    translations = Translator.load(folder).translate(["1 2 3", "4 5 6 7"])
    assert len(translations) == 2 and all(isinstance(text, str) for text in translations)
    model, _ = load_model(folder)
    stored = load_file(folder / "model.safetensors")
    assert len(stored) == len(dict(model.named_parameters()))


def test_a_kept_run_goes_on(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the options that it was begun with, from the update and with the records that it had."""
    monkeypatch.chdir(kept)
    before = (kept / "run" / "metrics.jsonl").read_text()
    train(["--config", "run/config.yaml", "--max-update", "12"])
    after = (kept / "run" / "metrics.jsonl").read_text()
    assert after.startswith(before)
    resume, *reports = map(json.loads, after.removeprefix(before).splitlines())
    assert resume["changed"]["max-update"][1] == "12"
    updates = [record["update"] for record in reports]
    assert updates[0] == 10 and updates[-1] == 12
    assert (
        "resume: from run/checkpoints/update-0000008, update 8, epoch 2"
        in (kept / "run/train.log").read_text()
    )
    steps = load_file(kept / "run" / "checkpoints" / "last" / "optimizer.safetensors")
    assert {int(tensor) for name, tensor in steps.items() if name.endswith(".step")} == {12}
    assert load_config(kept / "run" / "checkpoints" / "last").optimization.max_update == 12


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        (
            {"format": "nmt 99"},
            r"version \d+, but is of 99\. A newer release of nmt-toolkit wrote it: install",
        ),
        (
            {"format": "nmt 0"},
            r"version \d+, but is of 0\. An older release of nmt-toolkit wrote it: use that",
        ),
        ({"format": "pt"}, r"version \d+, but is of none: nmt-toolkit did not write it"),
        ({}, r"version \d+, but is of none: nmt-toolkit did not write it"),
    ],
    ids=["newer", "older", "another program's", "none"],
)
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_another_version_says_what_to_do(kept: Path, metadata: dict[str, str], said: str, name: str) -> None:
    path = kept / "run" / "checkpoints" / UPDATE / name
    save_file(load_file(path), path, metadata=metadata)
    with pytest.raises(UserError, match=said):
        load_model(path.parent)
        CheckpointFolder(path.parent.parent).load_state(8)


def test_a_newer_version_says_so_before_it_is_asked_for_options_of_its_own(
    kept: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = kept / "run" / "checkpoints" / UPDATE
    for path in folder.glob("*.safetensors"):
        save_file(load_file(path), path, metadata={"format": "nmt 99"})
    with (folder / "config.yaml").open("a") as file:
        file.write("an-option-of-later-times: 1\n")
    with pytest.raises(UserError, match="A newer release of nmt-toolkit wrote it"):
        load_model(folder)
    monkeypatch.chdir(kept)
    with pytest.raises(SystemExit):
        train(["--config", "run/config.yaml", "--max-update", "12"])
    assert "A newer release of nmt-toolkit wrote it" in capsys.readouterr().err


def test_the_first_checkpoints_named_their_version_otherwise(kept: Path) -> None:
    path = kept / "run" / "checkpoints" / UPDATE / "model.safetensors"
    save_file(load_file(path), path, metadata={"format": "nmt", "format_version": "1"})
    load_model(path.parent)
