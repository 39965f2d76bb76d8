"""Files made to mislead: each is refused in one line, soon, and before memory is taken for what it claims."""

import io
import re
import shutil
import struct
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.fairseq_model import PLAIN, checkpoint, make_weights, under_old_names, write_dictionaries
from support.fuzz_mutations import NUMBERS, odd_pickles, replaced_pickle
from torch import Tensor, nn

from nmt.checkpoints.model_folder import build_model, load_model
from nmt.config.mapping import from_mapping, read_yaml
from nmt.data.indexed_dataset import IndexedDataset
from nmt.errors import UserError
from nmt.interop.fairseq import convert_checkpoint
from nmt.options import TrainConfig
from nmt.run.run_log import read_records
from nmt.translation.options import TranslationOptions

SIZES = {"source_size": 16, "target_size": 24}
KEPT = Path(__file__).parent / "data" / "checkpoints-2"
MODEL = KEPT / "run" / "checkpoints" / "update-0000008"
SOON = 20  # seconds; what hung took hours


def refusal(path: Path) -> str:
    """Return the line that the conversion of a checkpoint ends with."""
    if not list(path.parent.glob("dict.*")):
        write_dictionaries(path.parent, **SIZES)
    began = time.monotonic()
    with pytest.raises(UserError) as error:
        convert_checkpoint(path, path.parent, path.parent / "model", source_lang=None, target_lang=None)
    assert time.monotonic() - began < SOON
    assert not (path.parent / "model").exists()
    text = str(error.value)
    assert text.isprintable() and len(text) < 500 and str(path) in text
    return text


def saved(tmp_path: Path, settings: dict[str, Any], state: dict[str, Tensor], *, old: bool = False) -> Path:
    path = tmp_path / "checkpoint.pt"
    torch.save(checkpoint(settings, state, old=old), path)
    return path


ODD = [x for x in NUMBERS if not isinstance(x, int) or not 0 <= x <= 100_000]
ODD += [100_000, "6", "", "x" * 1_000_000, "\x1b[31m", [6], {"a": 6}, (6,), True, torch.ones(1)]


@pytest.mark.parametrize("name", ["encoder_layers", "decoder_ffn_embed_dim", "decoder_attention_heads"])
def test_a_size_that_is_none_is_named(tmp_path: Path, name: str) -> None:
    state = make_weights(PLAIN, **SIZES)
    for value in ODD:
        if name.endswith("ffn_embed_dim") and type(value) is int and value == 100_000:
            continue
        text = refusal(saved(tmp_path, PLAIN | {name: value}, state))
        assert f"`{name}` must be a whole number from 0 to" in text


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("dropout", ["x", float("nan"), 2.0, -0.1, 10**400, []]),
        ("encoder_normalize_before", ["False", 2, [], 0.5]),
        ("max_source_positions", [2**31, "1024", 1, float("inf")]),
        ("activation_fn", [1, "\x1b[31m", {}, "x" * 1_000_000]),
        ("source_lang", ["../../x", "e\nn", 1, "\ud800", "x" * 1000]),
        ("task", [1, [], "\x1b[31m"]),
        ("adaptive_input", [[[[[]]]], "x" * 1_000_000, {1: (2, 3)}]),
    ],
)
def test_other_settings_that_are_none_are_named(tmp_path: Path, name: str, values: list[Any]) -> None:
    state = make_weights(PLAIN, **SIZES)
    for value in values:
        if not value and name == "adaptive_input":
            continue
        text = refusal(saved(tmp_path, PLAIN | {name: value}, state, old=True))
        assert name.replace("_", "[-_]") and re.search(name.replace("_", "[-_]"), text)


def test_layers_that_are_not_there_are_missed_at_once(tmp_path: Path) -> None:
    began = time.process_time()
    text = refusal(saved(tmp_path, PLAIN | {"encoder_layers": 1000}, make_weights(PLAIN, **SIZES)))
    assert "has no weights `encoder.layers.2." in text
    assert time.process_time() - began < SOON / 4


def shapes(tensor: Tensor) -> list[Tensor]:
    return [
        torch.ones(()),
        torch.ones(0),
        tensor[None],
        tensor[:1],
        torch.ones(2, 3, 4),
        tensor.expand(2, *tensor.shape),
    ]


@pytest.mark.parametrize(
    "name",
    [
        "encoder.embed_tokens.weight",
        "decoder.output_projection.weight",
        "decoder.layers.0.fc1.bias",
        "encoder.layers.0.self_attn.q_proj.weight",
        "encoder.layers.0.final_layer_norm.weight",
    ],
)
def test_a_tensor_of_another_shape_is_named(tmp_path: Path, name: str) -> None:
    state = make_weights(PLAIN, **SIZES)
    for other in shapes(state[name]):
        text = refusal(saved(tmp_path, PLAIN, state | {name: other.clone()}))
        assert f"`{name}` must have" in text or "dict.en.txt` must have 1 types" in text


def test_one_matrix_of_query_key_and_value_must_have_three_parts(tmp_path: Path) -> None:
    state = under_old_names(make_weights(PLAIN, **SIZES))
    for kind in ("weight", "bias"):
        name = f"encoder.layers.0.self_attn.in_proj_{kind}"
        for other in (torch.ones(()), torch.ones(0), torch.ones(0, 8), torch.ones(7, 8), torch.ones(3, 3, 8)):
            assert "self_attn." in refusal(saved(tmp_path, PLAIN, state | {name: other}, old=True))


def test_many_views_of_one_storage_are_no_model(tmp_path: Path) -> None:
    state = make_weights(PLAIN, **SIZES)
    big = torch.zeros(1000, 1000)
    views = {f"x{number}": big for number in range(64)}
    assert "many of its weights are views" in refusal(saved(tmp_path, PLAIN, state | views))
    same = {name: state["encoder.layers.0.fc1.weight"] for name in state if name.endswith("fc1.weight")}
    settings = PLAIN | {"encoder_layers": 40, "decoder_ffn_embed_dim": 12}
    deep = make_weights(settings, **SIZES)
    shared = {name: deep[re.sub(r"layers\.\d+", "layers.0", name)] for name in deep}
    assert same and "many of its weights are views" in refusal(saved(tmp_path, settings, shared))


@pytest.mark.parametrize("flag", [0x1, 0x20, 0x40, 0x2000], ids=["encrypted", "patched", "strong", "masked"])
def test_archives_that_are_not_plain_are_refused(tmp_path: Path, flag: int) -> None:
    path = saved(tmp_path, PLAIN, make_weights(PLAIN, **SIZES))
    content = bytearray(path.read_bytes())
    place = content.index(b"PK\x01\x02")
    (flags,) = struct.unpack_from("<H", content, place + 8)
    struct.pack_into("<H", content, place + 8, flags | flag)
    path.write_bytes(content)
    assert "is an encrypted or patched archive" in refusal(path)


def test_entries_that_overlap_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"N.")
        archive.writestr("archive/data/0", bytes(10_000))
        for number in range(1, 64):
            info = zipfile.ZipInfo(f"archive/data/{number}")
            whole = archive.getinfo("archive/data/0")
            info.header_offset, info.file_size, info.compress_size = whole.header_offset, 10_000, 10_000
            info.CRC = whole.CRC
            archive.filelist.append(info)
        archive._didModify = True  # type: ignore[attr-defined]
    assert "overlap" in refusal(path)


def test_tens_of_thousands_of_entries_are_listed_once(tmp_path: Path) -> None:
    path = saved(tmp_path, PLAIN, make_weights(PLAIN, **SIZES))
    with zipfile.ZipFile(path, "a") as archive:
        for number in range(65_000):
            archive.writestr(f"checkpoint/data/x{number}", b"")
    write_dictionaries(tmp_path, **SIZES)
    began = time.process_time()
    convert_checkpoint(path, tmp_path, tmp_path / "model", source_lang=None, target_lang=None)
    assert time.process_time() - began < SOON  # each tensor listed them anew, which took minutes
    assert (tmp_path / "model").is_dir()


@pytest.mark.parametrize("number", range(len(odd_pickles())))
def test_pickles_that_ask_for_depth_time_or_copies_are_refused(tmp_path: Path, number: int) -> None:
    path = saved(tmp_path, PLAIN, make_weights(PLAIN, **SIZES))
    path.write_bytes(replaced_pickle(path, odd_pickles()[number]))
    refusal(path)


def test_nested_tuples_that_are_no_keys_are_read(tmp_path: Path) -> None:
    """Only their hash is dear; meters of fairseq are tuples in lists."""
    deep: object = ()
    for _ in range(500):
        deep = (deep, 1)
    path = tmp_path / "checkpoint.pt"
    write_dictionaries(tmp_path, **SIZES)
    torch.save(checkpoint(PLAIN, make_weights(PLAIN, **SIZES)) | {"extra_state": deep}, path)
    convert_checkpoint(path, tmp_path, tmp_path / "model", source_lang=None, target_lang=None)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    shutil.copytree(MODEL, tmp_path / "model")
    return tmp_path / "model"


def with_option(model: Path, key: str, value: str) -> None:
    path = model / "config.yaml"
    path.write_text(re.sub(rf"(?m)^{key}: .*$", lambda _: f"{key}: {value}", path.read_text()))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("encoder-layers", "1000"),
        ("encoder-layers", "100000"),
        ("decoder-layers", "9" * 5000),
        ("decoder-ffn-embed-dim", "262144"),
        ("max-source-positions", "2147483648"),
        ("max-target-positions", "131073"),
        ("encoder-layers", "[1, [2]]"),
        ("dropout", ".nan"),
        ("dropout", "1e999"),
        ("task", "[a, b]"),
        ("activation-fn", '"\\e[31m"'),
        ("save-dir", '"\\0"'),
        ("data", '"\\ud800"'),
        ("encoder-layers", "[" * 10_000),
        ("encoder-layers", "x" * 100_000),
    ],
)
def test_a_configuration_that_asks_for_much_is_refused_at_once(model: Path, key: str, value: str) -> None:
    with_option(model, key, value)
    began = time.process_time()
    with pytest.raises(UserError) as error:
        load_model(model)
    assert time.process_time() - began < SOON / 4
    text = str(error.value)
    assert text.isprintable() and len(text) < 500 and ("config.yaml" in text or "model.safetensors" in text)


def test_a_configuration_of_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    for content in (b"\xff\xfe", b"x" * 2**21, b"[" * 10_000, b'"\\U7fffffff": 1', b'"\\ud800": 1'):
        path = tmp_path / "config.yaml"
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"config\.yaml"):
            from_mapping(TrainConfig[TranslationOptions], read_yaml(path), where="config.yaml")


@pytest.mark.parametrize("kind", ["shape", "type", "missing", "more"])
def test_weights_are_compared_by_the_header(model: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = model / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("expand.weight"))
    if kind == "missing":
        del tensors[name]
    elif kind == "more":
        tensors["another"] = torch.ones(1)
    else:
        tensors[name] = torch.ones(5, 8) if kind == "shape" else torch.ones(16, 8, dtype=torch.int64)
    save_file(tensors, path, metadata={"format": "nmt 2"})
    monkeypatch.setattr(
        "nmt.checkpoints.tensor_file.load_file", lambda _: pytest.fail("the weights were read")
    )
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_model(model)


def test_a_model_that_cannot_be_made_without_memory_is_made_with_it(model: Path) -> None:
    class Task:
        def build_model(self) -> nn.Module:
            module = nn.Linear(2, 2)
            module.weight.sum().item()  # as some models of timm do; it fails on tensors without content
            return module

    save_file(
        {"weight": torch.ones(2, 2), "bias": torch.ones(2)}, model / "model.safetensors", {"format": "nmt 2"}
    )
    built: Any = build_model(Task(), model)  # type: ignore[arg-type]
    assert built.weight.sum().item() == 4.0


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (26, -1, "sequence 0 cannot be of -1 tokens"),
        (26, 2**31 - 1, "sequence 0 cannot be|sequence 1 cannot be"),
        (30, 0, "sequence 2 cannot be of"),
        (26 + 4 * 2000, 2**31 - 1, "cannot be of"),
    ],
)
def test_sizes_that_lie_are_found_when_the_index_is_opened(
    tmp_path: Path, place: int, value: int, said: str
) -> None:
    shutil.copytree(KEPT / "data", tmp_path / "data")
    path = next(iter(sorted((tmp_path / "data").glob("train.*.idx"))))
    content = bytearray(path.read_bytes())
    struct.pack_into("<i", content, min(place, len(content) - 4), value)
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{path.name}.*({said})"):
        IndexedDataset(path.with_suffix("")).sizes.sum()


def test_text_of_a_split_must_be_utf8_and_of_its_length(tmp_path: Path) -> None:
    for damage, said in ((b"\xff\n", "must be UTF-8"), (b"one more\n", "a line for each pair")):
        folder = tmp_path / said[:4]
        shutil.copytree(KEPT / "data", folder)
        task = TranslationOptions(data=folder).build(None)
        path = next(path for path in folder.glob("valid.??") if path.suffix == f".{task.target_lang}")
        before = path.stat().st_size
        path.write_bytes(path.read_bytes() + damage)
        record = folder / "preprocess.json"  # which has the sizes of the files
        record.write_text(
            record.read_text().replace(f'"{path.name}": {before}', f'"{path.name}": {before + len(damage)}')
        )
        with pytest.raises(UserError, match=said):
            task._references(task.open_split("valid"))


def test_lines_of_records_that_are_none_are_left_out(tmp_path: Path) -> None:
    good = b'{"kind": "valid", "update": 3, "epoch": 1, "loss": 2.5}\n'
    bad = [b'{"kind": "valid", "update": "3"}', b"[" * 100_000, b'{"kind": 1, "update": 3}', b"\xff", b"3"]
    bad += [
        b'{"kind": "epoch", "update": 3, "epoch": []}',
        b'{"kind": "valid", "update": ' + b"9" * 5000 + b"}",
    ]
    (tmp_path / "metrics.jsonl").write_bytes(good + b"\n".join(bad) + b"\n" + good)
    records, num_damaged = read_records(tmp_path)
    assert [record["update"] for record in records] == [3, 3] and num_damaged == len(bad)


@pytest.mark.parametrize("lang", ["../x", "a/b", "", " ", "\\u001b[31m", "\\ud800", "x" * 10_000])
def test_a_language_is_no_path(model: Path, lang: str) -> None:
    (model / "languages.json").write_text(f'{{"source_lang": "{lang}", "target_lang": "yy"}}')
    with pytest.raises(UserError, match=r"languages\.json.*`source_lang` must be a language") as error:
        load_model(model)
    assert str(error.value).isprintable() and len(str(error.value)) < 400


def test_a_piece_that_is_no_utf8_is_refused(model: Path) -> None:
    path = model / "sentencepiece.model"
    with io.BytesIO(path.read_bytes()) as file:
        content = file.getvalue()
    place = content.index("▁".encode())
    path.write_bytes(content[:place] + b"\xff\xfe\xff" + content[place + 3 :])
    _, task = load_model(model)
    with pytest.raises(UserError, match=r"sentencepiece\.model must be a SentencePiece model"):
        task.source_segmenter.encode(["1"])  # type: ignore[attr-defined]
