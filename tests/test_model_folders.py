"""Which model a user means: by a model folder, a run, its `checkpoints`, an ensemble, or where links are files."""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_translation_model import write_tiny_model
from support.toy_run import config, log

import nmt
from nmt.checkpoints.find_folder import find_model, find_models, moved_path, split_models, write_link
from nmt.checkpoints.run_folder import CheckpointFolder
from nmt.cli import average, convert, generate, score, validate
from nmt.errors import UserError
from nmt.train_loop import train


def folder_of_model(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "model.safetensors").touch()
    return path


def make_run(path: Path, **links: str) -> Path:
    for update in (5, 60):
        folder_of_model(path / f"checkpoints/update-{update:07}")
    for name, target in links.items():
        (path / "checkpoints" / name).symlink_to(target)
    (path / "config.yaml").touch()
    return path


def refuse_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refuse)


def test_a_model_folder_is_itself(tmp_path: Path) -> None:
    folder = folder_of_model(tmp_path / "m")
    assert (find_model(folder).folder, find_model(folder).note) == (folder, None)


@pytest.mark.parametrize("within", ["", "checkpoints"])
def test_of_a_run_the_best_checkpoint_is_taken_or_the_last(tmp_path: Path, within: str) -> None:
    run = make_run(tmp_path / "r", best="update-0000005", last="update-0000060")
    found = find_model(run / within)
    assert found.folder == run / "checkpoints/best"
    assert found.note == f"{run}/checkpoints/best (the best checkpoint, of update 5)"
    (run / "checkpoints/best").unlink()
    note = "(the last checkpoint, as none was validated, of update 60)"
    assert find_model(run / within).note == f"{run}/checkpoints/last {note}"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("none", "but is missing"),
        ("file", "but is a file"),
        ("data", "but has no model.safetensors"),
        ("empty", "but has none yet"),
        ("r/checkpoints/best/x", "but is missing"),
    ],
)
def test_what_is_no_model_is_refused_with_what_to_name(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "file").write_text("update-0000005")
    (tmp_path / "data").mkdir()
    (tmp_path / "empty/checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=said) as caught:
        find_model(tmp_path / name)
    assert re.search(r"\b[Nn]ame ", str(caught.value))


def test_several_models_are_parted_by_colons_but_not_within_names(tmp_path: Path) -> None:
    one, other = folder_of_model(tmp_path / "a:b/m"), folder_of_model(tmp_path / "c")
    assert [x.folder for x in find_models(f"{one}:{other}")] == [one, other]
    assert [x.folder for x in find_models(f"{other}:{one}:{one}")] == [other, one, one]
    with pytest.raises(UserError, match="Colons part the models of an ensemble"):
        find_models(f"{one}x:{other}")


@given(st.lists(st.text("ab:", min_size=1, max_size=4), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_names_that_exist_are_found_again(tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> None:
    root = tmp_path_factory.mktemp("models")
    paths = [root / f"m{name}" for name in names]
    for path in paths:
        path.mkdir(exist_ok=True)
    found = split_models(":".join(map(str, paths)))
    assert all(path.exists() for path in found)
    assert ":".join(map(str, found)) == ":".join(map(str, paths))


@pytest.mark.parametrize(
    ("path", "old_run", "there"),
    [
        ("data", "run", "moved/data"),
        ("exp/data", "exp/runs/run", "data"),
        ("/old/place/data", "/old/place/run", "moved/data"),
        ("../data", "run", "data"),
    ],
)
def test_data_that_were_moved_with_the_run_are_found(
    tmp_path: Path, path: str, old_run: str, there: str
) -> None:
    checkpoint = make_run(tmp_path / "moved/run", best="update-0000005") / "checkpoints/best"
    paths = (Path(path), Path(old_run))
    assert moved_path(paths[0], old_run=paths[1], model_folder=checkpoint) is None
    (tmp_path / there).mkdir(parents=True)
    assert moved_path(paths[0], old_run=paths[1], model_folder=checkpoint) == tmp_path / there
    elsewhere = folder_of_model(tmp_path / "mean")
    assert moved_path(paths[0], old_run=paths[1], model_folder=elsewhere) is None


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a checkpoint of the tiny translation model."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    model = write_tiny_model(tmp_path_factory.mktemp("model") / "model")
    shutil.copytree(model, folder / "checkpoints/update-0000007")
    (folder / "checkpoints/best").symlink_to("update-0000007")
    return folder


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("within", ["", "checkpoints"])
def test_every_command_that_takes_a_model_takes_a_run(
    run: Path, within: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ctranslate2")
    text = tmp_path / "text"
    text.write_text("the dog runs\n")
    named, note = str(run / within), f"model: {run}/checkpoints/best (the best checkpoint, of update 7)"
    commands: list[tuple[Callable[[list[str]], None], list[str]]] = [
        (generate.main, ["--model", named, "--input", str(text), "--output", str(tmp_path / "o")]),
        (
            generate.main,
            ["--model", f"{named}:{named}", "--input", str(text), "--output", str(tmp_path / "o")],
        ),
        (score.main, ["--model", named, "--input", str(text), "--hypothesis", str(text)]),
        (convert.main, [named, "--to", "ctranslate2", str(tmp_path / "ct2"), "--sample-size", "3"]),
    ]
    for main, arguments in commands:
        main(arguments)
        assert note in capsys.readouterr().err
    baseline = ["--reference", str(text), "--baseline", named]
    generate.main(["--model", named, "--input", str(text), *baseline, "--output", str(tmp_path / "o")])
    average.main([named, "--last", "1", "--output", str(tmp_path / "mean")])
    assert nmt.Translator.load(named).translate(["the dog runs"]) == [(tmp_path / "o").read_text().strip()]


@pytest.mark.usefixtures("points_plugin")
def test_a_run_goes_on_and_is_measured_where_symbolic_links_are_impossible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refuse_links(monkeypatch)
    folder = tmp_path / "run"
    first = train(config(folder, optimization={"max_update": 10}))
    assert first.best == folder / "checkpoints/update-0000010"
    assert (folder / "checkpoints/best").read_text() == "update-0000010\n"
    train(config(folder, optimization={"max_update": 40}))
    assert "resume: from" in log(folder)
    best = CheckpointFolder(folder / "checkpoints").linked("best")
    for named in (folder, folder / "checkpoints", folder / "checkpoints/best"):
        capsys.readouterr()
        validate.main([str(named)])
        assert json.loads(capsys.readouterr().out)["loss"] < 1
        assert find_model(named).folder == best


@pytest.mark.parametrize(
    "error",
    [
        *(
            OSError(number, "no")
            for number in (errno.EPERM, errno.ENOTSUP, errno.EPROTONOSUPPORT, errno.EMLINK)
        ),
        OSError("no number"),
        NotImplementedError("os.symlink() not available on this system"),
    ],
    ids=repr,
)
def test_whatever_is_said_where_links_are_impossible_a_file_stands_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise error

    run = make_run(tmp_path / "r")
    monkeypatch.setattr(os, "symlink", refuse)
    checkpoints = CheckpointFolder(run / "checkpoints")
    for update in (5, 60):  # a file replaces a file, too
        checkpoints.link("best", update)
        assert checkpoints.linked("best") == checkpoints.at(update)


def test_other_errors_of_a_link_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "symlink", fail)
    make_run(tmp_path / "r")
    with pytest.raises(OSError, match="No space left"):
        CheckpointFolder(tmp_path / "r/checkpoints").link("best", 5)


def test_a_link_takes_the_place_of_a_copy_of_a_checkpoint_and_of_no_other_folder(tmp_path: Path) -> None:
    # A program that follows links has copied the run: `last` is a folder like the one it stood for.
    checkpoints = make_run(tmp_path / "r") / "checkpoints"
    for name, weights in (("update-0000005", b"five"), ("update-0000060", b"sixty"), ("last", b"five")):
        (checkpoints / name).mkdir(exist_ok=True)
        (checkpoints / name / "model.safetensors").write_bytes(weights)
    write_link(checkpoints / "last", "update-0000060")
    assert (checkpoints / "last").readlink() == Path("update-0000060")
    (checkpoints / "best").mkdir()
    (checkpoints / "best/model.safetensors").write_bytes(b"of another run")
    with pytest.raises(UserError, match=r"best` must be a link.*Rename it"):
        write_link(checkpoints / "best", "update-0000060")
    assert (checkpoints / "best/model.safetensors").read_bytes() == b"of another run"
