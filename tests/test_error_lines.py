"""Error lines from the user's place: what must be, what is, and what to do about it."""

import ast
import math
import os
import re
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import numpy as np
import pytest

import nmt
from nmt.cli.generate import _Report
from nmt.cli.generate import main as generate
from nmt.cli.options import GenerateOptions
from nmt.cli.preprocess import main as preprocess
from nmt.cli.train import main as train
from nmt.cli.validate import main as validate
from nmt.distributed import join_world
from nmt.errors import UserError
from nmt.generation.beam_search import Hypothesis
from nmt.generation.options import DecodingOptions
from nmt.task import load_task
from nmt.translation.request import Request, Translation
from nmt.translation.translator import Translator

pytestmark = pytest.mark.usefixtures("one_thread")
PACKAGE = Path(nmt.__file__).parent
TINY = (
    *("--arch", "transformer_tiny", "--encoder-layers", "1", "--decoder-layers", "1"),
    *("--encoder-embed-dim", "16", "--decoder-embed-dim", "16", "--encoder-ffn-embed-dim", "16"),
    *("--decoder-ffn-embed-dim", "16", "--encoder-attention-heads", "1", "--decoder-attention-heads", "1"),
    *("--max-tokens", "400", "--eval-beam", "1", "--device", "cpu", "--max-update", "2"),
)


def refused(capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], None], *argv: object) -> str:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in argv])
    assert caught.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert ": error: " in said
    return said


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for split, lines in (("train", 200), ("valid", 5)):
        for language in ("en", "de", "fr"):
            content = "".join(f"{i % 7} dogs and {i % 11} cats {language}\n" for i in range(lines))
            (folder / f"{split}.{language}").write_text(content)
    return folder


def make_data(text: Path, folder: Path, source: str, target: str, *options: object) -> Path:
    prefixes = ["--trainpref", text / "train", "--validpref", text / "valid", "--destdir", folder]
    argv = ["--source-lang", source, "--target-lang", target, *prefixes, *options]
    preprocess([str(argument) for argument in argv])
    return folder


@pytest.fixture(scope="module")
def data(text: Path) -> Path:
    return make_data(text, text / "data", "en", "de", "--vocab-size", 300)


@pytest.fixture(scope="module")
def run(text: Path, data: Path, one_thread: None) -> Path:
    train([str(data), "--save-dir", str(text / "run"), *TINY])
    return text / "run"


def test_a_file_in_the_place_of_a_folder_is_told(
    data: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for place in ("file", "file/below"):
        said = refused(capsys, train, data, "--save-dir", tmp_path / place, *TINY)
        assert "`save-dir` must be a folder, or new" in said and said.endswith("Name another one.")
        pictures = ["--plot-attention", tmp_path / place, "--input", tmp_path / "file"]
        (tmp_path / "file").write_text("1 dogs\n")
        said = refused(capsys, generate, "--model", run, *pictures)
        assert "`plot-attention` must be a folder, or new" in said


def test_a_model_that_can_be_read_but_once_is_refused(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, found in (("pipe", "a pipe or a device"), ("none", "missing"), (".", "a folder")):
        options = ["--sentencepiece-model", tmp_path / name, "--trainpref", text / "train"]
        said = refused(
            capsys,
            preprocess,
            *("--source-lang", "en", "--target-lang", "de", "--destdir", tmp_path / "d", *options),
        )
        assert f"`sentencepiece-model` must be a plain file, but {tmp_path / name} is {found}." in said


def test_data_of_other_languages_are_refused(
    text: Path, data: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The pieces are the model's, so that the vocabularies do not tell."""
    for source, target in (("en", "fr"), ("de", "en")):
        other = make_data(
            text,
            text / f"{source}{target}",
            source,
            target,
            "--sentencepiece-model",
            data / "sentencepiece.model",
        )
        said = refused(capsys, validate, run, other)
        assert (
            f"must hold data from en to de, as the model translates, but is from {source} to {target}" in said
        )


def test_a_split_that_no_data_have_is_no_option_of_preprocessing(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "has train, valid. Name one of these." in refused(capsys, validate, run, "--split", "foo")
    assert "nmt-preprocess --testpref" in refused(capsys, validate, run, "--split", "test")


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "LOCAL_RANK"])
@pytest.mark.parametrize("value", ["two", "", "-1", "1.0", "²"])
def test_variables_of_torchrun_that_are_no_numbers_are_named(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"`{name}` must be a whole number"), join_world("cpu"):
        pass


def test_plugins_that_cannot_be_used_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broken_plugin.py").write_text("import no_such_module\n")
    (tmp_path / "odd_plugin.py").write_text("def options(): pass\nclass Bare: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    places = {
        "broken": "broken_plugin:Options",
        "absent": "absent_plugin:Options",
        "missing": "odd_plugin:Options",
        "odd": "odd_plugin:options",
        "bare": "odd_plugin:Bare",
    }
    found = EntryPoints(EntryPoint(name, place, "nmt.tasks") for name, place in places.items())
    monkeypatch.setattr("nmt.task.entry_points", lambda group: found)
    for name, place in places.items():
        with pytest.raises(UserError, match=f"The task `{name}` must be .*`{place}`") as caught:
            load_task(name)
        assert re.search(r"Mend ", str(caught.value))


def warnings_of(capsys: pytest.CaptureFixture[str], *argv: object) -> Iterator[str]:
    generate([str(argument) for argument in argv])
    return (line for line in capsys.readouterr().err.splitlines() if "warning" in line)


def test_a_prefix_that_is_cut_is_told(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, reference = tmp_path / "s", tmp_path / "r"
    source.write_text("the dog runs\nthe cat\n")
    reference.write_text("the old dog sees the big cat\na\n")
    start = ["--model", model, "--input", source, "--reference", reference, "--output", tmp_path / "o"]
    (line,) = warnings_of(capsys, *start, "--prefix-size", 50, "--max-len-a", 0, "--max-len-b", 3)
    assert "1 of 2 lines: the prefix is longer than the limit of `max-len-a`" in line and "(line 1)" in line
    assert not list(warnings_of(capsys, *start, "--prefix-size", 2))


@pytest.mark.parametrize(
    ("size", "said"), [(1, "`no-repeat-ngram-size` 1 leaves no token"), (0, "not a number")]
)
def test_rules_that_leave_no_token_are_named(
    size: int, said: str, translator: Translator, capsys: pytest.CaptureFixture[str]
) -> None:
    decoding = DecodingOptions(no_repeat_ngram_size=size, min_len=600)
    report = _Report([], translator, GenerateOptions(model="", decoding=decoding))
    nothing = Hypothesis(tokens=[5], score=-math.inf, token_scores=[-math.inf])
    report.add(Translation(Request("a"), [""], [nothing], np.array([5])))
    report.print()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert said in line


def test_every_error_text_ends_as_a_sentence() -> None:
    """Of those that are written in one piece; a text that ends with what another has said is not looked at."""
    checked = 0
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and ast.unparse(node.func) == "UserError" and node.args):
                continue
            text = node.args[0]
            last = text.values[-1] if isinstance(text, ast.JoinedStr) and text.values else text
            if isinstance(last, ast.Constant):
                checked += 1
                assert re.search(r"[.?]\s*`?$", str(last.value)), f"{path}, line {node.lineno}: {last.value}"
    assert checked > 100


_OF_TRANSLATION = ("translation", "interop", "generation", "models", "cli")
_RULES = r"at least|at most|from|finite|fp32|even|a device of|\{rule\}"
_RANGE = re.compile(rf"^`[^`]*` must be ({_RULES})[ ,].*but is \{{.*\}}\.$|^`\{{name\}}` must be \{{rule\}}")
_SAYS_MORE = re.compile(r"[.?:] `?[A-Z{][^.]*|\{[A-Z_]+\}$|\{error\}$|must be (left out|told)")


def _as_written(text: ast.expr) -> str:
    """Return a text with `{x}` for what is put in: names of constants as they are."""
    if isinstance(text, ast.JoinedStr):
        return "".join(
            str(part.value) if isinstance(part, ast.Constant) else f"{{{ast.unparse(part.value)}}}"
            for part in text.values
            if isinstance(part, ast.Constant | ast.FormattedValue)
        )
    return str(text.value) if isinstance(text, ast.Constant) else ""


def test_every_error_text_of_translation_says_what_to_do() -> None:
    """Or which values an option may have, which is the same."""
    checked, faults = 0, []
    for path in (path for room in _OF_TRANSLATION for path in (PACKAGE / room).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and node.args):
                continue
            if ast.unparse(node.func) not in ("UserError", "DamagedError"):
                continue
            written = _as_written(node.args[0])
            checked += 1
            if not (_RANGE.search(written) or _SAYS_MORE.search(written)):
                faults.append(f"{path}, line {node.lineno}: {written}")
    assert checked > 100 and not faults, "\n".join(faults)
