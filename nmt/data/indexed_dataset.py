"""Sequences of token ids in two memory-mapped files: `PREFIX.bin`, `PREFIX.idx`, in fairseq's MMIDIDX layout.

`.bin` holds the ids back to back. `.idx` holds, little endian: 9 bytes of magic, uint64 version 1, uint8 code
of the ids' type, uint64 N, then N int32 sizes (in tokens) and N int64 offsets (in bytes) into `.bin`.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nmt.data.vocabulary import EOS_ID, UNK_ID
from nmt.errors import UserError, counted, shown

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQ")  # magic, version, code of the type, number of sequences
_VERSION = 1
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2", 9: "<u4", 10: "<u8"}
_BYTES_PER_SEQUENCE = 4 + 8  # size and offset
_CHUNK = 2**16  # sequences or ids at a time, so that results stay in the processor's cache


class Oddities(NamedTuple):
    """What is seldom right in a data set."""

    unknown_share: float
    """Share of unknown tokens; the ends of sequences do not count."""
    num_specials: int
    """Number of other special symbols within sequences."""
    num_without_end: int
    """Number of sequences that end without `</s>`."""


def smallest_dtype(vocabulary_size: int) -> np.dtype[np.integer]:
    """Return the type in which nmt-preprocess stores ids: uint16 below 65,536 types, else int32."""
    return np.dtype("<u2") if vocabulary_size < 65_536 else np.dtype("<i4")


def bin_path(path_prefix: Path) -> Path:
    """Return the file of the ids."""
    return path_prefix.with_name(path_prefix.name + ".bin")


def idx_path(path_prefix: Path) -> Path:
    """Return the file of the sizes and offsets."""
    return path_prefix.with_name(path_prefix.name + ".idx")


class IndexedDataset:
    """Read-only sequences of ids.

    Each process opens the files by itself, at first use: pickling carries only the path. Returned arrays are views
    of the map. They keep the map alive, so they stay valid when the dataset is gone.
    """

    def __init__(self, path_prefix: Path) -> None:
        """Name the dataset `PREFIX.bin` + `PREFIX.idx`; nothing is opened yet."""
        self.path_prefix = Path(path_prefix)
        self._arrays: tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.integer]] | None = None

    def __len__(self) -> int:
        return len(self._open()[0])

    def __getitem__(self, index: int) -> NDArray[np.integer]:
        """Return sequence `index` as stored, EOS included: (size,) in the files' own integer type."""
        sizes, offsets, ids = self._open()
        start = int(offsets[index]) // ids.itemsize
        return ids[start : start + int(sizes[index])]

    @property
    def sizes(self) -> NDArray[np.int32]:
        """The length of every sequence in tokens, EOS included: (N,) int32."""
        return self._open()[0]

    def check_ids(self, num_types: int, dictionary: Path) -> None:
        """Read the whole dataset once, at the speed of the disk.

        Raises:
            UserError: An id is not below `num_types`, the number of types of a dictionary.
        """
        lowest = highest = 0
        for chunk in self._chunks():
            lowest, highest = min(lowest, int(chunk.min())), max(highest, int(chunk.max()))
        for extreme in (highest, lowest):
            if not 0 <= extreme < num_types:
                raise UserError(
                    f"{bin_path(self.path_prefix)} must hold ids from 0 to {num_types - 1:,}, since {dictionary} "
                    f"has {num_types:,} types with the special ones, but sequence {self._first_with(extreme):,} "
                    f"(from 0) has the id {extreme:,}. Take the dictionary that the data were made with, or make "
                    "them again."
                )

    def _first_with(self, token_id: int) -> int:
        """Return the number of the first sequence that has an id."""
        _, offsets, ids = self._open()
        places = (
            number * _CHUNK + int((chunk == token_id).argmax()) for number, chunk in enumerate(self._chunks())
        )
        place = next(place for place in places if ids[place] == token_id)
        return int(np.searchsorted(offsets, place * ids.itemsize, side="right")) - 1

    @property
    def dtype(self) -> np.dtype[np.integer]:
        """The type of the stored ids."""
        return self._open()[2].dtype

    def digest(self) -> bytes:
        """Return a hash of all sequences in their order; it does not depend on the integer type. It reads all."""
        digest = hashlib.blake2b(self.sizes.data, digest_size=16)
        for chunk in self._chunks():
            digest.update(chunk.astype("<i4").data)
        return digest.digest()

    def _chunks(self) -> Iterator[NDArray[np.integer]]:
        """Yield all ids, `_CHUNK` at a time."""
        _, _, ids = self._open()
        for start in range(0, len(ids), _CHUNK):
            yield ids[start : start + _CHUNK]

    def count_oddities(self) -> Oddities:
        """Count unknown tokens, and special symbols in wrong places. It reads all."""
        sizes, _, ids = self._open()
        num_unknown = num_specials = 0
        for chunk in self._chunks():
            num_unknown += int(np.count_nonzero(chunk == UNK_ID))
            num_specials += int(np.count_nonzero(chunk <= EOS_ID))
        last = ids[np.cumsum(sizes, dtype=np.int64)[sizes > 0] - 1]
        return Oddities(
            unknown_share=num_unknown / max(len(ids) - len(sizes), 1),
            num_specials=num_specials - int(np.count_nonzero(last <= EOS_ID)),
            num_without_end=len(sizes) - int(np.count_nonzero(last == EOS_ID)),
        )

    def __getstate__(self) -> Path:
        return self.path_prefix

    def __setstate__(self, path_prefix: Path) -> None:
        self.path_prefix = path_prefix
        self._arrays = None

    def _open(self) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.integer]]:
        if self._arrays is None:
            dtype, count = _read_header(idx_path(self.path_prefix))
            index = _map(idx_path(self.path_prefix))[_HEADER.size :]
            sizes = index[: 4 * count].view("<i4")
            offsets = index[4 * count :].view("<i8")
            data = bin_path(self.path_prefix)
            expected = _check_index(sizes, offsets, dtype, idx_path(self.path_prefix))
            actual = data.stat().st_size
            if actual != expected:
                what = "is cut short" if actual < expected else "does not belong to its index"
                raise UserError(
                    f"{data} {what}: it must have {expected:,} bytes, but has {actual:,}. "
                    "Make or copy the data directory again."
                )
            self._arrays = (sizes, offsets, _map(data).view(dtype))
        return self._arrays


def _check_index(
    sizes: NDArray[np.int32], offsets: NDArray[np.int64], dtype: np.dtype[np.integer], path: Path
) -> int:
    """Check that the sequences follow one another without gaps; return their number of bytes.

    Raises:
        UserError: They do not, as in a damaged index. Sizes would be wrong, or reads would pass the file's end.
    """
    end = 0
    for start in range(0, len(sizes), _CHUNK):
        lengths = sizes[start : start + _CHUNK].astype(np.int64)
        ends = end + np.cumsum(lengths) * dtype.itemsize
        begins = offsets[start : start + _CHUNK]
        is_wrong = (lengths < 0) | (begins != ends - lengths * dtype.itemsize)
        if is_wrong.any():
            number = start + int(is_wrong.argmax())
            raise UserError(
                f"{path} is damaged: sequence {number:,} cannot be of {counted(int(sizes[number]), 'token')} from "
                f"byte {int(offsets[number]):,} on. Make or copy the data directory again."
            )
        end = int(ends[-1])
    return end


def _map(path: Path) -> NDArray[np.uint8]:
    """Map a file as bytes; an empty file, which cannot be mapped, is an empty array."""
    if path.stat().st_size == 0:
        return np.empty(0, dtype=np.uint8)
    # A plain array over the map: slicing np.memmap objects is slower, and `base` keeps the map alive.
    return np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))


def _read_header(path: Path) -> tuple[np.dtype[np.integer], int]:
    """Check an `.idx` and its size; return the type of the ids and the number of sequences."""
    actual = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
    if header[:6] == b"TNTIDX":
        raise UserError(
            f"{path} is of fairseq's old `cached` or `lazy` kind, which cannot be read. Take `mmap`."
        )
    if not header.startswith(_MAGIC[: len(header)]) or not header:
        raise UserError(
            f"{path} must be an index of token ids (MMIDIDX), but begins with {shown(header[:9])}"
        )
    if len(header) < _HEADER.size:
        raise UserError(f"{path} is cut short: it must have at least {_HEADER.size} bytes, but has {actual}")
    _, version, code, count = _HEADER.unpack(header)
    if version != _VERSION:
        raise UserError(f"{path} must be of version {_VERSION}, but is of version {version}")
    if code not in _DTYPES:
        raise UserError(f"{path} must hold integers, but names their type by the code {code}")
    expected = _HEADER.size + _BYTES_PER_SEQUENCE * count
    if actual < expected:
        raise UserError(
            f"{path} is cut short: it must have {expected:,} bytes for {counted(count, 'sequence')}, but "
            f"has {actual:,}. Make or copy the data directory again."
        )
    if actual > expected:
        raise UserError(
            f"{path} must have {expected:,} bytes for {counted(count, 'sequence')}, but has {actual:,}. "
            "Megatron's variant of the format, with its document index, cannot be read: "
            "make the data with nmt-preprocess."
        )
    return np.dtype(_DTYPES[code]), count


class IndexedDatasetWriter:
    """Writes a dataset under temporary names; `finish` gives it its final names. It gathers nothing in memory.

    As a context manager it finishes at the end of the block, and leaves nothing behind on an exception.
    """

    def __init__(self, path_prefix: Path, dtype: np.dtype[np.integer]) -> None:
        """Name the dataset; files appear with the first sequence or on entering the context."""
        self.path_prefix = Path(path_prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        codes = [code for code, name in _DTYPES.items() if np.dtype(name) == self.dtype]
        assert codes, f"{dtype} is no integer type of the format"
        self._code = codes[0]
        self._count = 0
        self._files: tuple[BinaryIO, BinaryIO] | None = None

    def add(self, ids: NDArray[np.integer]) -> None:
        """Append one sequence (size,), its EOS included."""
        self.add_many(ids, np.array([len(ids)]))

    def add_many(self, ids: NDArray[np.integer], sizes: NDArray[np.integer]) -> None:
        """Append len(sizes) sequences, whose ids stand one after the other in `ids` (sum of sizes,)."""
        assert ids.ndim == sizes.ndim == 1 and int(sizes.sum()) == len(ids)
        data, index = self._open()
        data.write(np.ascontiguousarray(ids, dtype=self.dtype).data)
        index.write(np.ascontiguousarray(sizes, dtype="<i4").data)
        self._count += len(sizes)

    def finish(self) -> None:
        """Write the offsets, bring everything to the disk, and give the files their names."""
        data, index = self._open()
        offset = 0
        for start in range(0, self._count, _CHUNK):
            index.seek(_HEADER.size + 4 * start)
            chunk = index.read(4 * min(_CHUNK, self._count - start))
            lengths = np.frombuffer(chunk, dtype="<i4").astype(np.int64) * self.dtype.itemsize
            ends = offset + np.cumsum(lengths)
            index.seek(0, os.SEEK_END)
            index.write((ends - lengths).astype("<i8").data)
            offset = int(ends[-1])
        index.seek(0)
        index.write(_HEADER.pack(_MAGIC, _VERSION, self._code, self._count))
        for file in (data, index):
            file.flush()
            os.fsync(file.fileno())
            file.close()
        self._files = None
        for final in (bin_path(self.path_prefix), idx_path(self.path_prefix)):
            _temporary(final).replace(final)

    def discard(self) -> None:
        """Close and remove what was written so far."""
        if self._files is None:
            return
        for file in self._files:
            file.close()
        self._files = None
        for final in (bin_path(self.path_prefix), idx_path(self.path_prefix)):
            _temporary(final).unlink(missing_ok=True)

    def __enter__(self) -> IndexedDatasetWriter:
        self._open()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.finish()
        else:
            self.discard()

    def _open(self) -> tuple[BinaryIO, BinaryIO]:
        if self._files is None:
            data = _temporary(bin_path(self.path_prefix)).open("wb")
            index = _temporary(idx_path(self.path_prefix)).open("w+b")
            index.write(bytes(_HEADER.size))  # filled in by finish, when the number of sequences is known
            self._files = (data, index)
        return self._files


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")
