"""Some hundred damaged files of each kind, read under limits; `support/fuzz_readers.py` reads more."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.fuzz_readers import KINDS

TESTS = Path(__file__).parent


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_file_is_read(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or what is refused below might be refused for another reason."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "whole"
    folder.mkdir()
    KINDS[kind].make(folder)
    KINDS[kind].read(folder)


# In processes of their own: they fork, which a process with threads must not.
@pytest.mark.slow
@pytest.mark.parametrize(
    "kinds",
    [
        ("fairseq", "fairseq-old", "yaml"),
        ("model", "records", "image-model", "mnist"),
        ("data", "fairseq-data", "text", "run"),
    ],
    ids=" ".join,
)
def test_damaged_files_are_read_or_refused_in_a_line(kinds: tuple[str, ...]) -> None:
    named = [argument for kind in kinds for argument in ("--kind", kind)]
    command = [sys.executable, "-m", "support.fuzz_readers", "--mutations", "200", *named]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=TESTS)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_hangs_or_takes_memory_is_found(tmp_path: Path) -> None:
    """The fuzzer sees what it is there for."""
    code = (
        "import dataclasses, support.fuzz_readers as fuzz\n"
        "from pathlib import Path\n"
        "from nmt.errors import UserError\n"
        "fuzz.SECONDS = 1\n"
        "def refuse(folder):\n"
        "    error = UserError('x')\n"
        "    error.args = ('two\\nlines',)\n"
        "    raise error\n"
        "def hang(folder):\n"
        "    while True: pass\n"
        "readers = [lambda _: bytes(2**33), lambda _: {}['x'], lambda _: fuzz.os.abort(), refuse, hang]\n"
        "for number, read in enumerate(readers):\n"
        "    fuzz.KINDS['yaml'] = dataclasses.replace(fuzz.KINDS['yaml'], read=read)\n"
        f"    scratch = Path({str(tmp_path)!r}, str(number))\n"
        "    scratch.mkdir()\n"
        "    print(*fuzz.fuzz('yaml', [1, 2], seed=1, scratch=scratch), sep='\\n')\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=TESTS)
    lines = done.stdout.splitlines()
    expected = ["MemoryError", "KeyError", "signal 6", "two\\nlines", "signal 27 (out of time)"]
    assert len(lines) == 2 * len(expected)
    for i, text in enumerate(expected):
        assert all(text in line for line in lines[2 * i : 2 * i + 2]), lines
