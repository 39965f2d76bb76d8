"""Checkpoints: complete or not there, links that always point somewhere, clear refusals."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_translation_model import write_tiny_model

from nmt.checkpoints.model_folder import average_models, load_config, load_model, load_weights
from nmt.checkpoints.run_folder import CheckpointFolder
from nmt.checkpoints.weights import weights
from nmt.errors import UserError

# Of a whole run, which the folder of checkpoints does not look into.
STATE = json.loads(
    (Path(__file__).parent / "data/checkpoints-2/run/checkpoints/update-0000008/state.json").read_text()
)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "model"
    write_tiny_model(path)
    return path


def test_a_model_folder_loads_and_holds_tied_weights_once(folder: Path) -> None:
    model, _ = load_model(str(folder))  # a text does as well as a path
    assert not model.training
    saved = load_file(folder / "model.safetensors")
    assert saved.keys() == weights(model).keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in weights(model).items())


def test_the_mean_of_models_is_the_mean(folder: Path, tmp_path: Path) -> None:
    others = []
    for i in (1, 2, 3):
        other = tmp_path / f"model{i}"
        shutil.copytree(folder, other)
        tensors = {name: tensor * i for name, tensor in load_file(folder / "model.safetensors").items()}
        save_file(tensors, other / "model.safetensors", metadata={"format": "nmt", "format_version": "1"})
        others.append(other)
    average_models(others, tmp_path / "mean")
    original, mean = weights(load_model(folder)[0]), weights(load_model(tmp_path / "mean")[0])
    for name, tensor in original.items():
        torch.testing.assert_close(mean[name], 2 * tensor)  # (1 + 2 + 3) / 3
    with pytest.raises(UserError, match="must be new"):
        average_models(others, tmp_path / "mean")


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "config.yaml",
        "sentencepiece.model",
        "dict.de.txt",
        "dict.en.txt",
        "languages.json",
    ],
)
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises((UserError, FileNotFoundError), match=name):
        load_model(folder)


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_weights_that_are_cut_short_are_refused(folder: Path, size: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r"model\.safetensors.*cut short"):
        load_model(folder)


def test_another_format_version_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file(load_file(path), path, metadata={"format": "nmt", "format_version": "99"})
    with pytest.raises(UserError, match="version 2, but is of 99"):
        load_model(folder)
    save_file(load_file(path), path)
    with pytest.raises(UserError, match="version 2, but is of none"):
        load_model(folder)


def test_a_vocabulary_of_another_size_does_not_fit_the_model(folder: Path) -> None:
    for path in folder.glob("dict.*.txt"):
        path.write_text(path.read_text() + "another 1\n")
    with pytest.raises(UserError, match="for this model and its vocabulary"):
        load_model(folder)


def test_what_is_no_model_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing"):
        load_model(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a file"):
        load_model(tmp_path / "file")


def test_weights_of_another_model_are_refused_by_name(folder: Path) -> None:
    with pytest.raises(UserError, match="has no `weight`"):
        load_weights(torch.nn.Linear(1, 1), folder)


def test_only_what_is_complete_counts_and_the_rest_is_cleaned_away(folder: Path, tmp_path: Path) -> None:
    model, task = load_model(folder)
    checkpoints = CheckpointFolder(tmp_path / "checkpoints")
    for update in (5, 10, 15):
        checkpoints.save(
            update,
            weights=weights(model),
            task=task,
            config=load_config(folder),
            optimizer={"weight.step": torch.tensor(float(update))},
            state={**STATE, "update": update},
        )
    # A process that was killed while it wrote leaves a folder with a temporary name.
    unfinished = checkpoints.path / ".update-0000020.tmp"
    unfinished.mkdir()
    (unfinished / "state.json").write_text("{")
    assert checkpoints.updates() == [5, 10, 15]
    assert (checkpoints.path / "last").readlink() == Path("update-0000015")
    checkpoints.link("best", 10)
    checkpoints.prune({10, 15})
    assert checkpoints.updates() == [10, 15]
    assert not unfinished.exists()
    assert sorted(p.name for p in checkpoints.path.iterdir()) == [
        "best",
        "last",
        "update-0000010",
        "update-0000015",
    ]
    optimizer, state = checkpoints.load_state(10)
    assert optimizer["weight.step"].item() == 10.0 and state == {**STATE, "version": 2, "update": 10}
    load_model(checkpoints.path / "best")
    state_path = checkpoints.at(10) / "state.json"
    state_path.write_text(json.dumps(state)[:-3])
    with pytest.raises(UserError, match=r"state\.json.*cut short"):
        checkpoints.load_state(10)
