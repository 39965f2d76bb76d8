"""nmt-preprocess through its real entry point: what it makes, and what it says of bad input."""

import gzip
import itertools
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nmt.data.data_directory import DataDirectory
from nmt.data.indexed_dataset import IndexedDataset
from nmt.data.options import PreprocessOptions
from nmt.data.preprocess import name_in_record, preprocess, sample_lines
from nmt.data.segmenter import Segmenter
from nmt.data.text_lines import TextFile
from nmt.errors import UserError

WORDS = [
    "the",
    "house",
    "houses",
    "garden",
    "is",
    "are",
    "green",
    "big",
    "small",
    "and",
    "sees",
    "tree",
    "trees",
    "ä",
]


def make_text(folder: Path, *, num_train: int = 300) -> Path:
    """Write train, valid and test of a made-up language pair; the second word order is the reverse."""
    choose = random.Random(1)
    for split, number in (("train", num_train), ("valid", 20), ("test", 20)):
        sentences = [choose.choices(WORDS, k=choose.randint(1, 9)) for _ in range(number)]
        (folder / f"{split}.en").write_text("".join(" ".join(words) + "\n" for words in sentences), "utf-8")
        (folder / f"{split}.de").write_text(
            "".join(" ".join(words[::-1]) + "\n" for words in sentences), "utf-8"
        )
    return folder


def arguments(folder: Path, **changes: str | None) -> list[str]:
    """The flags of a run over `make_text(folder)`; None leaves one out."""
    flags: dict[str, str | None] = {
        "source-lang": "en",
        "target-lang": "de",
        "trainpref": f"{folder}/train",
        "validpref": f"{folder}/valid",
        "testpref": f"{folder}/test",
        "destdir": f"{folder}/data",
        "vocab-size": "300",
    }
    flags |= {name.replace("_", "-"): value for name, value in changes.items()}
    return [
        part for name, value in flags.items() if value is not None for part in (f"--{name}", *value.split())
    ]


def run(argv: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "nmt.cli.preprocess", *argv], capture_output=True, text=True, timeout=120
    )


def assert_fails(argv: list[str], *parts: str) -> None:
    """Run; expect exit code 2 and an error with these parts as the last line of stderr."""
    result = run(argv)
    assert result.returncode == 2, result.stderr
    lines = result.stderr.splitlines()
    assert lines[-1].startswith("nmt-preprocess: error: "), result.stderr
    assert "Traceback" not in result.stderr
    for part in parts:
        assert part in lines[-1]
    assert sum(line.startswith("nmt-preprocess: error:") for line in lines) == 1


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory, made by the command, with its text beside it."""
    folder = make_text(tmp_path_factory.mktemp("made"))
    result = run(arguments(folder, workers="2", extra_symbols="<formal> <informal>"))
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    assert "train: 300 pairs; dropped 0 with an empty side, 0 longer than 1,024 pieces" in result.stderr
    for name in ("train.en", "train.de", "valid.en", "valid.de", "test.en", "test.de"):
        assert f"\n{name}: " in result.stderr
    return folder / "data"


def test_directory_holds_what_training_needs(made: Path) -> None:
    splits = [
        f"{split}.en-de.{lang}.{end}"
        for split in ("train", "valid", "test")
        for lang in ("en", "de")
        for end in ("bin", "idx")
    ]
    raw = [f"{split}.{lang}" for split in ("valid", "test") for lang in ("en", "de")]
    others = ["dict.en.txt", "dict.de.txt", "sentencepiece.model", "preprocess.json"]
    assert sorted(path.name for path in made.iterdir()) == sorted([*splits, *raw, *others])
    assert sorted(path.name for path in made.parent.iterdir() if path.is_dir()) == ["data"]
    assert (made / "dict.en.txt").read_bytes() == (made / "dict.de.txt").read_bytes()


def test_data_directory_opens_what_was_made(made: Path) -> None:
    data = DataDirectory(made)
    assert (data.source_lang, data.target_lang) == ("en", "de")
    vocabulary = data.vocabulary("en")
    assert vocabulary == data.vocabulary("de")
    assert "<formal>" in vocabulary
    segmenter = Segmenter(data.segmenter_path, vocabulary)
    for split, number in (("train", 300), ("valid", 20), ("test", 20)):
        assert data.num_pairs(split) == number
        for lang in ("en", "de"):
            lines = (made.parent / f"{split}.{lang}").read_text("utf-8").splitlines()
            dataset = IndexedDataset(data.split_prefix(split, lang))
            assert [dataset[i].tolist() for i in range(number)] == [
                [*ids.tolist(), 2] for ids in segmenter.encode(lines)
            ]
            assert segmenter.decode([dataset[i] for i in range(number)]) == lines
            if split != "train":
                assert data.raw_path(split, lang).read_text("utf-8").splitlines() == lines


def test_dictionary_counts_the_training_data(made: Path) -> None:
    data = DataDirectory(made)
    vocabulary = data.vocabulary("en")
    counts = [0] * len(vocabulary)
    for lang in ("en", "de"):
        dataset = IndexedDataset(data.split_prefix("train", lang))
        for index in range(len(dataset)):
            for token in dataset[index].tolist():
                counts[token] += 1
    assert list(vocabulary.counts[4:]) == counts[4:]


def test_record_describes_the_directory(made: Path) -> None:
    record = json.loads((made / "preprocess.json").read_text("utf-8"))
    assert record["format_version"] == 1
    assert record["joined_vocabulary"] is True
    assert record["options"]["extra_symbols"] == ["<formal>", "<informal>"]
    assert record["splits"]["train"]["pairs"] == 300
    assert record["splits"]["train"]["dropped"] == {"empty": 0, "too_long": 0}
    assert record["splits"]["valid"]["sides"]["de"]["unk_rate"] == 0.0
    assert set(record["versions"]) == {"nmt", "sentencepiece", "numpy"}
    assert record["files"] == {
        path.name: path.stat().st_size for path in made.iterdir() if path.suffix != ".json"
    }


def test_one_and_seven_workers_make_the_same_directory(tmp_path: Path) -> None:
    make_text(tmp_path)
    for workers in (1, 7):
        options = PreprocessOptions(
            source_lang="en",
            target_lang="de",
            trainpref=f"{tmp_path}/train",
            validpref=f"{tmp_path}/valid",
            testpref=f"{tmp_path}/test",
            destdir=tmp_path / f"data{workers}",
            vocab_size=300,
            max_length=25,
            workers=workers,
        )
        preprocess(options, log=lambda line: None, block_bytes=1000)
    assert contents(tmp_path / "data1") == contents(tmp_path / "data7")
    assert (
        json.loads((tmp_path / "data1" / "preprocess.json").read_text())["splits"]["train"]["dropped"][
            "too_long"
        ]
        > 0
    )


def test_given_model_and_compressed_text_give_the_same_data(tmp_path: Path, made: Path) -> None:
    for path in made.parent.glob("*.??"):
        (tmp_path / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    model = str(made / "sentencepiece.model")
    result = run(arguments(tmp_path, sentencepiece_model=model, vocab_size=None))
    assert result.returncode == 0, result.stderr
    ours, theirs = contents(tmp_path / "data"), contents(made)
    del ours["preprocess.json"], theirs["preprocess.json"]
    assert ours == theirs


def test_test_text_alone_is_encoded_with_a_given_model(tmp_path: Path, made: Path) -> None:
    make_text(tmp_path)
    model = str(made / "sentencepiece.model")
    changes = {"trainpref": None, "validpref": None, "vocab_size": None, "sentencepiece_model": model}
    result = run(arguments(tmp_path, **changes))
    assert result.returncode == 0, result.stderr
    data = DataDirectory(tmp_path / "data")
    assert data.num_pairs("test") == 20
    assert not data.has_split("train")
    with pytest.raises(UserError, match="--trainpref"):
        data.num_pairs("train")


def test_odd_line_ends_stay_in_their_line_and_blank_sides_drop_their_pair(tmp_path: Path) -> None:
    make_text(tmp_path)
    source = ["a\rb", "c\u2028d", "e\u0085f", "g\x0ch", "", "tree", " \u3000\t", "green house", "last"]
    target = ["1", "2", "3", "4", "5", "\r", "7", "\ufeffgarden", "no newline"]
    (tmp_path / "valid.en").write_bytes(("\ufeff" + "\n".join(source) + "\n").encode())
    (tmp_path / "valid.de").write_bytes("\n".join(target).encode())
    result = run(arguments(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "valid: 6 pairs; dropped 3 with an empty side, 0 longer" in result.stderr
    data = DataDirectory(tmp_path / "data")
    kept = [0, 1, 2, 3, 7, 8]
    for lang, lines in (("en", source), ("de", target)):
        assert data.raw_path("valid", lang).read_bytes() == "".join(lines[i] + "\n" for i in kept).encode()
        assert len(IndexedDataset(data.split_prefix("valid", lang))) == 6


def test_long_pairs_are_dropped_and_above_one_percent_warned_of(tmp_path: Path) -> None:
    make_text(tmp_path)
    result = run(arguments(tmp_path, max_length="20"))
    assert result.returncode == 0, result.stderr
    assert "of the pairs of train were dropped as longer than 20 pieces" in result.stderr
    data = DataDirectory(tmp_path / "data")
    sizes = [IndexedDataset(data.split_prefix("train", lang)).sizes for lang in ("en", "de")]
    assert max(int(side.max()) for side in sizes) == 20


def test_pairs_to_be_measured_are_kept_whatever_their_length_and_counted(tmp_path: Path) -> None:
    make_text(tmp_path)
    texts = {}
    for name in ("valid", "test"):
        for lang in ("en", "de"):
            path = tmp_path / f"{name}.{lang}"
            lines = path.read_text().splitlines()
            lines[3] = " ".join(lines * 3)  # far more than 20 pieces, as is nothing else that is short
            path.write_text("".join(line + "\n" for line in lines))
            texts[name, lang] = lines
    result = run(arguments(tmp_path, max_length="20"))
    assert result.returncode == 0, result.stderr
    data = DataDirectory(tmp_path / "data")
    for (name, lang), lines in texts.items():
        assert data.raw_path(name, lang).read_text().splitlines() == lines
        sizes = IndexedDataset(data.split_prefix(name, lang)).sizes
        assert len(sizes) == len(lines) and sizes[3] > 3 * len(lines)
        assert data.record["splits"][name]["dropped"]["too_long"] == 0
    for name in ("valid", "test"):
        sides = [IndexedDataset(data.split_prefix(name, lang)).sizes for lang in ("en", "de")]
        num_long = sum(max(a, b) > 20 for a, b in zip(*sides, strict=True))
        pairs_are = "pair is" if num_long == 1 else "pairs are"
        assert f"{name}: {num_long} {pairs_are} longer than 20 pieces, and kept" in result.stderr


def test_size_that_the_text_cannot_fill_is_lowered_and_said(tmp_path: Path) -> None:
    result = run(arguments(make_text(tmp_path), vocab_size="8000"))
    assert result.returncode == 0, result.stderr
    size = len(DataDirectory(tmp_path / "data").vocabulary("en"))
    assert f"warning: `vocab-size` lowered from 8,000 to {size:,}" in result.stderr


def test_killed_run_leaves_no_directory_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    leftover = make_text(tmp_path) / ".data.tmp"
    leftover.mkdir()
    (leftover / "train.en-de.en.bin").write_bytes(b"half")
    assert run(arguments(tmp_path)).returncode == 0
    assert not leftover.exists()
    DataDirectory(tmp_path / "data")


def test_existing_data_is_replaced_only_when_asked(tmp_path: Path) -> None:
    make_text(tmp_path)
    assert run(arguments(tmp_path)).returncode == 0
    before = contents(tmp_path / "data")
    assert_fails(arguments(tmp_path, vocab_size="290"), "is a data directory already", "`overwrite`")
    assert contents(tmp_path / "data") == before
    assert run([*arguments(tmp_path, vocab_size="290"), "--overwrite"]).returncode == 0
    assert len(DataDirectory(tmp_path / "data").vocabulary("en")) == 290
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["data"]


def test_folder_of_something_else_is_never_replaced(tmp_path: Path) -> None:
    (make_text(tmp_path) / "data").mkdir()
    (tmp_path / "data" / "thesis.tex").write_text("precious")
    assert_fails([*arguments(tmp_path), "--overwrite"], "must be new or empty")
    assert (tmp_path / "data" / "thesis.tex").read_text() == "precious"


def _options(folder: Path, **changes: Any) -> PreprocessOptions:
    options: dict[str, Any] = {
        "source_lang": "en",
        "target_lang": "de",
        "trainpref": str(folder / "train"),
        "destdir": folder / "data",
        "vocab_size": 300,
    }
    return PreprocessOptions(**options | changes)


@pytest.mark.parametrize("name", ["checkpoints/last/model.safetensors", "notes.txt", "train.en", ".hidden"])
def test_only_what_preprocessing_has_made_is_replaced(tmp_path: Path, name: str) -> None:
    make_text(tmp_path, num_train=60)
    preprocess(_options(tmp_path), log=print)
    before = contents(tmp_path / "data")
    other = tmp_path / "data" / name
    other.parent.mkdir(parents=True, exist_ok=True)
    other.write_text("precious")
    with pytest.raises(
        UserError, match=rf"data must hold nothing but .*, but holds {name.split('/')[0]} too"
    ):
        preprocess(_options(tmp_path, overwrite=True), log=print)
    assert other.read_text() == "precious"
    assert contents(tmp_path / "data").items() >= before.items()
    other.unlink()
    if other.parent != tmp_path / "data":
        shutil.rmtree(tmp_path / "data" / "checkpoints")
    preprocess(_options(tmp_path, overwrite=True, max_length=50), log=print)
    assert contents(tmp_path / "data").keys() == before.keys()


def test_what_comes_while_the_data_are_made_is_not_replaced(tmp_path: Path) -> None:
    make_text(tmp_path, num_train=60)
    preprocess(_options(tmp_path), log=print)
    other = tmp_path / "data" / "train.log"
    with pytest.raises(UserError, match=r"but holds train\.log too"):
        preprocess(_options(tmp_path, overwrite=True), log=lambda _: other.write_text("precious"))
    assert other.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["data"]


def test_kept_text_of_the_data_that_are_replaced_is_not_read(tmp_path: Path) -> None:
    """Pairs that were dropped would be lost for good."""
    make_text(tmp_path, num_train=60)
    preprocess(_options(tmp_path, validpref=str(tmp_path / "valid")), log=print)
    before = contents(tmp_path / "data")
    again = _options(tmp_path, validpref=str(tmp_path / "data" / "valid"), overwrite=True)
    with pytest.raises(UserError, match=r"valid\.en must lie outside of .*data"):
        preprocess(again, log=print)
    assert contents(tmp_path / "data") == before


def test_a_damaged_record_does_not_let_anything_be_replaced(tmp_path: Path) -> None:
    make_text(tmp_path, num_train=60)
    preprocess(_options(tmp_path), log=print)
    (tmp_path / "data" / "preprocess.json").write_text("{")
    with pytest.raises(UserError, match=r"preprocess\.json must tell which files"):
        preprocess(_options(tmp_path, overwrite=True), log=print)


def test_line_ends_change_nothing_but_the_hashes_of_the_input(tmp_path: Path) -> None:
    found = []
    for end in ("\n", "\r\n"):
        folder = tmp_path / repr(end)
        folder.mkdir()
        for path in make_text(folder, num_train=60).iterdir():
            path.write_bytes(path.read_bytes().replace(b"\n", end.encode()))
        for normalization in ("nmt_nfkc", "identity"):
            name = folder / normalization
            options = _options(
                folder, validpref=str(folder / "valid"), normalization=normalization, destdir=name
            )
            preprocess(options, log=print)
            record = json.loads((name / "preprocess.json").read_bytes())
            assert record["options"]["normalization"] == normalization
        made = [contents(folder / normalization) for normalization in ("nmt_nfkc", "identity")]
        found.append([{name: data for name, data in x.items() if name != "preprocess.json"} for x in made])
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]


def test_text_that_the_model_hardly_knows_is_warned_of(tmp_path: Path) -> None:
    make_text(tmp_path, num_train=60)
    preprocess(_options(tmp_path), log=print)
    (tmp_path / "train.de").write_text("☃☃☃ ☃☃\n" * 60)
    said: list[str] = []
    options = PreprocessOptions(
        source_lang="en",
        target_lang="de",
        trainpref=str(tmp_path / "train"),
        destdir=tmp_path / "other",
        sentencepiece_model=tmp_path / "data" / "sentencepiece.model",
    )
    preprocess(options, log=said.append)
    (warning,) = [line for line in said if line.startswith("warning")]
    assert "of the pieces of train.de are bytes" in warning


def test_a_target_language_that_is_not_named_as_such_is_warned_of(tmp_path: Path) -> None:
    make_text(tmp_path, num_train=60)
    for lang in ("tgt", "cmn_Hans"):
        (tmp_path / f"train.{lang}").write_text("我喜歡狗。\n" * 60)
        said: list[str] = []
        preprocess(_options(tmp_path, target_lang=lang, destdir=tmp_path / lang), log=said.append)
        warned = [line for line in said if "looks like `zh`, but its language is named" in line]
        assert len(warned) == (lang == "tgt")


def test_blank_training_text_is_named(tmp_path: Path) -> None:
    for lang in ("en", "de"):
        (tmp_path / f"train.{lang}").write_text("\u00ad\n\u0085\n")
    with pytest.raises(UserError, match=r"train\.en and .*train\.de must hold sentences"):
        preprocess(_options(tmp_path), log=print)


def _append(name: str, data: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        with (folder / name).open("ab") as file:
            file.write(data)

    return change


BAD_INPUT = {
    "different numbers of lines": (_append("train.de", b"one more\n"), {}, ["300 and 301"]),
    "different numbers of lines in valid": (_append("valid.en", b"x\ny\n"), {}, ["valid.en", "22 and 20"]),
    "missing file": (lambda folder: (folder / "test.de").unlink(), {}, ["test.de must exist"]),
    "empty file": (lambda folder: (folder / "train.en").write_bytes(b""), {}, ["train.en", "empty"]),
    "not UTF-8": (_append("train.en", b"caf\xe9\n"), {}, ["train.en, line 301", "UTF-8"]),
    "cut .gz": (
        lambda folder: (folder / "test.de").rename(folder / "test.de.gz"),
        {},
        ["test.de.gz must be a whole gzip file"],
    ),
    "all blank": (
        lambda folder: (folder / "valid.en").write_bytes(b"\n" * 20),
        {},
        ["valid.en", "all (20) were dropped"],
    ),
    "all blank in train": (
        lambda folder: [(folder / f"train.{lang}").write_bytes(b" \n" * 20) for lang in ("en", "de")],
        {},
        ["must hold sentences"],
    ),
    "all too long": (
        lambda folder: [
            path.write_bytes(path.read_bytes().replace(b"\n", b" more words\n"))
            for path in folder.glob("train.*")
        ],
        {"max_length": "2"},
        ["were dropped", "longer than 2 pieces", "`max-length`"],
    ),
    "vocabulary too small": (None, {"vocab_size": "100"}, ["`vocab-size` must be at least 2", "is 100"]),
    "misspelt option": (None, {"vocabsize": "100"}, ["vocabsize", "vocab-size"]),
    "missing model": (None, {"sentencepiece_model": "/none.model", "vocab_size": None}, ["/none.model"]),
    "no model": (
        None,
        {"sentencepiece_model": __file__, "vocab_size": None},
        ["must be a SentencePiece model"],
    ),
    "option of a choice not taken": (
        None,
        {"sentencepiece_model": __file__},
        ["`vocab-size` must not be set"],
    ),
    "one language twice": (None, {"target_lang": "en"}, ["must differ"]),
    "nothing to train on": (None, {"trainpref": None}, ["`trainpref` or `sentencepiece-model`"]),
    "special symbol as extra": (None, {"extra_symbols": "</s>"}, ["extra-symbols", "</s>"]),
    "no coverage": (None, {"character_coverage": "0.5"}, ["character-coverage", "0.98"]),
    "no workers": (None, {"workers": "0"}, ["workers"]),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path: Path, case: str) -> None:
    change, changes, parts = BAD_INPUT[case]
    make_text(tmp_path)
    if change is not None:
        change(tmp_path)
    assert_fails(arguments(tmp_path, **changes), *parts)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_missing_required_option_is_named(tmp_path: Path) -> None:
    result = run(arguments(make_text(tmp_path), source_lang=None))
    assert result.returncode == 2
    assert "--source-lang" in result.stderr and "Traceback" not in result.stderr


def damaged(made: Path, folder: Path) -> Path:
    for path in made.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_directory_with_a_file_missing_or_cut_short_is_refused(tmp_path: Path, made: Path) -> None:
    damaged(made, tmp_path)
    for path in sorted(tmp_path.iterdir()):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match=f"{path.name} .*cut short"):
            DataDirectory(tmp_path)
        path.unlink()
        with pytest.raises(UserError, match=f"{path.name}"):
            DataDirectory(tmp_path)
        path.write_bytes(whole)
    DataDirectory(tmp_path)


def test_directory_of_another_version_is_refused(tmp_path: Path, made: Path) -> None:
    record = json.loads((damaged(made, tmp_path) / "preprocess.json").read_text("utf-8"))
    (tmp_path / "preprocess.json").write_text(json.dumps(record | {"format_version": 2}), "utf-8")
    with pytest.raises(UserError, match="format version 1, but is of 2"):
        DataDirectory(tmp_path)


def test_what_is_no_data_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must be a data directory, but there is none"):
        DataDirectory(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no preprocess\.json"):
        DataDirectory(tmp_path)


@pytest.mark.parametrize(("num_lines", "max_lines"), [(10, 3), (10, 10), (10, 99), (1000, 7)])
def test_sample_of_lines_is_evenly_spread(tmp_path: Path, num_lines: int, max_lines: int) -> None:
    (tmp_path / "text").write_text("".join(f"{i}\n" for i in range(num_lines)))
    sample = [int(line) for line in sample_lines([TextFile(tmp_path / "text", num_lines, "")], max_lines)]
    assert len(sample) == min(num_lines, max_lines)
    steps = {after - before for before, after in itertools.pairwise(sample)}
    assert max(steps) - min(steps) <= 1


def test_preprocessing_imports_no_torch(tmp_path: Path) -> None:
    make_text(tmp_path)
    code = (
        "import sys\n"
        "from nmt.cli.preprocess import main\n"
        "main(sys.argv[1:])\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments(tmp_path)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_names_of_files_are_recorded_as_utf8_whatever_the_locale_makes_of_them() -> None:
    assert name_in_record(Path("a/té.en")) == "té.en"
    assert name_in_record(Path("a/t\udce9.en")) == r"t\xe9.en"


def test_a_symbol_that_the_locale_cannot_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="`extra-symbols` must be text, but one"):
        PreprocessOptions("en", "de", tmp_path, trainpref="x", extra_symbols=("\udcc3\udc9f",)).check()
