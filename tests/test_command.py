"""How commands end: one line and an exit code for what a user can cause."""

import errno
import gzip
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nmt.cli.command import run_command
from nmt.cli.text_files import open_output, read_text
from nmt.errors import UserError


def _raiser(error: BaseException) -> Callable[[], None]:
    def body() -> None:
        raise error

    return body


def _ending(error: BaseException, capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    with pytest.raises(SystemExit) as caught:
        run_command("nmt-x", _raiser(error))
    return caught.value.code, capsys.readouterr().err


def test_a_body_that_ends_well_returns() -> None:
    done = []
    run_command("nmt-x", lambda: done.append(1))
    assert done == [1]


def test_a_user_error_is_one_line_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    ending = _ending(UserError("`lr` must be above 0,\nbut is -1."), capsys)
    assert ending == (2, "nmt-x: error: `lr` must be above 0, but is -1.\n")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("none", "No such file or directory. Check the name."),
        ("file/none", "Not a directory. Check the name: a part of it is a file, not a folder."),
        ("folder", "Is a directory. Name a file in it."),
        ("x" * 300, "File name too long. Name a shorter one."),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_what_to_do(
    name: str, text: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(SystemExit) as caught:
        run_command("nmt-x", lambda: print((tmp_path / name).read_text()))
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert error.endswith(f": {text}\n") and error.count("\n") == 1


def test_a_dash_is_no_name_of_standard_input(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        run_command("nmt-x", lambda: print(Path("-").read_text()))
    assert "Standard input is read if the option is left out" in capsys.readouterr().err


def test_a_full_disk_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    ending = _ending(OSError(errno.ENOSPC, "No space left on device"), capsys)
    assert ending[0] == 2
    assert ending[1] == (
        "nmt-x: error: Standard output, or a file, could not be written: No space left on device. "
        "Make room, or write elsewhere.\n"
    )


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 16 GiB.\nlong explanations"),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)."),
    ],
)
def test_a_lack_of_memory_is_one_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = _ending(error, capsys)
    assert code == 2 and said.startswith("nmt-x: error: The memory must suffice, but does not: ")
    assert said.count("\n") == 1 and "explanations" not in said


def test_an_interrupt_ends_with_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert _ending(KeyboardInterrupt(), capsys) == (130, "\nnmt-x: interrupted\n")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("bug"),
        RuntimeError("bug"),
        OSError(errno.ECONNREFUSED, "refused"),
        BrokenPipeError(errno.EPIPE, "a worker's"),
    ],
)
def test_other_errors_pass_through(error: Exception) -> None:
    with pytest.raises(type(error)):
        run_command("nmt-x", _raiser(error))


@pytest.mark.parametrize("num_lines", [1, 100_000])
def test_a_reader_that_leaves_early_ends_the_command_quietly(num_lines: int) -> None:
    code = (
        "import sys; from nmt.cli.command import run_command\n"
        f"run_command('nmt-x', lambda: [sys.stdin.read(), *(print('line') for _ in range({num_lines}))])"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdout.close()
        process.stdin.close()
        errors = process.stderr.read()
    assert (process.returncode, errors) == (0, b"")


def run_in_shell(body: str, redirection: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a body of a command in a process of its own, its standard streams as a shell's redirection has them."""
    code = f"import os, sys; from nmt.cli.command import *; from nmt.cli.text_files import *\n{body}"
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} {redirection}"
    return subprocess.run(
        ["/bin/sh", "-c", command],
        capture_output=True,
        check=False,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize("redirection", ["", "<&-", ">&-", "2>&-", "<&- >&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_as_if_nobody_read_them(redirection: str, tmp_path: Path) -> None:
    """What is opened next must not get their descriptors: what is printed would be written into it."""
    body = (
        "def body():\n"
        f"    with open({str(tmp_path / 'f')!r}, 'w') as file:\n"
        "        print('out'); print('err', file=sys.stderr); os.write(2, b'err'); sys.stderr.isatty()\n"
        "        file.write('own')\n"
        "run_command('nmt-x', body)"
    )
    done = run_in_shell(body, redirection)
    assert done.returncode == 0
    assert (done.stdout == b"out\n") is (">&-" not in redirection.replace("2>&-", ""))
    assert (tmp_path / "f").read_text() == "own"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize(("ends_with", "code"), [("print('done')", 0), ("raise UserError('wrong')", 2)])
def test_a_log_without_room_does_not_end_the_work(ends_with: str, code: int) -> None:
    body = (
        "def body():\n"
        "    for number in range(3000): print('a line of a log', file=sys.stderr)\n"
        f"    {ends_with}\n"
        "run_command('nmt-x', body)"
    )
    done = run_in_shell(body, "2>/dev/full")
    assert (done.returncode, done.stdout) == (code, b"done\n" if code == 0 else b"")


@pytest.mark.parametrize(
    ("body", "redirection", "said"),
    [
        ("list(read_text(None))", "<&-", b"The standard input must be open, but is closed."),
        ("list(read_text(None))", "0>/dev/null", b"The standard input must be text, but cannot be read"),
        (
            "with open_output(None) as file: file.write(b'x')",
            ">&-",
            b"The standard output must be open, but is closed.",
        ),
        ("print('x')", ">/dev/full", b"Standard output, or a file, could not be written: No space left"),
        (
            "with open_output(None) as file: file.write(b'x' * 10**6)",
            ">/dev/full",
            b"Standard output, or a file, could not be written: No space left",
        ),
    ],
)
def test_a_stream_that_is_needed_and_of_no_use_is_named(body: str, redirection: str, said: bytes) -> None:
    done = run_in_shell(f"def body():\n    {body}\nrun_command('nmt-x', body)", redirection)
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)
    assert done.stderr.startswith(b"nmt-x: error: " + said)


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_what_an_encoding_does_not_have_is_printed_as_its_code(encoding: str) -> None:
    body = "run_command('nmt-x', lambda: print('\\u4e2d \\udce9', file=sys.stdout))"
    done = run_in_shell(body, "", PYTHONIOENCODING=encoding)
    assert done.returncode == 0
    assert done.stdout in (b"\\u4e2d \\udce9\n", b"\xe4\xb8\xad \\udce9\n")


def test_an_output_that_is_named_gz_is_compressed_and_the_same_each_time(tmp_path: Path) -> None:
    for name in ("a.gz", "b.gz"):
        with open_output(tmp_path / name) as file:
            file.write("ä\n".encode())
            file.flush()
    assert gzip.decompress((tmp_path / "a.gz").read_bytes()) == "ä\n".encode()
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()
    assert list(read_text(tmp_path / "a.gz")) == ["ä"]


def test_an_output_without_room_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught, open_output(tmp_path / "o"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "o")
    assert list(tmp_path.iterdir()) == []


def test_the_ending_of_a_compressed_file_may_be_in_capitals(tmp_path: Path) -> None:
    with open_output(tmp_path / "OUT.GZ") as file:
        file.write(b"text\n")
    assert gzip.decompress((tmp_path / "OUT.GZ").read_bytes()) == b"text\n"
    assert list(read_text(tmp_path / "OUT.GZ")) == ["text"]
