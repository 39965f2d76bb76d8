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
def new_folder(path: Path, *, replaces: bool = False) -> Iterator[Path]:
    """Give a temporary sibling folder to write into; rename it to `path` when the block ends well.

    On an exception the temporary folder is removed. A killed process leaves its temporary folder; the next attempt
    (or `remove_leftovers`) deletes it.

    Args:
        path: The final name. Its parents are made.
        replaces: Whether to replace what is at `path` when the block ends. The caller checks that it may be.

    Raises:
        UserError: Another process is writing the same folder, or something at `path` may not be replaced.
    """
    path = path.resolve()  # through symbolic links, so that the sibling is on the same file system
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.mkdir(parents=True, exist_ok=True)
    lock = os.open(temporary, os.O_RDONLY)
    try:
        _lock(lock, temporary)
        _empty(temporary)
        try:
            yield temporary
            for file in temporary.rglob("*"):
                sync(file)
            sync(temporary)
            if not replaces and path.exists() and not (path.is_dir() and not any(path.iterdir())):
                raise UserError(f"{path} must not exist, but has been made meanwhile. Choose another name.")
            _rename(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def remove_folder(path: Path) -> None:
    """Remove a folder. If the process is killed meanwhile, a part stays, but under another name."""
    doomed = path.with_name(f".{path.name}.old")
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(folder: Path, *, of: str) -> None:
    """Remove what killed processes have left of new or removed folders whose names match the pattern `of`."""
    for ending in (".tmp", ".old"):
        for leftover in folder.glob(f".{of}{ending}"):
            shutil.rmtree(leftover, ignore_errors=True)


def sync(path: Path) -> None:
    """Make sure that a file, or the list of names of a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock(lock: int, temporary: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{temporary} must be free, but another process writes there. Wait.") from None
    except OSError:
        pass  # a file system without locks


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _rename(temporary: Path, path: Path) -> None:
    replaced = path.with_name(f".{path.name}.old")
    if replaced.exists():
        shutil.rmtree(replaced)
    if path.exists():
        path.rename(replaced)
    temporary.rename(path)
    sync(path.parent)
    if replaced.exists():
        shutil.rmtree(replaced)
