"""The output of a run: lines (stderr and train.log), JSON lines (metrics.jsonl), TensorBoard, a progress bar.

Only rank 0 writes. On the other ranks everything here does nothing.
"""

import fcntl
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tqdm.auto import tqdm
from tqdm.notebook import tqdm_notebook

from nmt.config.records import Number, Record, RecordError, Text, Whole, parse_json
from nmt.errors import UserError, one_line
from nmt.task import Illustrations

if TYPE_CHECKING:
    from nmt.run.tensorboard import EventWriter

TIMES = frozenset(
    {"targets/s", "hours", "hours left", "memory MiB", "waited for data"}
    | {"waited for ranks", "slowest rank", "slowest rank waited"}
)
"""The names in records whose values differ between otherwise equal runs."""

_RECORDS = "metrics.jsonl"
_RECORD = Record({"kind": Text(), "update": Whole()}, optional={"epoch": Whole(), "hours": Number(low=0.0)})
_IS_NOTEBOOK = issubclass(tqdm, tqdm_notebook)  # tqdm has chosen its kind for notebooks


class RunLog:
    """The log files of a run folder, and its progress bar on a terminal."""

    def __init__(self, folder: Path, *, is_writer: bool, tensorboard: bool = False) -> None:
        """Name the folder of a run; only rank 0 is a writer.

        Raises:
            UserError: TensorBoard is wanted but not installed; on every rank.
        """
        if tensorboard and find_spec("tensorboard") is None:
            raise UserError(
                "`tensorboard` must have the package of that name, which is not installed. "
                "Run pip install tensorboard, or leave the option out."
            )
        self._wants_events = tensorboard
        self._events: EventWriter | None = None
        self._folder = folder
        self._records_path = folder / _RECORDS
        self._is_writer = is_writer
        self._text: TextIO | None = None
        self._records: TextIO | None = None
        self._shows_bar = False
        self._bar: tqdm[Any] | None = None

    def open(self) -> None:
        """Open the files for appending, and lock the folder for this process until it ends.

        Raises:
            UserError: Another process is training there.
        """
        if not self._is_writer:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(
                f"`save-dir` must be a folder, or new, but `{self._folder}`, or what it lies in, is a file. "
                "Name another one."
            ) from None
        self._text = (self._folder / "train.log").open("a", encoding="utf-8", errors="backslashreplace")
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
        if self._wants_events:
            from nmt.run.tensorboard import EventWriter

            self._events = EventWriter(self._folder / "tensorboard")
        self._shows_bar = sys.stderr.isatty() or _IS_NOTEBOOK

    def say(self, line: str) -> None:
        """Write a line for people."""
        if self._text is None:
            return
        line = one_line(line)  # names of files and classes in it may hold any characters
        tqdm.write(line, file=sys.stderr)
        _append(self._text, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    def report(self, kind: str, record: Mapping[str, Any], *, shown: Mapping[str, str] | None = None) -> None:
        """Write a record as a line for people and as a JSON line.

        Args:
            kind: "train", "epoch" or "valid".
            record: Numbers by name, including "update" and "epoch".
            shown: By name, the form of some numbers in the line; a number with an empty form is left out.
        """
        if self._records is None:
            return
        texts = {name: f"{name} {_format(name, value)}" for name, value in record.items()} | dict(shown or {})
        self.say(" | ".join([kind, *filter(None, texts.values())]))
        self.record(kind, {name: _json_value(value) for name, value in record.items()})
        if self._events is not None:
            self._events.report(kind, record)

    def record(self, kind: str, record: Mapping[str, Any]) -> None:
        """Write only a JSON line; the record must have "update"."""
        if self._records is not None:
            _append(self._records, json.dumps({"kind": kind, **record}) + "\n")

    def illustrate(self, update: int, illustrations: Illustrations) -> None:
        """Show texts and images if TensorBoard is on."""
        if self._events is not None:
            self._events.illustrate(update, illustrations)

    def progress(self, update: int, *, epoch: int, total: int | None) -> None:
        """Move the bar to an update, of `total` if that is known."""
        if not self._shows_bar:
            return
        if self._bar is None:  # a resumed run: its time left is estimated from the updates made here
            self._bar = tqdm(
                total=total,
                initial=update - 1,
                unit=" updates",
                dynamic_ncols=True,
                smoothing=0.05,
                leave=False,
            )
        self._bar.total = total
        self._bar.set_description(f"epoch {epoch}", refresh=False)
        self._bar.update(update - self._bar.n)

    def records_size(self) -> int:
        """Return the size of metrics.jsonl in bytes, for `cut_records`, after writing all of it to the disk."""
        if self._records is None:
            return 0
        if self._events is not None:
            self._events.flush()
        self._records.flush()
        os.fsync(self._records.fileno())
        return self._records_path.stat().st_size

    def cut_records(self, size: int, *, update: int) -> None:
        """Remove what was reported after the checkpoint from which the run goes on.

        Args:
            size: The size that metrics.jsonl had at the checkpoint.
            update: The update of the checkpoint; 0 to begin anew.
        """
        if self._records is not None and self._records_path.stat().st_size > size:
            os.truncate(self._records_path, size)
        if self._events is not None:
            self._events.go_on_after(update)

    def close(self) -> None:
        """Close the files and the bar."""
        if self._events is not None:
            self._events.close()
        if self._bar is not None:
            self._bar.close()
        for file in (self._records, self._text):
            if file is not None:
                with suppress(OSError):  # a failed write has been reported already
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


def read_records(folder: Path) -> tuple[list[dict[str, Any]], int]:
    """Read the records of a run, which may still be going on: an incomplete last line is left out.

    Args:
        folder: The folder of the run.

    Returns:
        The records, oldest first, each with "kind" ("train", "valid" or "epoch") and "update"; and the number of
        damaged lines, which are left out, too.

    Raises:
        UserError: It is no folder of a run.
    """
    try:
        lines = (folder / _RECORDS).read_bytes().split(b"\n")[:-1]
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"`{folder}` must be the folder of a run, but has no {_RECORDS}. Name the `save-dir` of nmt-train."
        ) from None
    records = [record for line in lines if (record := _parse(line)) is not None]
    return records, len(lines) - len(records)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = _RECORD.check(parse_json(line), "")
    except (ValueError, RecordError):
        return None
    return record


def _json_value(value: Any) -> Any:
    """Return None for numbers that JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _format(name: str, value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    if name == "lr":
        return f"{value:.2e}"
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if value >= 100 else f"{value:.3f}"
