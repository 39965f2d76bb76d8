"""What a run says: plain lines (stderr and train.log), JSON lines (metrics.jsonl), a progress bar.

Only rank 0 writes; on other ranks everything here does nothing.
"""

import fcntl
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from nmt.errors import UserError

# Fields of a record that differ from run to run where all else is equal.
TIMES = frozenset({"targets/s"})


class RunLog:
    """The log files of a run folder, and its progress bar on a terminal."""

    def __init__(self, folder: Path, *, is_writer: bool) -> None:
        """Name the folder of a run; only rank 0 is a writer."""
        self._folder = folder
        self._records_path = folder / "metrics.jsonl"
        self._is_writer = is_writer
        self._text: TextIO | None = None
        self._records: TextIO | None = None
        self._bar: tqdm[Any] | None = None

    def open(self) -> None:
        """Open the files for appending; the folder is this process's until it ends.

        Raises:
            UserError: Another process is training there.
        """
        if not self._is_writer:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        self._text = (self._folder / "train.log").open("a", encoding="utf-8")
        try:
            fcntl.flock(self._text, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"`{self._folder}` must be free, but another process is training there. "
                "Wait for it, or name another `save-dir`."
            ) from None
        except OSError:
            pass  # a file system without locks
        self._records = self._records_path.open("a", encoding="utf-8")
        if sys.stderr.isatty():
            self._bar = tqdm(unit=" updates", dynamic_ncols=True, smoothing=0.05, leave=False)

    def say(self, line: str) -> None:
        """Write a line for people."""
        if self._text is None:
            return
        tqdm.write(line, file=sys.stderr)
        _append(self._text, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    def report(self, kind: str, record: Mapping[str, Any]) -> None:
        """Write a record as a line for people and as a JSON line."""
        if self._records is None:
            return
        self.say(" | ".join([kind, *(f"{name} {_format(name, value)}" for name, value in record.items())]))
        numbers = {name: _json_value(value) for name, value in record.items()}
        _append(self._records, json.dumps({"kind": kind, **numbers}) + "\n")

    def progress(self, update: int, *, epoch: int, total: int | None) -> None:
        """Move the bar to an update, of `total` if that is known."""
        if self._bar is None:
            return
        if self._bar.n == 0:  # a resumed run: the time that is left is estimated from the updates made here
            self._bar.initial = self._bar.n = update - 1
        self._bar.total = total
        self._bar.set_description(f"epoch {epoch}", refresh=False)
        self._bar.update(update - self._bar.n)

    def records_size(self) -> int:
        """Return the size of metrics.jsonl in bytes, for `cut_records`; all of it is on the disk then."""
        if self._records is None:
            return 0
        self._records.flush()
        os.fsync(self._records.fileno())
        return self._records_path.stat().st_size

    def cut_records(self, size: int) -> None:
        """Cut metrics.jsonl back to the size it had at the checkpoint that the run goes on from."""
        if self._records is not None and self._records_path.stat().st_size > size:
            os.truncate(self._records_path, size)

    def close(self) -> None:
        """Close the files and the bar."""
        if self._bar is not None:
            self._bar.close()
        for file in (self._records, self._text):
            if file is not None:
                with suppress(OSError):  # what could not be written has been said
                    file.close()


def _append(file: TextIO, line: str) -> None:
    """Write a line, all of it.

    Raises:
        UserError: It could not be written.
    """
    try:
        file.write(line)
        file.flush()
    except OSError as error:
        raise UserError(
            f"`{file.name}` could not be written: {error.strerror}. Make room, "
            "and the same command goes on from the last checkpoint."
        ) from error


def _json_value(value: Any) -> Any:
    """Return None for what JSON has no number for."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _format(name: str, value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    if name == "lr":
        return f"{value:.2e}"
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if value >= 100 else f"{value:.3f}"
