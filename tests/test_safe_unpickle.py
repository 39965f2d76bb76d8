"""Checkpoints are read without running what they ask for."""

import argparse
import copyreg
import io
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nmt.cli.convert import main as convert
from nmt.errors import UserError
from nmt.interop.safe_unpickle import StoredTensor, read_torch_file

QUIET = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Calls:
    """Pickles as a call of anything with anything."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, state: Any = None) -> None:
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


def save(path: Path, content: object, *, zip_format: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zip_format)
    return path


def archive(path: Path, data: bytes) -> Path:
    """Write a zip archive as torch does, with a pickle of one's own."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", data)
        file.writestr("archive/byteorder", "little")
        file.writestr("archive/data/0", bytes(16))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as error:
        read_torch_file(path)
    text = str(error.value)
    assert "\n" not in text
    assert str(path) in text
    return text


def load_all(value: Any) -> Any:
    if isinstance(value, StoredTensor):
        return value.load()
    if isinstance(value, dict):
        return {key: load_all(item) for key, item in value.items()}
    return [load_all(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("zip_format", [True, False])
def test_reads_what_torch_wrote(tmp_path: Path, zip_format: bool) -> None:
    matrix = torch.arange(12.0).view(3, 4)
    model: OrderedDict[str, Any] = OrderedDict(
        whole=matrix, column=matrix[:, 1], transposed=matrix.T, empty=torch.empty(0, 3)
    )
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool):
        model[str(dtype)] = torch.tensor([0, 1, 3]).to(dtype)
    model["parameter"] = torch.nn.Parameter(torch.ones(2))
    model._metadata = OrderedDict(version=1)  # type: ignore[attr-defined]
    content = {
        "args": argparse.Namespace(arch="transformer", lr=[0.5], nothing=None),
        "model": model,
        "extra": [1, -(2**70), 1.5, "text", b"bytes", (True, {"a": {1, 2}}), np.float64(2.5), np.int64(7)],
        "size": matrix.shape,
    }
    read = read_torch_file(save(tmp_path / "checkpoint.pt", content, zip_format=zip_format))
    assert read["args"] == {"arch": "transformer", "lr": [0.5], "nothing": None}
    assert type(read["args"]).__mro__[1] is dict
    assert read["extra"] == content["extra"]
    assert read["size"] == (3, 4)
    assert list(read["model"]) == list(model)
    for name, tensor in model.items():
        loaded = read["model"][name].load()
        assert loaded.dtype == tensor.dtype
        assert loaded.is_contiguous()
        assert torch.equal(loaded, tensor)


def _marker(path: Path) -> list[Any]:
    """Return objects that create the file `path` when they are unpickled carelessly."""
    nested = Calls(os.system, Calls(str, f"touch {path}"))
    return [
        Calls(os.system, f"touch {path}"),
        Calls(eval, f"open({str(path)!r}, 'w')"),
        Calls(exec, f"open({str(path)!r}, 'w')"),
        Calls(open, str(path), "w"),
        Calls(os.mkdir, str(path)),
        {"model": OrderedDict(weight=nested)},
        [Calls(list, [Calls(os.system, f"touch {path}")])],
        Calls(copyreg._reconstructor, Path, object, None),  # type: ignore[attr-defined]
        Calls(argparse.Namespace, state={"x": Calls(os.system, f"touch {path}")}),
        Calls(pickle.loads, pickle.dumps(Calls(os.system, f"touch {path}"))),
        Calls(torch.load, str(path)),
        Calls(torch.nn.Linear, 2, 2),
        Calls(io.open, str(path), "w"),
    ]


@pytest.mark.parametrize("zip_format", [True, False])
@pytest.mark.parametrize("number", range(13))
def test_calls_are_refused_by_name(tmp_path: Path, number: int, zip_format: bool) -> None:
    mark = tmp_path / "executed"
    content = _marker(mark)[number]
    text = refusal(save(tmp_path / "checkpoint.pt", content, zip_format=zip_format))
    assert "asks for `" in text
    assert not mark.exists()


@pytest.mark.parametrize("protocol", range(6))
def test_every_protocol_is_guarded(tmp_path: Path, protocol: int) -> None:
    mark = tmp_path / "executed"
    data = pickle.dumps(Calls(os.system, f"touch {mark}"), protocol=protocol)
    assert "system" in refusal(archive(tmp_path / "checkpoint.pt", data))
    assert not mark.exists()


NAMESPACE = b"cargparse\nNamespace\n"
ODD_PICKLES = {
    "instance by INST": b"(S'true'\nios\nsystem\n.",
    "instance by OBJ": b"(cos\nsystem\nS'true'\no.",
    "extension registry": b"\x80\x02\x82\x01.",
    "state of a class": NAMESPACE + b"}U\x08__init__K\x01sb.",
    "slots of a class": NAMESPACE + b"N}U\x08__init__K\x01s\x86b.",
    "state of a function": b"ctorch._utils\n_rebuild_tensor_v2\n}U\x04codeK\x01sb.",
    "state of a storage type": b"ctorch\nFloatStorage\n}U\x05dtypeK\x01sb.",
    "state that is no dict": NAMESPACE + b")\x81](K\x01eb.",
    "dotted name": b"\x80\x04\x8c\x08argparse\x8c\x12Namespace.__init__\x93.",
    "builtins by another name": b"c__builtin__\neval\n(S'1'\ntR.",
    "persistent id of text": b"Pos.system\n.",
    "persistent id of a number": b"K\x01Q.",
    "persistent id of another kind": b"(U\x06modulectorch\nFloatStorage\nU\x010U\x03cpuK\x04tQ.",
    "storage without bytes": b"(U\x07storagectorch\nFloatStorage\nU\x0299U\x03cpuK\x04tQ.",
    "storage outside the archive": b"(U\x07storagectorch\nFloatStorage\nU\x05../..U\x03cpuK\x04tQ.",
    "storage of a foreign type": b"(U\x07storagecargparse\nNamespace\nU\x010U\x03cpuK\x04tQ.",
    "negative size": b"(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuJ\xff\xff\xff\xfftQ.",
    "tensor beyond its storage": b"ctorch._utils\n_rebuild_tensor_v2\n((U\x07storagectorch\nFloatStorage\n"
    b"U\x010U\x03cpuK\x04tQK\x00K\x09\x85K\x01\x85I00\nNtR.",
    "huge tensor of one number": b"ctorch._utils\n_rebuild_tensor_v2\n((U\x07storagectorch\nFloatStorage\n"
    b"U\x010U\x03cpuK\x04tQK\x00J\xff\xff\xff\x7f\x85K\x00\x85I00\nNtR.",
    "tensor of no storage": b"ctorch._utils\n_rebuild_tensor_v2\n(NK\x00K\x09\x85K\x01\x85I00\nNtR.",
    "bytes by another codec": b"c_codecs\nencode\n(U\x01xU\x05rot13tR.",
    "memo of gigabytes": b"K\x01r\xff\xff\xff\xff.",
    "empty": b"",
    "no end": b"K\x01",
    "nothing on the stack": b".",
    "unknown opcode": b"\xff.",
    "recursion": b"(" * 100_000,
}


@pytest.mark.parametrize("name", ODD_PICKLES)
def test_odd_pickles_are_one_line(tmp_path: Path, name: str) -> None:
    refusal(archive(tmp_path / "checkpoint.pt", ODD_PICKLES[name]))


def test_one_file_cannot_change_how_the_next_is_read(tmp_path: Path) -> None:
    for number, data in enumerate(ODD_PICKLES.values()):
        refusal(archive(tmp_path / f"{number}.pt", data))
    path = save(tmp_path / "good.pt", {"a": argparse.Namespace(b=1), "c": torch.ones(2)})
    read = read_torch_file(path)
    assert read["a"] == {"b": 1}
    assert read["c"].load().tolist() == [1.0, 1.0]


def test_a_name_with_control_characters_stays_on_one_line(tmp_path: Path) -> None:
    data = b"\x80\x04\x8c\x07a\nb\x1b[31\x8c\x01x\x93."
    text = refusal(archive(tmp_path / "checkpoint.pt", data))
    assert "a\\nb\\x1b[31.x" in text
    assert text.isprintable()


@QUIET
@given(data=st.data(), zip_format=st.booleans())
def test_truncated_files_are_one_line(tmp_path: Path, data: st.DataObject, zip_format: bool) -> None:
    whole = save(tmp_path / "whole.pt", {"a": torch.ones(5), "b": [1, "x"]}, zip_format=zip_format)
    content = whole.read_bytes()
    length = data.draw(st.integers(0, len(content) - 1))
    cut = tmp_path / "cut.pt"
    cut.write_bytes(content[:length])
    refusal(cut)


@QUIET
@given(data=st.data(), zip_format=st.booleans())
def test_damaged_files_execute_nothing_and_fail_in_one_line(
    tmp_path: Path, data: st.DataObject, zip_format: bool
) -> None:
    whole = save(tmp_path / "whole.pt", {"a": torch.ones(5), "b": [1, "x"]}, zip_format=zip_format)
    content = bytearray(whole.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(content)
    try:
        load_all(read_torch_file(damaged))
    except UserError as error:
        assert "\n" not in str(error)


@QUIET
@given(content=st.binary(max_size=200), is_pickle=st.booleans())
def test_foreign_files_are_one_line(tmp_path: Path, content: bytes, is_pickle: bool) -> None:
    path = tmp_path / "foreign.pt"
    if is_pickle:
        archive(path, content)
        try:
            read_torch_file(path)
        except UserError as error:
            assert "\n" not in str(error)
    else:
        path.write_bytes(content)
        refusal(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\x03\x04", b"version https://git-lfs", pickle.dumps({"model": 1}), b"\x80\x02"],
    ids=["empty", "zip", "text", "plain pickle", "short"],
)
def test_the_command_says_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(content)
    with pytest.raises(SystemExit) as end:
        convert(
            ["--from", "fairseq", str(path), "--dict-dir", str(tmp_path), "--to", str(tmp_path / "model")]
        )
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("nmt-convert: error: ")
    assert captured.err.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", compression=zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", pickle.dumps("x" * 10**6, protocol=2))
    assert "compressed" in refusal(path)
