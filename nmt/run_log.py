"""What a run says: plain lines (stderr and train.log), JSON lines (metrics.jsonl), a progress bar.

Only rank 0 writes; on other ranks everything here does nothing.
"""

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm


class RunLog:
    """The log files of a run folder, and its progress bar on a terminal."""

    def __init__(self, folder: Path, *, is_writer: bool) -> None:
        """Open the logs in the folder of a run, for appending; only rank 0 is a writer."""
        self._is_writer = is_writer
        self._bar: tqdm[Any] | None = None
        if not is_writer:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._records_path = folder / "metrics.jsonl"
        self._text: TextIO = (folder / "train.log").open("a", encoding="utf-8")
        self._records: TextIO = self._records_path.open("a", encoding="utf-8")
        if sys.stderr.isatty():
            self._bar = tqdm(unit=" updates", dynamic_ncols=True, smoothing=0.05, leave=False)

    def say(self, line: str) -> None:
        """Write a line for people."""
        if not self._is_writer:
            return
        tqdm.write(line, file=sys.stderr)
        self._text.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
        self._text.flush()

    def report(self, kind: str, record: Mapping[str, Any]) -> None:
        """Write a record as a line for people and as a JSON line."""
        if not self._is_writer:
            return
        self.say(" | ".join([kind, *(f"{name} {_format(name, value)}" for name, value in record.items())]))
        numbers = {name: _json_value(value) for name, value in record.items()}
        self._records.write(json.dumps({"kind": kind, **numbers}) + "\n")
        self._records.flush()

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
        if not self._is_writer:
            return 0
        self._records.flush()
        os.fsync(self._records.fileno())
        return self._records_path.stat().st_size

    def cut_records(self, size: int) -> None:
        """Cut metrics.jsonl back to the size it had at the checkpoint that the run goes on from."""
        if self._is_writer and self._records_path.stat().st_size > size:
            os.truncate(self._records_path, size)

    def close(self) -> None:
        """Close the files and the bar."""
        if self._is_writer:
            if self._bar is not None:
                self._bar.close()
            self._text.close()
            self._records.close()


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
