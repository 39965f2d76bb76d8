"""nmt-score: by a reference, against a baseline, and by a model."""

import math
from pathlib import Path

import pytest
from tiny_translation_model import write_tiny_model

from nmt.cli.score import main
from nmt.translation.scoring import bleu, chrf, ter
from nmt.translation.translator import Translator

LINES = ["der Hund läuft schnell nach Haus", "eine Katze schläft", "zwei Vögel singen im Baum"]
REFERENCES = ["der Hund läuft schnell nach Hause", "eine Katze schläft dort", "zwei Vögel singen im Baum"]


@pytest.fixture(scope="module")
def model(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("run") / "model")


def write(path: Path, lines: list[str]) -> str:
    path.write_bytes("".join(line + "\n" for line in lines).encode())
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    hypothesis = write(tmp_path / "hypothesis", LINES)
    return ["--hypothesis", hypothesis, "--reference", write(tmp_path / "reference", REFERENCES)]


def test_files_are_scored_with_signatures(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(files)
    expected = [
        bleu(LINES, REFERENCES, target_lang=""),
        chrf(LINES, REFERENCES),
        ter(LINES, REFERENCES, target_lang=""),
    ]
    assert capsys.readouterr().out.splitlines() == [str(score) for score in expected]


def test_a_baseline_is_compared(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    baseline = write(tmp_path / "baseline", ["x"] * 3)
    main([*files, "--baseline", baseline])
    lines = capsys.readouterr().out.splitlines()
    assert lines[3] == f"against {baseline}, by paired bootstrap:"
    assert lines[4].startswith("  BLEU 0.00 -> ")
    assert "baseline" in lines[7]


def test_a_model_gives_the_log_probabilities_of_lines_and_their_perplexity(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    translator = Translator.load(model)
    sources = ["the dog", "", "a red cat sings"]
    found = translator.translate_with_scores(sources, beam=2)
    texts = [hypotheses[0].text if hypotheses else "" for hypotheses in found]
    # What the search found is scored: byte pieces may be joined into others, so the texts go through ids again.
    ids = [translator.encode_reference(text, number=1) for text in texts]
    expected = [
        scored.hypotheses[0].token_scores if scored.hypotheses else []
        for scored in translator.score_lines(sources, ids)
    ]
    files = ["--input", write(tmp_path / "source", sources), "--hypothesis", write(tmp_path / "text", texts)]
    main(["--model", str(model), *files, "--device", "cpu"])
    captured = capsys.readouterr()
    rows = [line.split("\t") for line in captured.out.splitlines()]
    assert [int(count) for _, count in rows] == [len(scores) for scores in expected]
    assert rows[1] == ["nan", "0"]
    assert [float(rows[i][0]) for i in (0, 2)] == pytest.approx([sum(expected[i]) for i in (0, 2)], abs=1e-4)
    flat = [score for scores in expected for score in scores]
    assert f"| {len(flat):,} tokens |" in captured.err
    perplexity = float(captured.err.split("perplexity ")[1])
    assert perplexity == pytest.approx(math.exp(-sum(flat) / len(flat)), rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "`reference` or `model` must be given, one of them, but neither is given."),
        (["--reference", "r", "--model", "m"], "one of them, but both are given."),
        (["--model", "m"], "`input` must come with `model`"),
        (["--reference", "r", "--input", "i"], "`model` must come with `input`"),
        (["--model", "m", "--input", "i", "--baseline", "b"], "`baseline` must come with `reference`"),
        (["--reference", "r", "--output", "o"], "`output` must come with `model`"),
        (["--reference", "short"], "must have the same number of lines, but have 3 and 1"),
        (["--reference", "nothing"], "nothing must exist, but there is no such file."),
    ],
)
def test_what_does_not_go_together_is_said_in_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    text: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "short", ["eins"])
    with pytest.raises(SystemExit) as error:
        main(["--hypothesis", write(tmp_path / "hypothesis", LINES), *arguments])
    captured = capsys.readouterr()
    assert (error.value.code, captured.out, captured.err.count("\n")) == (2, "", 1)
    assert captured.err.startswith("nmt-score: error: ")
    assert text in captured.err


def test_a_bleu_below_1_is_said_to_tell_little(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "reference").write_text("the old dog runs\na small bird sings\n" * 10)
    for name, text in (("bad", "xx yy zz\n" * 20), ("good", "the old dog runs\na small bird sings\n" * 10)):
        (tmp_path / name).write_text(text)
        main(["--hypothesis", str(tmp_path / name), "--reference", str(tmp_path / "reference")])
        assert ("chrF is the number to look at" in capsys.readouterr().err) == (name == "bad")
