"""Lines of text in and out, as the commands read and write them: only a newline ends a line."""

from __future__ import annotations

import codecs
import gzip
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO

from nmt.cli.command import WRITE_ERRORS
from nmt.data.pair_blocks import unequal_counts
from nmt.data.text_lines import check_file, decode_lines, read_lines
from nmt.errors import UserError
from nmt.system.places import check_output_file

STANDARD_INPUT = Path("<stdin>")  # its name in error texts


def read_text(path: Path | None) -> Iterator[str]:
    """Yield the lines of a file, or of standard input, decoded, without their newlines.

    Raises:
        UserError: A line is not UTF-8.
    """
    lines = _standard_input() if path is None else read_lines(path)
    for number, line in enumerate(lines, start=1):
        yield decode_lines(line + b"\n", path or STANDARD_INPUT, first_line=number)[0]


def check_parallel(*files: Path | None) -> int | None:
    """Read files through before the work starts.

    Args:
        *files: None for a file that is not given, or is standard input.

    Returns:
        Their number of lines; None if none of them is a plain file. A pipe can be read only once.

    Raises:
        UserError: A file is missing, empty or not UTF-8, the numbers of lines differ, or two files are one pipe.
    """
    first: tuple[Path, int] | None = None
    pipes: list[Path] = []
    for path in files:
        if path is not None and path.is_fifo():
            if any(path.samefile(pipe) for pipe in pipes):
                raise UserError(
                    f"{path} must be read once, because it is a pipe, but is named for two texts. "
                    "Save it as a file, or name another for one of them."
                )
            pipes.append(path)
        if path is None or (path.exists() and not path.is_file() and not path.is_dir()):
            continue
        if not path.exists():
            raise UserError(f"{path} must exist, but there is no such file. Check its name.")
        if path.is_dir():
            raise UserError(f"{path} must be a file of text, but is a folder. Name a file.")
        num_lines = check_file(path).num_lines
        first = first or (path, num_lines)
        if num_lines != first[1]:
            raise unequal_counts(*first, path, num_lines)
    return None if first is None else first[1]


@contextmanager
def open_output(path: Path | None) -> Iterator[BinaryIO]:
    """Open standard output, or a file that appears under its name when it is complete, or not at all.

    A file whose name ends in `.gz` is compressed.

    Raises:
        UserError: The file cannot be written there.
    """
    if path is None:
        if _was_closed(sys.stdout):
            raise UserError("The standard output must be open, but is closed. Name a file by `output`.")
        yield sys.stdout.buffer
        return
    check_output_file(path)
    path = path.resolve()  # so that a symbolic link stays one
    if path.exists() and not path.is_file():  # a pipe or a device
        with path.open("wb") as file:
            yield file
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            if path.suffix.lower() == ".gz":
                # Without the file's name and time, so that the same text gives the same bytes.
                with gzip.GzipFile("", "wb", fileobj=file, mtime=0) as compressed:
                    yield compressed  # type: ignore[misc]
            else:
                yield file
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None and error.errno in WRITE_ERRORS:
            error.filename = str(path)  # an error of writing to an open file names no file
        raise


def _standard_input() -> Iterator[bytes]:
    if _was_closed(sys.stdin):
        raise UserError("The standard input must be open, but is closed. Name a file by `input`.")
    number = 0
    while True:
        try:
            line = sys.stdin.buffer.readline()
        except OSError as error:  # a folder, or open only for writing
            raise UserError(
                f"The standard input must be text, but cannot be read: {error.strerror or error}. "
                "Name a file by `input`."
            ) from error
        if not line:
            return
        yield (line.removeprefix(codecs.BOM_UTF8) if number == 0 else line).removesuffix(b"\n")
        number += 1


def _was_closed(stream: TextIO) -> bool:
    """Return whether a standard stream was closed, and is now the null device of `prepare_streams`."""
    return getattr(stream, "name", "") == os.devnull
