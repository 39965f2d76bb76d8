"""Where a command may write: nothing of the user's may be replaced, or removed later with a folder around it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from nmt.errors import UserError

_CHECKPOINT = re.compile(r"update-\d+")
# The files of a model folder or a data directory.
_OWN_ENDINGS = (".safetensors", ".yaml", ".json", ".model", ".bin", ".idx")
_RECORD_OF_DATA, _MODEL = "preprocess.json", "model.safetensors"
_FILES_OF_RUN = ("config.yaml", "metrics.jsonl", "train.log")
_LONGEST_KIND = 100  # bytes, enough for the beginning of a record
_OPTIONS_OF_EACH_RUN = ("save-dir", "seed", "task")


def check_new_folder(path: Path, *, name: str) -> None:
    """Raise `UserError` unless a folder can be made at `path`, and is not removed later with another one.

    Args:
        path: The folder to write.
        name: The option that names it.
    """
    if path.exists() or path.is_symlink():
        raise UserError(
            f"`{name}` must be new, but `{path}` exists already. Name another folder, or remove that one."
        )
    for parent in path.absolute().parents:
        if parent.exists():
            if not parent.is_dir():
                raise UserError(
                    f"`{name}` must lie in a folder, but `{parent}` is a file. Name another folder."
                )
            break
    _check_not_in_checkpoint(path, name)
    if _is_checkpoint(path.resolve()):
        raise UserError(
            f"`{name}` must not be named like a checkpoint of the run, but is `{path}`. Name another folder."
        )


def check_output_file(path: Path) -> None:
    """Raise `UserError` unless a file of results can be written at `path` without replacing anything else."""
    if path.is_dir():
        raise UserError(f"`output` must be a file, but `{path}` is a folder. Name a file in it.")
    if path.exists() and not path.is_file():  # a pipe or a device
        return
    parent = path.resolve().parent  # of the file that is written, where `path` is a symbolic link
    if not parent.is_dir():
        raise UserError(f"`output` must be in a folder that exists, but there is no {parent}. Make it first.")
    _check_not_in_checkpoint(path, "output")
    if path.is_file() and _belongs_to_folder(path.resolve()):
        raise UserError(
            f"`output` must not replace a file of a run, a model or of data, but {path} is one. "
            "Choose another name."
        )


def check_save_dir(path: Path) -> None:
    """Raise `UserError` if a run in this folder would replace files that are not a run's, or be removed later."""
    folder = path.resolve()
    _check_not_in_checkpoint(path, "save-dir")
    if _is_checkpoint(folder) or (folder.is_dir() and any(map(_is_checkpoint, folder.iterdir()))):
        raise UserError(
            f"`save-dir` must be the folder of a run, but `{path}` is a part of one. Name the folder "
            "that `checkpoints` lies in, or another."
        )
    if any((folder / "checkpoints").glob("update-*")):
        return  # a run, which goes on
    if (folder / _MODEL).is_file():
        raise UserError(
            f"`save-dir` must be the folder of a run, but `{path}` is a model folder. Name another."
        )
    config, records = folder / "config.yaml", folder / "metrics.jsonl"
    for file, is_of_run in ((config, _is_of_run(config)), (records, _are_of_run(records))):
        if file.is_file() and file.stat().st_size and not is_of_run:
            raise UserError(
                f"`save-dir` must have no {file.name} but that of a run, which nmt-train replaces, but "
                f"`{path}` has another one. Rename that file, or name another `save-dir`."
            )


def check_outside_of_data(path: Path, folders: Iterable[Path], *, name: str) -> None:
    """Raise `UserError` if a file written at `path` would be taken for data.

    Args:
        path: What is going to be written.
        folders: Everything in them is data.
        name: The option that names `path`.
    """
    place = path.resolve()
    for folder in folders:
        data = folder.resolve()
        if place == data or data in place.parents:
            beside = data.with_name(f"{data.name}-run" if place == data else place.name)
            raise UserError(
                f"`{name}` must lie outside of `{folder}`, where every folder is taken for data, but is `{path}`. "
                f"Put it elsewhere, such as `{beside}`."
            )


def _is_of_run(config: Path) -> bool:
    """Return whether a run has written this file of options: it has all options, and no comments."""
    try:
        lines = config.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return False
    keys = {line.partition(":")[0] for line in lines}
    return keys.issuperset(_OPTIONS_OF_EACH_RUN) and not any(line.lstrip().startswith("#") for line in lines)


def _are_of_run(records: Path) -> bool:
    """Return whether a run has written this file of records; its first line tells."""
    try:
        with records.open("rb") as file:
            return file.readline(_LONGEST_KIND).startswith(b'{"kind": ')
    except OSError:
        return False


def _check_not_in_checkpoint(path: Path, name: str) -> None:
    for parent in path.resolve().parents:
        if _is_checkpoint(parent):
            raise UserError(
                f"`{name}` must lie outside of checkpoints, which a run removes when newer ones come, but "
                f"{path} is in {parent.name}. Name another place."
            )


def _belongs_to_folder(file: Path) -> bool:
    """Return whether a file is part of a run, a model folder or a data directory, not a text that lies there."""
    if file.name in _FILES_OF_RUN and (file.parent / "checkpoints").is_dir():
        return True
    record = file.parent / _RECORD_OF_DATA
    if record.is_file() and f'"{file.name}"' in record.read_text(encoding="utf-8", errors="replace"):
        return True
    is_own = file.suffix in _OWN_ENDINGS or file.name.startswith("dict.")
    return is_own and ((file.parent / _MODEL).is_file() or record.is_file())


def _is_checkpoint(folder: Path) -> bool:
    """Return whether a folder is, or would be, a checkpoint of a run."""
    if not _CHECKPOINT.fullmatch(folder.name):
        return False
    return folder.parent.name == "checkpoints" or (folder / "state.json").is_file()
