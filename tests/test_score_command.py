"""nmt-score: by a reference, against a baseline, and by a model."""

import math
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nmt.cli.score import main
from nmt.translation.request import Request
from nmt.translation.scoring import bleu, chrf, ter
from nmt.translation.translator import Translator

LINES = ["der Hund läuft schnell nach Haus", "eine Katze schläft", "zwei Vögel singen im Baum"]
REFERENCES = ["der Hund läuft schnell nach Hause", "eine Katze schläft dort", "zwei Vögel singen im Baum"]


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
    expected = [
        scored.hypotheses[0].token_scores if scored.hypotheses else []
        for scored in translator.score_lines(map(Request, sources, [()] * 3, texts))
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


@pytest.fixture
def pipe(tmp_path: Path) -> Iterator[Callable[[str, list[str]], str]]:
    """Write lines into pipes, which can be read but once, and have no length."""
    threads = []

    def open_pipe(name: str, lines: list[str]) -> str:
        path = tmp_path / name
        os.mkfifo(path)
        data = "".join(line + "\n" for line in lines).encode()
        threads.append(threading.Thread(target=path.write_bytes, args=(data,), daemon=True))
        threads[-1].start()
        return str(path)

    yield open_pipe
    for thread in threads:
        thread.join(timeout=10)


@pytest.mark.parametrize("lines", [["a", "the cat"], ["a", "the cat", "a dog", "a"], []])
def test_pipes_of_other_lengths_are_refused_when_they_have_ended(
    pipe: Callable[[str, list[str]], str],
    lines: list[str],
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fixed = write(tmp_path / "fixed", ["a", "the cat", "a dog"])
    (tmp_path / "output").write_text("before")
    calls = [
        ["--hypothesis", pipe("h", lines), "--reference", fixed],
        ["--hypothesis", fixed, "--reference", pipe("r", lines)],
        ["--hypothesis", fixed, "--reference", fixed, "--baseline", pipe("b", lines)],
        ["--hypothesis", pipe("h2", lines), "--input", fixed, "--model", str(model)],
        ["--hypothesis", fixed, "--input", pipe("i", lines), "--model", str(model)],
    ]
    for arguments in calls:
        rest = ["--output", str(tmp_path / "output"), "--device", "cpu"] if "--model" in arguments else []
        with pytest.raises(SystemExit) as error:
            main([*arguments, *rest])
        message = capsys.readouterr().err
        assert error.value.code == 2
        assert re.search(r"must have the same number of lines, but have \d and \d\.", message), message
    assert (tmp_path / "output").read_text() == "before"


def test_pipes_of_one_length_are_scored(
    pipe: Callable[[str, list[str]], str], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--hypothesis", pipe("h", LINES), "--reference", pipe("r", REFERENCES)])
    assert capsys.readouterr().out.startswith("BLEU ")


def test_empty_pipes_are_refused(
    pipe: Callable[[str, list[str]], str], model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (
        ["--hypothesis", pipe("h", []), "--reference", pipe("r", [])],
        ["--hypothesis", pipe("h2", []), "--input", pipe("i", []), "--model", str(model)],
    ):
        with pytest.raises(SystemExit) as error:
            main(arguments)
        assert error.value.code == 2
        assert "must hold one sentence per line, but is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "is_warned"),
    [([], True), (["--target-lang", "zho_Hans"], False), (["--target-lang", "en"], True)],
)
def test_a_reference_whose_language_must_be_named_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], is_warned: bool
) -> None:
    chinese = write(tmp_path / "chinese", ["我喜歡狗。", "我喜歡貓。"])
    main(["--hypothesis", chinese, "--reference", chinese, *flags])
    assert ("warning: the reference looks like `zh`" in capsys.readouterr().err) == is_warned


@pytest.mark.parametrize(
    ("hypothesis", "reference", "side"), [("", "a b c d", "translations"), ("a b", "\u00ad", "references")]
)
def test_a_score_of_nothing_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], hypothesis: str, reference: str, side: str
) -> None:
    for name, text in (("h", hypothesis), ("r", reference)):
        (tmp_path / name).write_text(f"{text}\n" * 3)
    main(["--hypothesis", str(tmp_path / "h"), "--reference", str(tmp_path / "r")])
    assert f"warning: nothing was compared: all 3 {side} are blank\n" in capsys.readouterr().err
