"""What the commands have in common: how they end."""

import errno
import io
import os
import select
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nmt.checkpoints.find_folder import FoundModel
from nmt.errors import LostRankError, UserError, one_line
from nmt.system.out_of_memory import is_out_of_memory

# Errors of writing for which the operating system does not name the file.
WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
_LESS_MEMORY = "Take smaller batches, a smaller model or shorter lines, or a larger machine."
_REMEDIES = {
    errno.ENOENT: "Check the name.",
    errno.ENOTDIR: "Check the name: a part of it is a file, not a folder.",
    errno.EISDIR: "Name a file in it.",
    errno.EACCES: "Check who may read and write it.",
    errno.EPERM: "Check who may read and write it.",
    errno.ENAMETOOLONG: "Name a shorter one.",
    errno.EMFILE: "Close other programs' files, or raise the limit (`ulimit -n`).",
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "Make room, or write elsewhere."),
    errno.EROFS: "Write elsewhere.",
    errno.EIO: "Check the disk, or use another.",
}
_EXIT_USER_ERROR = 2
_EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
_STDOUT, _STDERR = 1, 2  # their file descriptors


def run_command(prog: str, body: Callable[[], None], *, exit_code_of_closed_pipe: int = 0) -> None:
    """Run the body of a command and turn what a user can cause into one line and an exit code.

    A `UserError`, or an `OSError` about a file (missing, not readable, disk full), is printed to stderr
    as "prog: error: text", with exit code 2; a `LostRankError` with 75. An interrupt ends with 130. If the
    reader of stdout has gone (`| head`), the command ends quietly. Other exceptions are programmers' errors and
    pass through.

    Args:
        prog: the name of the command.
        body: everything that the command does, including the parsing of its command line.
        exit_code_of_closed_pipe: the exit code if the reader of stdout has gone.
    """
    prepare_streams()
    try:
        body()
        sys.stdout.flush()  # so that a closed pipe is noticed here, not when the interpreter ends
    except LostRankError as error:
        _say_error(prog, str(error))
        # At once: other threads may wait for the lost rank, and cannot be ended in any other way.
        sys.stderr.flush()
        os._exit(error.exit_code)
    except UserError as error:
        _fail(prog, str(error))
    except KeyboardInterrupt:
        print(f"\n{prog}: interrupted", file=sys.stderr)
        raise SystemExit(_EXIT_INTERRUPTED) from None
    except BrokenPipeError:
        if not _is_stdout_closed():
            raise  # the pipe of a worker process
        raise SystemExit(exit_code_of_closed_pipe) from None
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _fail(prog, f"The memory must suffice, but does not: {_first_line(error)}. {_LESS_MEMORY}")
    except OSError as error:
        if error.filename is not None:
            _fail(prog, f"{error.filename}: {error.strerror}. {_remedy(error)}")
        if error.errno not in WRITE_ERRORS:
            raise
        _let_stdout_go()
        _fail(
            prog,
            f"Standard output, or a file, could not be written: {error.strerror}. Make room, or write elsewhere.",
        )


def _remedy(error: OSError) -> str:
    """Return what can be done about a file that could not be opened, read or written."""
    if error.errno == errno.ENOENT and str(error.filename) == "-":
        return "Standard input is read if the option is left out; a file of this name is ./-."
    return _REMEDIES.get(error.errno or 0, "Check that it can be used, or name another.")


def prepare_streams() -> None:
    """Make the standard streams safe for any output.

    A closed stream, as with daemons and `>&-`, becomes the null device. Otherwise Python has None in its place,
    and the next file that is opened gets its descriptor. Characters that an encoding lacks are printed as `\\x..`.
    A full disk for the log does not end the work.
    """
    for number, name, mode in ((0, "stdin", "r"), (_STDOUT, "stdout", "w"), (_STDERR, "stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            try:
                os.fstat(number)
            except OSError:  # closed: the next open takes the lowest free descriptor, the stream's own
                os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115
        elif stream is sys.__stderr__ and isinstance(stream, io.TextIOWrapper):
            raw = _LosesWhatHasNoRoom(_STDERR, "w", closefd=False)
            sys.stderr = io.TextIOWrapper(
                io.BufferedWriter(raw), stream.encoding, "backslashreplace", line_buffering=True
            )
        elif isinstance(stream, io.TextIOWrapper) and mode == "w":
            stream.reconfigure(errors="backslashreplace")


class _LosesWhatHasNoRoom(io.FileIO):
    """Standard error, on a disk that may be full."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in WRITE_ERRORS:
                raise
            return len(data)


def announce_models(prog: str, models: Sequence[FoundModel]) -> list[Path]:
    """Return the folders of models; for each that was found through its run, print which one it is."""
    for model in models:
        if model.note is not None:
            print(f"{prog}: model: {model.note}", file=sys.stderr)
    return [model.folder for model in models]


def _fail(prog: str, text: str) -> None:
    _say_error(prog, text)
    raise SystemExit(_EXIT_USER_ERROR) from None


def _is_stdout_closed() -> bool:
    """Return whether nobody reads stdout any more; if so, point it at the null device."""
    poll = select.poll()
    poll.register(_STDOUT, select.POLLOUT)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        return False
    _let_stdout_go()
    return True


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else "no more can be had"


def _let_stdout_go() -> None:
    """Point stdout at the null device, because Python flushes it once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), _STDOUT)


def _say_error(prog: str, text: str) -> None:
    # In one write, with the newline, so that the lines of several ranks do not mix.
    sys.stderr.write(f"{prog}: error: {one_line(text)}\n")
