"""Read files of `torch.save` without running anything that they ask for.

A pickle is a program: it may name any importable function and call it. Here every name is looked up in one table
of harmless stand-ins, and a name that is not in the table is refused. The result has only numbers, text, plain
containers, and `StoredTensor`s. Their bytes are read only when they are asked for; torch is not used before.

There are two layouts. Since torch 1.6 a file is a zip archive: `NAME/data.pkl`, and `NAME/data/KEY` for each
storage. Older files are five pickles one after another (magic number, protocol, machine, object, keys of the
storages), and then for each storage its number of elements as int64, and its bytes. Both are little endian.
"""

from __future__ import annotations

import errno
import io
import math
import pickle
import re
import struct
from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from nmt.errors import UserError, shown
from nmt.interop.pickle_check import end_of_pickle
from nmt.interop.stored_zip import COPY_AGAIN, NAME_ANOTHER, SIGNATURE, StoredZip

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_MOST_DIMENSIONS = 16
_COPIES_A_BYTE = 4  # values of a pickle that may be copied while it is read
_LARGEST_SIZE = 2**62  # elements of a tensor, where a dimension of 0 counts as 1
_NUMBER = re.compile(r"[iuf][248]|[iub]1")  # numpy's names of the types of numbers

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def read_torch_file(path: Path) -> Any:
    """Return the object in a file of `torch.save`, its tensors as `StoredTensor`.

    Raises:
        UserError: The file is not from torch, is damaged or cut short, or names something that is not in the table
            of stand-ins. Nothing in it has been executed then.
    """
    try:
        with path.open("rb") as file:
            first = file.read(len(SIGNATURE))
        if first == SIGNATURE:
            return _read_zip(path)
        if not first.startswith(pickle.PROTO):
            raise pickle.UnpicklingError("it begins as none")
        return _read_legacy(path)
    except UserError:
        raise
    except OSError as error:
        if error.errno != errno.EINVAL:  # EINVAL: a damaged archive names a place before its beginning
            raise
        raise UserError(
            f"`{path}` must be a complete checkpoint, but is damaged: {error.strerror}. {COPY_AGAIN}"
        ) from None
    # Damaged bytes can cause any error in the interpreter of pickles; none of these is a fault in our code.
    except Exception as error:
        raise UserError(
            f"`{path}` must be a checkpoint that torch.save wrote, but is another file, cut short or damaged "
            f"({type(error).__name__}: {shown(str(error))[1:-1]}). {COPY_AGAIN}"
        ) from None


@dataclass(frozen=True)
class _Storage:
    """A run of numbers in the file."""

    dtype: torch.dtype
    num_elements: int
    read: Callable[[], bytes]

    def __setstate__(self, _: object) -> NoReturn:
        raise pickle.UnpicklingError("a storage has no state to be set")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor whose bytes are still in the file."""

    storage: _Storage
    offset: int  # in elements
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def load(self) -> Tensor:
        """Read it: a tensor of its own, contiguous.

        Raises:
            UserError: Its bytes are missing or damaged.
        """
        data = self.storage.read()
        size = self.storage.dtype.itemsize
        if len(data) != size * self.storage.num_elements:
            raise UserError(
                f"a tensor of the checkpoint must have {size * self.storage.num_elements:,} bytes, "
                f"but has {len(data):,}: the file is cut short or damaged. {COPY_AGAIN}"
            )
        if 0 in self.shape:
            return torch.empty(self.shape, dtype=self.storage.dtype)
        elements = torch.frombuffer(bytearray(data), dtype=self.storage.dtype)
        return elements.as_strided(self.shape, self.stride, self.offset).clone(
            memory_format=torch.contiguous_format
        )

    def __setstate__(self, _: object) -> NoReturn:
        raise pickle.UnpicklingError("a tensor has no state to be set")


class _Budget:
    """How many values may still be copied, because a pickle can ask for endless copies of the same values."""

    def __init__(self, num_values: int) -> None:
        self._left = num_values

    def spend(self, values: Sized) -> None:
        """Subtract the cost of a copy; raise `UnpicklingError` if the budget is used up."""
        self._left -= len(values)
        if self._left < 0:
            raise pickle.UnpicklingError("it copies the same values over and over")


def _record_type(budget: _Budget) -> type[dict[Any, Any]]:
    """Make the stand-in for a class whose objects are named values; they become the items of a dict."""

    class Record(dict[Any, Any]):
        def __new__(cls, *_: object, **__: object) -> Record:
            return super().__new__(cls)

        def __init__(self, *_: object) -> None:
            super().__init__()

        def __setstate__(self, state: object) -> None:
            if not isinstance(state, dict):
                raise pickle.UnpicklingError("the state of an object must be a dict")
            budget.spend(state)
            self.update(state)

    return Record


def _mapping_type(budget: _Budget) -> type[dict[Any, Any]]:
    """Make the stand-in for `collections.OrderedDict`; attributes (torch's `_metadata`) are left out."""

    class Mapping(dict[Any, Any]):
        def __init__(self, items: object = ()) -> None:
            if not isinstance(items, (list, tuple)):
                raise pickle.UnpicklingError("a dict must be made of a list")
            budget.spend(items)
            if not all(isinstance(item, (list, tuple)) and len(item) == 2 for item in items):
                raise pickle.UnpicklingError("a dict must be made of pairs")
            super().__init__((_plain_key(key), value) for key, value in items)

        def __setstate__(self, _: object) -> None:
            pass

    return Mapping


def _plain_key(key: object) -> object:
    if not isinstance(key, (str, bytes, int, float)):  # hashing a tuple can take forever
        raise pickle.UnpicklingError("a key must be text or a number")
    return key


class _Dtype:
    """Stands for `numpy.dtype`."""

    def __init__(self, name: object = "", *_: object) -> None:
        self.name = name if isinstance(name, str) else ""

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", "|"):
            raise pickle.UnpicklingError("numbers must be little endian")


class _Function:
    """A function that a pickle may call, but not change."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)

    def __setstate__(self, _: object) -> NoReturn:
        raise pickle.UnpicklingError("a function has no state to be set")


@dataclass(frozen=True)
class _StorageType:
    """Stands for `torch.FloatStorage` and similar classes."""

    dtype: torch.dtype

    def __setstate__(self, _: object) -> NoReturn:
        raise pickle.UnpicklingError("a type has no state to be set")


def _rebuild_tensor(
    storage: object, offset: object, shape: object, stride: object, *_: object
) -> StoredTensor:
    """Make a tensor after checking that it lies within its storage; gradients and hooks are left out."""
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor must have a storage")
    sizes, steps = _natural_numbers(shape), _natural_numbers(stride)
    (start,) = _natural_numbers((offset,))
    if len(sizes) != len(steps):
        raise pickle.UnpicklingError("a tensor must have a stride for each dimension")
    if math.prod(max(size, 1) for size in sizes) > _LARGEST_SIZE:
        raise pickle.UnpicklingError("a tensor must have fewer elements")
    last = start + sum((size - 1) * step for size, step in zip(sizes, steps, strict=True))
    if 0 not in sizes and max(last + 1, math.prod(sizes)) > storage.num_elements:
        raise pickle.UnpicklingError("a tensor must lie within its storage")
    return StoredTensor(storage, start, sizes, steps)


def _rebuild_parameter(data: object, *_: object) -> StoredTensor:
    if not isinstance(data, StoredTensor):
        raise pickle.UnpicklingError("a parameter must be a tensor")
    return data


def _natural_numbers(values: object) -> tuple[int, ...]:
    if (
        not isinstance(values, (tuple, list))
        or len(values) > _MOST_DIMENSIONS
        or not all(type(x) is int and 0 <= x < 2**48 for x in values)
    ):
        raise pickle.UnpicklingError("sizes must be whole numbers")
    return tuple(values)


def _numpy_scalar(dtype: object, data: object) -> int | float | bool:
    if (
        not isinstance(dtype, _Dtype)
        or not isinstance(data, bytes)
        or not _NUMBER.fullmatch(dtype.name)
        or len(data) != np.dtype(dtype.name).itemsize
    ):
        raise pickle.UnpicklingError("a numpy scalar must be a number")
    (number,) = np.frombuffer(data, dtype=np.dtype(dtype.name)).tolist()
    return number


def _encode(budget: _Budget, text: object, encoding: object = "latin1") -> bytes:
    """Return bytes from text: protocol 2 has no bytes, and stores them as text to be encoded again."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("bytes must be encoded as latin1")
    budget.spend(text)
    return text.encode("latin1")


def _as_set(budget: _Budget, items: object = ()) -> set[Any]:
    if not isinstance(items, (list, tuple)):
        raise pickle.UnpicklingError("a set must be made of a list")
    budget.spend(items)
    return set(map(_plain_key, items))


def _as_tuple(items: object = ()) -> tuple[int, ...]:
    return _natural_numbers(items)


def _stand_ins(budget: _Budget) -> dict[tuple[str, str], Any]:
    """Return the stand-ins by name; new for each file, so that no file can change those of another."""
    record = _record_type(budget)
    # Only objects made by NEWOBJ need a class. Its unbound __setstate__ keeps BUILD from changing the class.
    table: dict[tuple[str, str], Any] = {
        ("argparse", "Namespace"): record,
        ("collections", "OrderedDict"): _mapping_type(budget),
        ("torch._utils", "_rebuild_tensor"): _Function(_rebuild_tensor),
        ("torch._utils", "_rebuild_tensor_v2"): _Function(_rebuild_tensor),
        ("torch._utils", "_rebuild_parameter"): _Function(_rebuild_parameter),
        ("torch", "Size"): _Function(_as_tuple),
        ("_codecs", "encode"): _Function(partial(_encode, budget)),
        ("numpy", "dtype"): _Dtype,
    }
    for module in ("builtins", "__builtin__"):
        table[module, "set"] = _Function(partial(_as_set, budget))
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        table[module, "scalar"] = _Function(_numpy_scalar)
    # fairseq of 2018 and 2019 also stored its meters, which are records of numbers.
    for module in ("fairseq.meters", "fairseq.logging.meters"):
        for name in ("AverageMeter", "TimeMeter", "StopwatchMeter"):
            table[module, name] = record
    for name, dtype in _STORAGES.items():
        table["torch", name] = _StorageType(dtype)
    return table


class _Unpickler(pickle.Unpickler):
    """Build the object of a pickle from stand-ins only."""

    def __init__(
        self, data: bytes, *, path: Path, find_storage: Callable[[str, int], Callable[[], bytes]]
    ) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._path = path
        self._find_storage = find_storage
        self._table = _stand_ins(_Budget(_COPIES_A_BYTE * len(data)))
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in of a name."""
        try:
            return self._table[module, name]
        except KeyError:
            raise UserError(
                f"`{self._path}` must hold tensors, numbers, text and plain containers, but asks for "
                f"`{shown(f'{module}.{name}')[1:-1]}`. Nothing of it was run. "
                f"{NAME_ANOTHER}"
            ) from None

    def persistent_load(self, pid: Any) -> _Storage:
        """Return the storage that a persistent id names: ("storage", type, key, device, number of elements)."""
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
            raise pickle.UnpicklingError("a persistent id must name a storage")
        _, kind, key, _, num_elements = pid[:5]
        if (
            not isinstance(kind, _StorageType)
            or not isinstance(key, str)
            or (len(pid) == 6 and pid[5] is not None)
        ):
            raise pickle.UnpicklingError("a persistent id must name a storage, its type and its key")
        (count,) = _natural_numbers((num_elements,))
        if key not in self.storages:
            read = self._find_storage(key, count * kind.dtype.itemsize)
            self.storages[key] = _Storage(kind.dtype, count, read)
        storage = self.storages[key]
        if (storage.dtype, storage.num_elements) != (kind.dtype, count):
            raise pickle.UnpicklingError("a storage must have one type and one size")
        return storage


def _read_zip(path: Path) -> Any:
    archive = StoredZip(path)
    names = archive.entries
    roots = [name.removesuffix("data.pkl") for name in names if name.split("/")[1:] == ["data.pkl"]]
    if len(roots) != 1:
        raise UserError(
            f"`{path}` must be a checkpoint that torch.save wrote, but is another zip archive. {NAME_ANOTHER}"
        )
    (root,) = roots
    if root + "byteorder" in names and archive.read(root + "byteorder").strip() != b"little":
        raise UserError(f"`{path}` must be little endian, but is not. Save it again on such a machine.")
    data = archive.read(root + "data.pkl")

    def find_storage(key: str, num_bytes: int) -> Callable[[], bytes]:
        name = f"{root}data/{key}"
        if name not in names:
            raise pickle.UnpicklingError(f"the storage {shown(key)} is missing")
        if names[name].size != num_bytes:
            raise pickle.UnpicklingError(
                f"the storage {shown(key)} must have {num_bytes:,} bytes, but has {names[name].size:,}"
            )
        return lambda: archive.read(name)

    end_of_pickle(io.BytesIO(data))
    return _Unpickler(data, path=path, find_storage=find_storage).load()


def _read_legacy(path: Path) -> Any:
    file = io.BytesIO(path.read_bytes())
    places: dict[str, tuple[int, int]] = {}  # where the bytes of each storage are

    def no_storage(key: str, num_bytes: int) -> NoReturn:
        raise pickle.UnpicklingError("there must be no tensor here")

    def find_storage(key: str, num_bytes: int) -> Callable[[], bytes]:
        def read() -> bytes:
            start, end = places[key]
            return bytes(file.getbuffer()[start:end])

        return read

    def load_next(find: Callable[[str, int], Callable[[], bytes]]) -> tuple[Any, Mapping[str, _Storage]]:
        start = file.tell()
        end = end_of_pickle(file)
        unpickler = _Unpickler(bytes(file.getbuffer()[start:end]), path=path, find_storage=find)
        return unpickler.load(), unpickler.storages

    if load_next(no_storage)[0] != _LEGACY_MAGIC or load_next(no_storage)[0] != _LEGACY_PROTOCOL:
        raise UserError(
            f"`{path}` must be a checkpoint that torch.save wrote, but is another pickle. {NAME_ANOTHER}"
        )
    machine, _ = load_next(no_storage)
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise UserError(f"`{path}` must be little endian, but is not. Save it again on such a machine.")
    content, storages = load_next(find_storage)
    keys, _ = load_next(no_storage)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise pickle.UnpicklingError("the keys of the storages must be text")
    if sorted(keys) != sorted(storages):
        raise pickle.UnpicklingError("the storages are not those of the tensors")
    for key in keys:
        (count,) = struct.unpack("<q", file.read(8))
        storage = storages[key]
        start = file.tell()
        end = start + count * storage.dtype.itemsize
        if count != storage.num_elements or end > len(file.getbuffer()):
            raise pickle.UnpicklingError(f"the storage {shown(key)} is cut short")
        places[key] = (start, end)
        file.seek(end)
    return content
