"""What may happen to a process when it changes the disk: it is killed, or the disk is full.

`DiskFaults.install` replaces, in a process that is forked for it, the functions through which Python changes
files, and safetensors' writer, which writes where Python cannot see. Each call is an operation, numbered from 0.
Only what goes to one folder counts.
"""

import errno
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
from safetensors import SafetensorError

Fault = Literal["none", "kill before", "kill half-way", "full"]
KILLED = 137  # the exit code, as a shell reports SIGKILL

# Functions of `os` that change the disk, and whether they need room.
_CHANGES = {
    "mkdir": True,
    "symlink": True,
    "link": True,
    "sendfile": True,
    "rename": False,
    "replace": False,
    "chmod": False,
    "unlink": False,
    "remove": False,
    "rmdir": False,
    "truncate": False,
    "ftruncate": False,
    "fsync": False,
    "fdatasync": False,
    "write": True,
}


class DiskFaults:
    """Counts the operations of this process, and strikes at one of them."""

    def __init__(self, folder: Path, fault: Fault = "none", at: int = -1) -> None:
        self.folder = folder.resolve()
        self.fault = fault
        self.at = at
        self.seen: list[str] = []  # "name path" of each operation
        self._originals = {name: getattr(os, name) for name in [*_CHANGES, "open"] if hasattr(os, name)}
        self._open = io.open
        self._serialize_file = safetensors.torch.serialize_file

    def install(self) -> None:
        """Replace the functions, for the rest of this process's life."""
        import builtins

        for name in _CHANGES:
            if name in self._originals:
                setattr(os, name, self._watched(name, self._originals[name], needs_room=_CHANGES[name]))
        os.open = self._os_open  # type: ignore[assignment]
        builtins.open = io.open = self._file_open  # type: ignore[assignment]
        safetensors.torch.serialize_file = self._save_tensors

    def strike(self, name: str, path: Any, *, needs_room: bool, half: Callable[[], object] = bool) -> None:
        """Count an operation before it is done; `half` does the first half of it."""
        if not self._counts(path):
            return
        number = len(self.seen)
        self.seen.append(f"{name} {path}")
        if self.fault == "full":
            if number >= self.at and needs_room:
                half()
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        elif number == self.at and self.fault != "none":
            if self.fault == "kill half-way":
                half()
            os._exit(KILLED)

    def _counts(self, path: Any) -> bool:
        if isinstance(path, int):
            try:
                path = Path(f"/proc/self/fd/{path}").readlink()
            except OSError:
                return True  # not Linux: it may well be
        return Path(os.fsdecode(path)).parent.resolve().is_relative_to(self.folder)

    def _watched(self, name: str, original: Callable[..., Any], *, needs_room: bool) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            folder = next(
                (kwargs[key] for key in ("dir_fd", "src_dir_fd") if kwargs.get(key) is not None), None
            )
            # Of `symlink` the second argument is the place; of a name relative to a folder it is that folder.
            place = args[1] if name == "symlink" else args[0]
            self.strike(name, place if folder is None else folder, needs_room=needs_room)
            # What a killed process has written is not lost but with the machine: there is nothing to wait for.
            return None if name in ("fsync", "fdatasync") else original(*args, **kwargs)

        return watched

    def _os_open(self, path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & (os.O_CREAT | os.O_TRUNC) and not isinstance(path, int):
            self.strike("create", path, needs_room=True)
        return self._originals["open"](path, flags, *args, **kwargs)

    def _file_open(
        self,
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        is_changed = any(letter in mode for letter in "wax+")
        if not is_changed or isinstance(file, int) or not self._counts(file):
            return self._open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        assert buffering == -1 and closefd and opener is None and "+" not in mode, "not needed so far"
        self.strike(f"open {mode}", file, needs_room=True)
        buffer = io.BufferedWriter(_WatchedFile(self, file, mode.replace("b", "").replace("t", "")))
        return buffer if "b" in mode else io.TextIOWrapper(buffer, encoding, errors, newline)

    def _save_tensors(self, tensors: Any, filename: Any, metadata: Any = None) -> None:
        def half() -> None:
            self._serialize_file(tensors, filename, metadata)
            self._originals["truncate"](filename, Path(filename).stat().st_size // 2)

        try:
            self.strike("write tensors", filename, needs_room=True, half=half)
        except OSError as error:  # it does not say so by an OSError
            raise SafetensorError(f"I/O error: {error.strerror} (os error {error.errno})") from None
        self._serialize_file(tensors, filename, metadata)


class _WatchedFile(io.FileIO):
    """A file whose writes are operations."""

    def __init__(self, faults: DiskFaults, path: Any, mode: str) -> None:
        super().__init__(path, mode)
        self._faults = faults

    def write(self, data: Any) -> int:
        write = super().write
        self._faults.strike(
            "write", self.name, needs_room=True, half=lambda: write(bytes(data)[: len(data) // 2])
        )
        return write(data)
