"""Damage to files: random bytes, cuts and copies, and values that no reader expects where values are known."""

import io
import json
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

Rng = random.Random
Mutation = Callable[[bytes, Rng], bytes]

_ODD_BYTES = [
    b"\xff",
    b"\x00",
    b"\xed\xa0\x80",
    b"\x1b[31m",
    b"\n",
    b"\r",
    b'"',
    b"[" * 10_000,
    b"{",
    b"9" * 5000,
]
_ODD_BYTES += [
    b"\x80\x02",
    b"\xff\xff\xff\xff",
    b"\xff\xff\xff\x7f",
    b"\xe2\x80\xae",
    b"\\ud800",
    b" ",
    b"\t",
    b"-1",
]
NUMBERS = [
    -1,
    0,
    1,
    2,
    2**31,
    2**31 - 1,
    -(2**31),
    2**53,
    2**63,
    2**64,
    10**4000,
    1.5,
    -0.5,
    1e308,
    1e-320,
    100_000,
]
NUMBERS += [float("inf"), float("-inf"), float("nan")]
_TEXTS = [
    "",
    "x",
    "\x1b]0;title\x07",
    "\ud800",
    "../../x",
    "a/b",
    "None",
    "nan",
    "-1",
    "1e999",
    "x" * 1_000_000,
    "\0",
]


def odd_value(rng: Rng) -> Any:
    """Return a value that JSON can hold, and that is seldom right."""
    choice = rng.random()
    if choice < 0.4:
        return rng.choice(NUMBERS)
    if choice < 0.7:
        return rng.choice(_TEXTS)
    return rng.choice([None, True, False, [], {}, [1], [None], {"x": 1}, [[]], ["x", 2], [0.5, 0.5]])


def damage_bytes(data: bytes, rng: Rng) -> bytes:
    """Change, cut out, repeat or insert some bytes."""
    content = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        place = rng.randrange(len(content) + 1)
        length = min(len(content) - place, rng.choice([1, 1, 2, 4, 8, 100, 1000]))
        kind = rng.randrange(7)
        if kind == 0:
            content[place : place + 1] = bytes([rng.randrange(256)])
        elif kind == 1 and place < len(content):
            content[place] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del content[place : place + length]
        elif kind == 3:
            content[place:place] = content[place : place + length]
        elif kind == 4:
            content[place:place] = rng.choice(_ODD_BYTES)
        elif kind == 5:
            odd = rng.choice(_ODD_BYTES)[: max(length, 1)]
            content[place : place + len(odd)] = odd
        elif rng.random() < 0.3:
            del content[place:]
    return bytes(content)


def damage_text(data: bytes, rng: Rng) -> bytes:
    """Change some lines as a whole, or words in them."""
    lines = data.split(b"\n")
    for _ in range(rng.choice([1, 1, 2])):
        place = rng.randrange(len(lines))
        words = lines[place].split(b" ")
        kind = rng.randrange(5)
        if kind == 0:
            words[rng.randrange(len(words))] = _as_text(odd_value(rng))
            lines[place] = b" ".join(words)
        elif kind == 1:
            lines[place : place + 1] = []
        elif kind == 2:
            lines[place:place] = [lines[rng.randrange(len(lines))]]
        elif kind == 3:
            lines[place] = rng.choice(_ODD_BYTES)
        else:
            lines[place] += rng.choice(_ODD_BYTES)
        lines = lines or [b""]
    return b"\n".join(lines)


def damage_json(data: bytes, rng: Rng) -> bytes:
    """Change, drop or rename a value of a JSON file, wherever it is."""
    record = damaged_value(json.loads(data), rng)
    text = json.dumps(record)
    if rng.random() < 0.05:
        text = text.replace(":", ": " + "[" * 10_000, 1)
    return text.encode()


def damage_json_lines(data: bytes, rng: Rng) -> bytes:
    """Change a value of one line of JSON."""
    lines = data.splitlines()
    place = rng.randrange(len(lines))
    lines[place] = damage_json(lines[place], rng)
    return b"\n".join(lines) + b"\n"


def damage_yaml(data: bytes, rng: Rng) -> bytes:
    """Change the value of a line `key: value`."""
    lines = data.decode().splitlines()
    for _ in range(rng.choice([1, 1, 2])):
        place = rng.randrange(len(lines))
        key, _, _ = lines[place].partition(":")
        value = (
            json.dumps(odd_value(rng))
            if rng.random() < 0.8
            else rng.choice(["[" * 10_000, "&a [*a]", "|", "- x"])
        )
        lines[place] = rng.choice([f"{key}: {value}", f"{key}: {value}", f"{value}: 1", key])
    return "\n".join(lines).encode("utf-8", "surrogatepass") + b"\n"


def damage_safetensors(data: bytes, rng: Rng) -> bytes:
    """Change a value of the header: a shape, a type, a place in the file."""
    (size,) = struct.unpack("<Q", data[:8])
    header = damage_json(data[8 : 8 + size].rstrip(), rng)
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def damage_index(data: bytes, rng: Rng) -> bytes:
    """Change a size or an offset of an `.idx`."""
    content = bytearray(data)
    if len(content) > 30:
        place = rng.choice([18, 26 + 4 * rng.randrange((len(content) - 26) // 4)])
        content[place : place + 4] = struct.pack("<I", rng.choice([0, 1, 2**31, 2**31 - 1, 2**32 - 1, 7]))
    return bytes(content)


def damage_zip(data: bytes, rng: Rng) -> bytes:
    """Change the flags, the sizes or the number of the entries of a zip archive."""
    content = bytearray(data)
    places = [place for place in range(len(content) - 46) if content[place : place + 4] == b"PK\x01\x02"]
    kind = rng.randrange(4)
    if kind == 0 or not places:
        with io.BytesIO(data) as file, zipfile.ZipFile(file, "a") as archive:
            for number in range(rng.choice([1, 3000])):
                archive.writestr(f"archive/data/x{number}", b"")
            archive.close()
            return file.getvalue()
    place = rng.choice(places)
    if kind == 1:
        struct.pack_into("<H", content, place + 8, rng.choice([0x1, 0x20, 0x40, 0x2000, 0x800]))
    elif kind == 2:
        offset = rng.choice([16, 20, 24, 42])
        struct.pack_into("<I", content, place + offset, rng.choice([0, 1, 2**31, 2**32 - 1]))
    else:
        struct.pack_into("<H", content, place + rng.choice([10, 28, 30, 32]), rng.choice([0, 8, 99, 65535]))
    return bytes(content)


def damaged_value(value: Any, rng: Rng) -> Any:
    """Return a tree of dicts and lists in which one value is another, missing, or under another name."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        name = rng.choice(list(value))
        kind = rng.random()
        if kind < 0.1:
            return {key: item for key, item in value.items() if key != name}
        if kind < 0.15:
            new_name = rng.choice(["x", "\x1b[31m", "", "\ud800", "x" * 100_000])
            return {new_name if key == name else key: item for key, item in value.items()}
        return {**value, name: damaged_value(value[name], rng)}
    if isinstance(value, list) and value and rng.random() < 0.85:
        place = rng.randrange(len(value))
        kind = rng.random()
        if kind < 0.1:
            return value[:place] + value[place + 1 :]
        if kind < 0.2:
            return value[:place] + value[place:] * 2
        return [*value[:place], damaged_value(value[place], rng), *value[place + 1 :]]
    return odd_value(rng)


def nested_tuple(depth: int, *, width: int) -> bytes:
    """Return a pickle of tuples within tuples, each `width` times the one before, as key and as value."""
    inner = b"K\x01" + (b"\x85" if width == 1 else b"q\x00h\x00\x86") * depth
    return b"\x80\x02}(X\x05\x00\x00\x00model}X\x04\x00\x00\x00args}" + inner + b"K\x01s" + b"u."


def odd_pickles() -> list[bytes]:
    """Return pickles that ask for much: of depth, of time, of copies."""
    deep = b"\x80\x02" + b"]" * 10_000 + b"a" * 9_999 + b"."
    copies = b"\x80\x02](" + b"K\x01" * 5000 + b"eq\x00" + b"c__builtin__\nset\nh\x00\x85R0" * 5000 + b"N."
    return [
        nested_tuple(10_000, width=1),
        nested_tuple(10_000, width=2),
        nested_tuple(20, width=2),
        deep,
        copies,
    ]


def _as_text(value: Any) -> bytes:
    return (
        value if isinstance(value, str) else repr(value) if not isinstance(value, int) else f"{value:x}"
    ).encode("utf-8", "surrogatepass")


def replaced_pickle(path: Path, pickled: bytes) -> bytes:
    """Return an archive as torch writes it, with another pickle in it."""
    with zipfile.ZipFile(path) as archive, io.BytesIO() as file:
        with zipfile.ZipFile(file, "w") as changed:
            for info in archive.infolist():
                is_pickle = info.filename.endswith("data.pkl")
                changed.writestr(info.filename, pickled if is_pickle else archive.read(info))
        return file.getvalue()


assert pickle.loads(nested_tuple(3, width=2))["args"]
