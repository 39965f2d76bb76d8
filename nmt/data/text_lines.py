"""Text files, read once from front to back, as lines.

Only `\\n` ends a line: `\\r`, U+2028, U+0085 and form feeds stay inside their line, so that lines are counted as
by `wc -l`. When lines are decoded, the `\\r` of CRLF is removed. The last line needs no newline. Files whose names
end in `.gz` are inflated while reading. A UTF-8 byte order mark at the start of a file is skipped.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from nmt.errors import UserError

_CHUNK_BYTES = 2**20
_GZIP = b"\x1f\x8b"  # the beginning of compressed files


@dataclass(frozen=True)
class TextFile:
    """A text file that was read through once and is valid UTF-8."""

    path: Path
    num_lines: int
    sha256: str  # of the file on the disk, so of the compressed bytes of a .gz


def find_file(prefix: str, language: str) -> Path:
    """Return `PREFIX.LANGUAGE`, or `PREFIX.LANGUAGE.gz` if only that exists."""
    plain = Path(f"{prefix}.{language}")
    compressed = Path(f"{prefix}.{language}.gz")
    for path in (plain, compressed):
        if path.is_file():
            return path
    raise UserError(
        f"{plain} must exist (or {compressed.name} beside it), but there is no such file. "
        "Check the prefix and the language."
    )


def check_file(path: Path) -> TextFile:
    """Read a file through: count its lines, check that it is UTF-8, hash it.

    Raises:
        UserError: The file is empty, not valid UTF-8 (file and line are named), or a damaged .gz.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    num_newlines = 0
    last = b"\n"
    with TextReader(path) as reader:
        while True:
            chunk = reader.read(_CHUNK_BYTES)
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                # `object` may begin with a character that the last chunk cut; that part has no newline.
                raise _not_utf8(
                    path, 1 + num_newlines + error.object[: error.start].count(b"\n"), error
                ) from None
            if not chunk:
                break
            num_newlines += chunk.count(b"\n")
            last = chunk[-1:]
    num_lines = num_newlines + (last != b"\n")
    if num_lines == 0:
        raise UserError(f"{path} must hold one sentence per line, but is empty. Put text into it.")
    with path.open("rb") as file:
        return TextFile(path, num_lines, hashlib.file_digest(file, "sha256").hexdigest())


def read_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file without their newlines, holding about a megabyte at a time."""
    with TextReader(path) as reader:
        side = LineBuffer(reader)
        while side.fill(_CHUNK_BYTES):
            yield from side.take(side.num_lines).split(b"\n")[:-1]


def decode_lines(data: bytes, path: Path, *, first_line: int) -> list[str]:
    """Decode lines, each with a newline at its end, without the carriage returns of CRLF.

    `first_line` (1-based) is used to name the line of an error.
    """
    try:
        return [line.rstrip("\r") for line in data.decode("utf-8").split("\n")[:-1]]
    except UnicodeDecodeError as error:
        raise _not_utf8(path, first_line + data[: error.start].count(b"\n"), error) from None


def _not_utf8(path: Path, line: int, error: UnicodeDecodeError) -> UserError:
    byte = error.object[error.start]
    if line == 1 and error.object.startswith(_GZIP):
        return UserError(
            f"{path} must be text, but is compressed. Inflate it (gunzip), or give it a name that ends in `.gz`."
        )
    return UserError(
        f"{path}, line {line}: must be UTF-8, but holds the byte 0x{byte:02X} out of place. "
        "Convert the file (for example with iconv) or mend the line."
    )


class TextReader:
    """The bytes of a file: inflated if its name ends in .gz, and without a byte order mark."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._at_start = True

    def __enter__(self) -> TextReader:
        if self._path.suffix.lower() == ".gz":
            self._file = cast(BinaryIO, gzip.open(self._path, "rb"))
        else:
            self._file = self._path.open("rb")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, size: int) -> bytes:
        """Return up to `size` bytes; no bytes only at the end of the file."""
        data = self._read(max(size, len(codecs.BOM_UTF8)))
        if self._at_start:
            self._at_start = False
            if data.startswith(codecs.BOM_UTF8):
                data = data.removeprefix(codecs.BOM_UTF8) or self._read(size)
        return data

    def _read(self, size: int) -> bytes:
        try:
            return self._file.read(size)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(
                f"{self._path} must be a whole gzip file, but is damaged or cut short ({error}). Make it again."
            ) from None


class LineBuffer:
    """The part of a file that was read and not yet handed out; it hands out whole lines."""

    def __init__(self, reader: TextReader) -> None:
        self._reader = reader
        self._buffer = b""
        self._ended = False
        self.num_lines = 0  # whole lines in the buffer

    def fill(self, size: int) -> int:
        """Read until the buffer holds `size` bytes and a whole line, or the file ends; return its lines."""
        while not self._ended and (len(self._buffer) < size or self.num_lines == 0):
            # Doubling for a line longer than `size`, so that it costs linear time.
            chunk = self._reader.read(max(size - len(self._buffer), len(self._buffer)))
            if not chunk:
                self._ended = True
                if self._buffer and not self._buffer.endswith(b"\n"):
                    chunk = b"\n"
            self._buffer += chunk
            self.num_lines += chunk.count(b"\n")
        return self.num_lines

    def take(self, num_lines: int) -> bytes:
        """Hand out the first `num_lines` whole lines of the buffer."""
        assert 0 < num_lines <= self.num_lines
        if num_lines == self.num_lines:
            end = self._buffer.rindex(b"\n") + 1
        else:
            newlines = np.flatnonzero(np.frombuffer(self._buffer, dtype=np.uint8) == ord("\n"))
            end = int(newlines[num_lines - 1]) + 1
        taken, self._buffer = self._buffer[:end], self._buffer[end:]
        self.num_lines -= num_lines
        return taken

    def count_rest(self) -> int:
        """Read to the end of the file and return the number of lines not yet handed out."""
        count = 0
        while self.fill(_CHUNK_BYTES):
            count += self.num_lines
            self.take(self.num_lines)
        return count
