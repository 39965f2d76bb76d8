"""How commands end: one line and an exit code for what a user can cause."""

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nmt.cli.command import run_command
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


def test_a_missing_file_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "none"
    with pytest.raises(SystemExit) as caught:
        run_command("nmt-x", lambda: print(path.read_text()))
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"nmt-x: error: {path}: No such file or directory\n"


def test_a_full_disk_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    ending = _ending(OSError(errno.ENOSPC, "No space left on device"), capsys)
    assert ending == (2, "nmt-x: error: No space left on device\n")


def test_an_interrupt_ends_with_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert _ending(KeyboardInterrupt(), capsys) == (130, "\nnmt-x: interrupted\n")


@pytest.mark.parametrize(
    "error",
    [ValueError("bug"), OSError(errno.ECONNREFUSED, "refused"), BrokenPipeError(errno.EPIPE, "a worker's")],
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
