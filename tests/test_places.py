"""Where commands may write: nothing of the user's is replaced, or removed with a checkpoint."""

import os
from pathlib import Path

import pytest

from nmt.cli.options import AverageOptions, ScoreOptions
from nmt.cli.text_files import check_parallel, open_output
from nmt.config.mapping import parse_command
from nmt.errors import UserError
from nmt.system.places import check_new_folder, check_output_file, check_outside_of_data, check_save_dir


def _checkpoint(run: Path) -> Path:
    folder = run / "checkpoints" / "update-0000012"
    folder.mkdir(parents=True)
    for name in ("model.safetensors", "config.yaml", "state.json", "dict.en.txt"):
        (folder / name).write_text("x", encoding="utf-8")
    (run / "checkpoints" / "best").symlink_to(folder.name)
    return folder


@pytest.mark.parametrize(
    "name", ["checkpoints/best/average", "checkpoints/update-0000012/a/b", "checkpoints/update-9"]
)
def test_new_folders_are_not_made_where_a_run_removes_them(tmp_path: Path, name: str) -> None:
    _checkpoint(tmp_path)
    with pytest.raises(UserError, match="checkpoint"):
        check_new_folder(tmp_path / name, name="output")


def test_new_folders_are_new_and_lie_in_folders(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(UserError, match="must be new"):
            check_new_folder(path, name="to")
    with pytest.raises(UserError, match="is a file"):
        check_new_folder(tmp_path / "file" / "a" / "b", name="to")
    check_new_folder(tmp_path / "new" / "a", name="to")


@pytest.mark.parametrize("name", ["model.safetensors", "config.yaml", "dict.en.txt"])
def test_results_replace_no_file_of_a_model(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.safetensors").write_text("weights", encoding="utf-8")
    (tmp_path / name).write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="must not replace"), open_output(tmp_path / name) as output:
        output.write(b"text")
    assert (tmp_path / name).read_text(encoding="utf-8") == "mine"


def test_results_replace_no_text_that_belongs_to_data(tmp_path: Path) -> None:
    (tmp_path / "preprocess.json").write_text('{"files": {"test.de": 1}}', encoding="utf-8")
    for name in ("test.de", "translations.de"):
        (tmp_path / name).write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="must not replace"):
        check_output_file(tmp_path / "test.de")
    check_output_file(tmp_path / "translations.de")


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "train.log"])
def test_results_replace_no_file_of_a_run(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine", encoding="utf-8")
    check_output_file(tmp_path / name)
    _checkpoint(tmp_path)
    with pytest.raises(UserError, match="must not replace a file of a run"):
        check_output_file(tmp_path / name)
    check_output_file(tmp_path / "translations.de")


def test_results_lie_in_a_folder_outside_of_checkpoints(tmp_path: Path) -> None:
    folder = _checkpoint(tmp_path)
    for path, fault in (
        (folder / "out.de", "outside"),
        (folder, "is a folder"),
        (tmp_path / "no" / "x", "exists"),
    ):
        with pytest.raises(UserError, match=fault):
            check_output_file(path)


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/best", "checkpoints/best/run"])
def test_a_run_does_not_begin_inside_of_another(tmp_path: Path, name: str) -> None:
    _checkpoint(tmp_path)
    with pytest.raises(UserError, match="save-dir"):
        check_save_dir(tmp_path / name)
    check_save_dir(tmp_path)


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "model.safetensors"])
def test_a_run_does_not_begin_over_files_of_another_origin(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("# mine\nlr: 1e-3\n", encoding="utf-8")
    with pytest.raises(UserError, match="save-dir"):
        check_save_dir(tmp_path)


def test_a_run_without_a_checkpoint_begins_again(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("save-dir: r\nseed: '1'\ntask: translation\n", encoding="utf-8")
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train"}\n', encoding="utf-8")
    check_save_dir(tmp_path)


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        (AverageOptions, ["", "--output", "x"]),
        (AverageOptions, ["run", "--output", ""]),
        (ScoreOptions, ["--hypothesis", "x", "--reference="]),
    ],
)
def test_empty_values_are_refused(options: type, arguments: list[str]) -> None:
    with pytest.raises(UserError, match="must have a value, but it is empty"):
        parse_command(options, arguments, prog="p", description="d")


def test_one_pipe_for_two_texts_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="it is a pipe"):
        check_parallel(tmp_path / "pipe", tmp_path / "pipe")


@pytest.mark.parametrize(
    ("place", "advised"), [("images", "images-run"), ("images/run", "run"), ("images/cats/a/run", "run")]
)
def test_a_run_does_not_lie_among_its_data(tmp_path: Path, place: str, advised: str) -> None:
    (tmp_path / "images" / "cats").mkdir(parents=True)
    with pytest.raises(UserError, match=f"such as `{tmp_path.resolve() / advised}`"):
        check_outside_of_data(tmp_path / place, [tmp_path / "images"], name="save-dir")


def test_a_run_may_lie_beside_its_data_and_around_them(tmp_path: Path) -> None:
    (tmp_path / "run" / "images").mkdir(parents=True)
    for place in ("run", "images-2", "other/images"):
        check_outside_of_data(tmp_path / place, [tmp_path / "run" / "images"], name="save-dir")
