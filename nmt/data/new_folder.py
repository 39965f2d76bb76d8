"""A folder that appears under its name when it is complete, or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nmt.errors import UserError


@contextmanager
def new_folder(path: Path, *, mark: str, overwrite: bool) -> Iterator[Path]:
    """Give a temporary sibling folder to write into; rename it to `path` when the block ends well.

    On an exception the temporary folder is removed. That of a killed run stays, and is removed by the next.

    Args:
        path: The final name. Its parents are made; an empty folder there is replaced.
        mark: The file by which a folder is known to be of this kind, and may be replaced.
        overwrite: Replace what is at `path`, if it has the mark.

    Raises:
        UserError: Something is at `path` that may not be replaced, or another process is writing it.
    """
    path = path.resolve()  # through symbolic links, so that the sibling is on the same file system
    check_replaceable(path, mark=mark, overwrite=overwrite)
    temporary = path.with_name(path.name + ".nmt-preprocess.tmp")
    temporary.mkdir(parents=True, exist_ok=True)
    lock = os.open(temporary, os.O_RDONLY)
    try:
        _lock(lock, temporary)
        _empty(temporary)
        try:
            yield temporary
            for file in temporary.iterdir():
                _sync(file)
            _sync(temporary)
            _rename(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def check_replaceable(path: Path, *, mark: str, overwrite: bool) -> None:
    """Raise `UserError` if something is at `path` that may not be replaced."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not (path / mark).is_file():
        raise UserError(
            f"{path} must be new or empty, but holds something else than data. Choose another name."
        )
    if not overwrite:
        raise UserError(
            f"{path} must be new or empty, but is a data directory already. "
            "Choose another name, or replace it with `overwrite`."
        )


def _lock(lock: int, temporary: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{temporary} must be free, but another process writes there. Wait.") from None
    except OSError:
        pass  # a file system without locks


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        entry.unlink()


def _rename(temporary: Path, path: Path) -> None:
    replaced = path.with_name(path.name + ".nmt-preprocess.old")
    if path.exists() and any(path.iterdir()):
        if replaced.exists():
            shutil.rmtree(replaced)
        path.rename(replaced)
    temporary.rename(path)
    _sync(path.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def _sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
