"""What nmt-preprocess may replace: only files that it has made itself."""

import json
from collections.abc import Sequence
from pathlib import Path

from nmt.data.data_directory import RECORD_NAME
from nmt.errors import UserError

_FILES_TO_NAME = 5


def check_replaceable(path: Path, *, overwrite: bool) -> None:
    """Raise `UserError` if something is at `path` that may not be replaced."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not (path / RECORD_NAME).is_file():
        raise UserError(
            f"{path} must be new or empty, but holds something else than data. Choose another name."
        )
    if not overwrite:
        raise UserError(
            f"{path} must be new or empty, but is a data directory already. "
            "Choose another name, or replace it with `overwrite`."
        )
    if others := _not_ours(path):
        named = ", ".join(others[:_FILES_TO_NAME]) + (", ..." if len(others) > _FILES_TO_NAME else "")
        raise UserError(
            f"{path} must hold nothing but what nmt-preprocess has made, to be replaced with `overwrite`, but "
            f"holds {named} too. Move that elsewhere, or choose another `destdir`."
        )


def check_inputs_stay(path: Path, inputs: Sequence[Path]) -> None:
    """Raise `UserError` if a text that is read lies in the data directory that is to be replaced."""
    folder = path.resolve()
    for file in inputs:
        if folder in file.resolve().parents:
            raise UserError(
                f"{file} must lie outside of {path}, which `overwrite` replaces, but lies in it. "
                "Copy it elsewhere first, or choose another `destdir`."
            )


def _not_ours(path: Path) -> list[str]:
    """Return the names of the files in a data directory that its record does not list.

    Raises:
        UserError: The record is damaged.
    """
    try:
        ours = {RECORD_NAME, *json.loads((path / RECORD_NAME).read_bytes())["files"]}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"{path / RECORD_NAME} must tell which files nmt-preprocess has made, to replace them, but is "
            "damaged. Choose another `destdir`, or remove this one."
        ) from None
    return sorted(file.name for file in path.iterdir() if file.name not in ours or file.is_dir())
