"""Zip archives with uncompressed entries, as torch writes them: listed once, then read entry by entry."""

from __future__ import annotations

import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from nmt.errors import UserError, shown

COPY_AGAIN = "Copy it again from where it came."
NAME_ANOTHER = "Name a checkpoint of fairseq."
_LOCAL_HEADER = struct.Struct("<4s5HIIIHH")
SIGNATURE = b"PK\x03\x04"
_ENCRYPTED, _PATCHED, _STRONGLY_ENCRYPTED, _MASKED = 0x1, 0x20, 0x40, 0x2000


@dataclass(frozen=True)
class Entry:
    """A run of bytes in an archive."""

    offset: int  # of its header
    size: int
    checksum: int


class StoredZip:
    """The entries of an archive by name. No file is kept open."""

    def __init__(self, path: Path) -> None:
        """Read the list of the entries.

        Raises:
            UserError: Some are compressed or encrypted, or overlap.
            Exception: The archive is damaged.
        """
        self.path = path
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
        for info in infos:
            if info.flag_bits & (_ENCRYPTED | _PATCHED | _STRONGLY_ENCRYPTED | _MASKED):
                raise self._refusal("is an encrypted or patched archive")
            if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
                raise self._refusal("is a compressed archive")
        if sum(info.file_size for info in infos) > path.stat().st_size:
            raise self._refusal("is an archive whose entries overlap")
        self.entries = {info.filename: Entry(info.header_offset, info.file_size, info.CRC) for info in infos}

    def read(self, name: str) -> bytes:
        """Return the bytes of an entry.

        Raises:
            UserError: They are missing or damaged.
        """
        entry = self.entries[name]
        with self.path.open("rb") as file:
            file.seek(entry.offset)
            header = file.read(_LOCAL_HEADER.size)
            if len(header) == _LOCAL_HEADER.size and header.startswith(SIGNATURE):
                *_, name_size, extra_size = _LOCAL_HEADER.unpack(header)
                file.seek(name_size + extra_size, 1)
                data = file.read(entry.size)
                if len(data) == entry.size and zlib.crc32(data) == entry.checksum:
                    return data
        raise UserError(
            f"`{self.path}` must be a complete checkpoint, but its entry {shown(name)} is damaged. {COPY_AGAIN}"
        )

    def _refusal(self, what: str) -> UserError:
        return UserError(
            f"`{self.path}` must be a checkpoint that torch.save wrote, but {what}. Take it as it was written."
        )
