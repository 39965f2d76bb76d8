"""Reading what a run has recorded, whatever state its file is in."""

import fcntl
import json
import math
import os
import pty
import struct
import subprocess
import sys
import termios
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmt.errors import UserError
from nmt.run.run_log import RunLog, read_records

RECORDS = [{"kind": "train", "update": 10, "loss": 1.5}, {"kind": "valid", "update": 10, "name": "ä"}]


def write(folder: Path, content: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_bytes(content)
    return folder


def test_what_was_reported_is_read_back(tmp_path: Path) -> None:
    with closing(RunLog(tmp_path, is_writer=True)) as log:
        log.open()
        log.report("train", {"update": 10, "loss": 0.1 + 0.2, "grad": math.inf})
    assert read_records(tmp_path) == ([{"kind": "train", "update": 10, "loss": 0.1 + 0.2, "grad": None}], 0)


@given(st.data())
def test_a_file_cut_anywhere_gives_its_whole_lines(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in RECORDS)
    length = data.draw(st.integers(0, len(content)))
    folder = write(tmp_path_factory.mktemp("run"), content[:length])
    assert read_records(folder) == (RECORDS[: content[:length].count(b"\n")], 0)


@pytest.mark.parametrize(
    "line",
    [b"{", b"\0\0\0", b"\xff", b"7", b'{"kind": "train"}', b'{"update": 3}', b'{"kind": "x", "update": "3"}'],
)
def test_damaged_lines_are_left_out_and_counted(tmp_path: Path, line: bytes) -> None:
    first, second = (json.dumps(record).encode() for record in RECORDS)
    assert read_records(write(tmp_path, b"\n".join([first, line, second, b""]))) == (RECORDS, 1)


def test_a_folder_without_records_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"must be the folder of a run, but has no metrics\.jsonl"):
            read_records(folder)


SHOW_PROGRESS = """
import sys
from pathlib import Path
from nmt.run.run_log import RunLog
log = RunLog(Path(sys.argv[1]), is_writer=True)
log.open()
for update in range(5, 11):
    log.progress(update, epoch=1, total=10)
log.close()
"""


def test_a_terminal_shows_a_bar_that_begins_where_the_run_was_taken_up(tmp_path: Path) -> None:
    ours, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    environment = {**os.environ, "TQDM_MININTERVAL": "0"}
    command = [sys.executable, "-c", SHOW_PROGRESS, str(tmp_path)]
    subprocess.run(command, stderr=terminal, env=environment, check=True)
    shown = os.read(ours, 100_000).decode()
    for file in (ours, terminal):
        os.close(file)
    assert "4/10" in shown and "0/10" not in shown.replace("10/10", "") and "10/10" in shown
    assert "epoch 1" in shown


def test_what_is_no_terminal_shows_no_bar(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SHOW_PROGRESS, str(tmp_path)]
    assert subprocess.run(command, capture_output=True, check=True).stderr == b""
