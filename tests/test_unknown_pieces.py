"""What is said of text that a model can make nothing of."""

import json
import shutil
from pathlib import Path

import pytest

from nmt.cli.generate import main as generate
from nmt.cli.score import main as score
from nmt.data.segmenter import PieceSegmenter, Segmenter
from nmt.data.vocabulary import UNK_ID, Vocabulary
from nmt.translation.translator import Translator
from nmt.translation.unknown_pieces import UnknownPieces


@pytest.fixture(scope="module")
def model_of_pieces(model: Path) -> Path:
    """The same without its SentencePiece model, as one that came from fairseq."""
    folder = model.with_name("pieces")
    shutil.copytree(model, folder)
    (folder / "sentencepiece.model").unlink()
    languages = json.loads((folder / "languages.json").read_text())
    (folder / "languages.json").write_text(json.dumps({**languages, "segmenter": False}))
    return folder


def write(path: Path, *lines: str) -> str:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("flags", [[], ["--format", "jsonl"], ["--input-is-pieces"]])
def test_raw_text_for_a_model_of_pieces_is_warned_of(
    model_of_pieces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    raw = write(tmp_path / "raw", "THE DOG SEES", "", "A ▁the")
    generate(["--model", str(model_of_pieces), "--input", raw, "--beam", "1", "--device", "cpu", *flags])
    warning, summary = capsys.readouterr().err.splitlines()
    assert warning.startswith("nmt-generate: warning: ")
    assert "80.0% of the pieces of the input are unknown to the model." in warning
    assert "split into" in warning
    assert summary.startswith("3 lines | 1 blank | ")


def test_pieces_that_are_known_are_not_warned_of(
    model: Path, model_of_pieces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = write(tmp_path / "raw", "the dog sees a cat")
    pieces = write(tmp_path / "pieces", "▁the ▁dog ▁sees ▁a ▁cat")
    for folder, path in ((model, raw), (model_of_pieces, pieces)):
        generate(["--model", str(folder), "--input", path, "--beam", "1", "--device", "cpu"])
        assert "warning" not in capsys.readouterr().err


def test_pieces_for_a_model_of_raw_text_are_warned_of(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pieces = write(tmp_path / "pieces", "▁the ▁dog ▁sees", "▁a ▁c at", "")
    arguments = ["--model", str(model), "--input", pieces, "--beam", "1", "--device", "cpu"]
    generate(arguments)
    assert "2 of 2 lines of the input look as if split into pieces already" in capsys.readouterr().err
    generate([*arguments, "--input-is-pieces"])
    assert "look as if" not in capsys.readouterr().err


def test_what_is_scored_is_looked_at_too(
    model_of_pieces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pieces, raw = write(tmp_path / "pieces", "▁the ▁dog"), write(tmp_path / "raw", "THE DOG")
    model = ["--model", str(model_of_pieces), "--device", "cpu"]
    score([*model, "--input", pieces, "--hypothesis", raw])
    assert "warning: 100.0% of the pieces of the hypothesis are unknown" in capsys.readouterr().err
    score([*model, "--input", raw, "--hypothesis", pieces])
    assert "warning: 100.0% of the pieces of the input are unknown" in capsys.readouterr().err
    generate([*model, "--input", pieces, "--reference", raw, "--score-reference", "--format", "jsonl"])
    assert "warning: 100.0% of the pieces of the reference are unknown" in capsys.readouterr().err


def test_from_python_a_call_warns_once(model: Path, model_of_pieces: Path) -> None:
    translator = Translator.load(model_of_pieces)
    for call in (translator.translate, translator.translate_with_scores):
        with pytest.warns(UserWarning, match="100.0% of the pieces of the input are unknown") as caught:
            call(["THE DOG", "SEES"], beam=1)
        assert len(caught) == 1 and caught[0].filename == __file__
    translator.translate(["▁the ▁dog"], beam=1)  # warnings are errors here
    with pytest.warns(UserWarning, match="1 of 1 line of the input looks as if split"):
        Translator.load(model).translate(["▁the ▁dog"], beam=1)


def test_one_unknown_piece_in_twenty_is_let_pass() -> None:
    vocabulary = Vocabulary(["a"])
    pieces = UnknownPieces(PieceSegmenter(vocabulary), named="input", input_is_pieces=False)
    assert pieces.warnings() == []
    pieces.add("x", [4] * 19 + [UNK_ID])
    assert pieces.warnings() == []
    pieces.add("x", [UNK_ID])
    assert len(pieces.warnings()) == 1


def test_signs_of_pieces_in_a_line_or_two_are_let_pass() -> None:
    pieces = UnknownPieces(Segmenter(Path("unread"), Vocabulary(["a"])), named="input", input_is_pieces=False)
    for line in ("a", "a ▁", "a b"):
        pieces.add(line, [4])
    assert pieces.warnings() == []
    for line in ("lo@@ w er", "▁a"):
        pieces.add(line, [4])
    assert len(pieces.warnings()) == 1
