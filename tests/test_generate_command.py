"""nmt-generate: files in and out, scores, and what can go wrong."""

import gc
import gzip
import io
import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.tiny_translation_model import WORDS, write_learned_model

from nmt.cli.generate import _buffer_size, main
from nmt.cli.options import GenerateOptions
from nmt.generation.beam_search import Hypothesis
from nmt.generation.generator import Generator
from nmt.models import inference_int8 as int8
from nmt.translation.translator import Translator

pytestmark = pytest.mark.usefixtures("one_thread")

LINES = [f"the {WORDS[i % 16]} {WORDS[i % 11]}" for i in range(20)]


@pytest.fixture(scope="module")
def expected(model: Path) -> list[str]:
    return Translator.load(model).translate(LINES, beam=2)


@pytest.fixture
def generate(model: Path) -> Callable[..., None]:
    return lambda *arguments: main(
        ["--model", str(model), "--device", "cpu", "--beam", "2", *map(str, arguments)]
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "source.en", "\n".join(LINES) + "\n")


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read_lines(path: Path) -> list[str]:
    return path.read_bytes().decode().removesuffix("\n").split("\n")


def fails(capsys: pytest.CaptureFixture[str], command: Callable[[], None]) -> str:
    """Run a command that must end with exit code 2; return the one line it prints."""
    with pytest.raises(SystemExit) as error:
        command()
    assert error.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_translates_a_file_in_its_order(
    generate: Callable[..., None], source: Path, expected: list[str], tmp_path: Path
) -> None:
    output = tmp_path / "output.de"
    generate("--input", source, "--output", output)
    assert read_lines(output) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["output.de", "source.en"]


@pytest.mark.parametrize("arguments", [("--buffer-size", 3), ("--max-tokens", 1), ("--batch-size", 1)])
def test_batches_change_no_translation(
    generate: Callable[..., None],
    source: Path,
    expected: list[str],
    tmp_path: Path,
    arguments: tuple[str, int],
) -> None:
    generate("--input", source, "--output", tmp_path / "output", *arguments)
    assert read_lines(tmp_path / "output") == expected


def test_a_compressed_input_and_a_last_line_without_newline(
    generate: Callable[..., None], expected: list[str], tmp_path: Path
) -> None:
    source = write(tmp_path / "source.gz", gzip.compress("\n".join(LINES).encode()))
    generate("--input", source, "--output", tmp_path / "output")
    assert read_lines(tmp_path / "output") == expected


def test_blank_in_blank_out_and_only_a_newline_ends_a_line(
    generate: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "source", "a dog\n\n \r\na\rdog\u2028and\x85a\fcat\n")
    generate("--input", source, "--output", tmp_path / "output")
    lines = read_lines(tmp_path / "output")
    assert len(lines) == 4
    assert lines[1:3] == ["", ""]
    assert lines[0]
    assert lines[3]
    assert capsys.readouterr().err.startswith("4 lines | 2 blank | ")


def test_nbest_writes_as_many_lines_for_each(generate: Callable[..., None], tmp_path: Path) -> None:
    source = write(tmp_path / "source", "the dog\n\na cat\n")
    generate("--input", source, "--output", tmp_path / "best")
    generate("--input", source, "--output", tmp_path / "nbest", "--nbest", 2)
    lines = read_lines(tmp_path / "nbest")
    assert len(lines) == 6
    assert lines[::2] == read_lines(tmp_path / "best")
    assert lines[2:4] == ["", ""]


def test_standard_input_to_standard_output(model: Path, expected: list[str], tmp_path: Path) -> None:
    # Through the real entry point. Translations go to stdout alone, scores and reports to stderr.
    reference = write(tmp_path / "reference", "\n".join(expected))
    command = [Path(sys.executable).with_name("nmt-generate"), "--model", model, "--beam", "2"]
    command += ["--num-threads", "1", "--reference", reference]
    done = subprocess.run(
        command, input="\n".join(LINES).encode(), capture_output=True, check=True, timeout=120
    )
    assert done.stdout.decode() == "\n".join(expected) + "\n"
    report = done.stderr.decode().splitlines()
    assert report[0].startswith("20 lines | 0 blank | ")
    assert report[1].startswith("BLEU 100.00 | nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert report[2].startswith("chrF2 100.00 | nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:")
    assert report[3].startswith("TER 0.00 | nrefs:1|case:lc|tok:tercom|norm:no|punct:yes|asian:no|version:")
    assert len(report) == 4


def test_a_reader_that_goes_away_ends_it_quietly(model: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "source", "the dog\n" * 20_000)
    generate = Path(sys.executable).with_name("nmt-generate")
    command = f"'{generate}' --model '{model}' --beam 1 --num-threads 1 --input '{source}' | head -n 1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, check=False, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_scores_are_results_when_the_translations_go_to_a_file(
    generate: Callable[..., None],
    source: Path,
    expected: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reference = write(tmp_path / "reference", "\n".join(expected) + "\n")
    generate("--input", source, "--output", tmp_path / "output", "--reference", reference)
    bleu, chrf, ter = capsys.readouterr().out.splitlines()
    assert bleu.startswith("BLEU 100.00 | nrefs:1")
    assert chrf.startswith("chrF2 100.00 | nrefs:1")
    assert ter.startswith("TER 0.00 | nrefs:1")


def test_a_reference_of_another_length_is_refused_with_both_counts(
    generate: Callable[..., None], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = write(tmp_path / "reference", "eins\nzwei\n")
    output = tmp_path / "output"
    error = fails(capsys, lambda: generate("--input", source, "--output", output, "--reference", reference))
    assert "must have the same number of lines, but have 20 and 2" in error
    assert not output.exists()


@pytest.mark.parametrize(
    ("too_long", "fault"),
    [
        ("split", "they were split and their parts translated apart"),
        ("truncate", "their last pieces were left out"),
    ],
)
def test_a_source_that_is_too_long_is_named(
    generate: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    too_long: str,
    fault: str,
) -> None:
    source = write(tmp_path / "source", "the dog\n" + "the " * 100 + "\n")
    generate("--input", source, "--output", tmp_path / "output", "--too-long", too_long)
    warning, summary = capsys.readouterr().err.splitlines()
    assert warning == f"nmt-generate: warning: 1 of 2 lines: longer than the model takes, so {fault} (line 2)"
    assert summary.startswith("2 lines | 0 blank")


@pytest.mark.parametrize("name", ["input", "reference"])
def test_invalid_utf8_is_named_by_file_and_line(
    generate: Callable[..., None], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    broken = write(tmp_path / "broken", b"a dog\n" * 2 + b"a \xff cat\n" + b"a dog\n" * 17)
    other = [] if name == "input" else ["--input", source]
    output = tmp_path / "output"
    error = fails(capsys, lambda: generate(f"--{name}", broken, *other, "--output", output))
    assert f"{broken}, line 3: must be UTF-8" in error
    assert not output.exists()


def test_invalid_utf8_in_a_stream_leaves_no_output(model: Path, tmp_path: Path) -> None:
    command = [
        Path(sys.executable).with_name("nmt-generate"),
        "--model",
        model,
        "--output",
        tmp_path / "output",
    ]
    command += ["--buffer-size", "1", "--num-threads", "1"]
    done = subprocess.run(
        command, input=b"a dog\na \xff cat\n", capture_output=True, check=False, timeout=120
    )
    assert done.returncode == 2
    assert done.stderr.decode().startswith("nmt-generate: error: <stdin>, line 2: must be UTF-8")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--input", "nothing.en"), "nothing.en must exist, but there is no such file"),
        (("--input", "empty.en"), "empty.en must hold one sentence per line, but is empty"),
        (
            ("--input", "source.en", "--reference", "nothing.de"),
            "nothing.de must exist, but there is no such file",
        ),
        (("--input", "source.en", "--output", "nowhere/output"), "`output` must be in a folder that exists"),
        (("--input", "source.en", "--output", "source.en"), "`output` must be another file than `input`"),
        (("--input", "source.en", "--nbest", 3), "`nbest` must be from 1 to beam (2), but is 3"),
        (("--input", "source.en", "--max-tokens", 0), "`max-tokens` must be at least 1, but is 0"),
        (("--input", "source.en", "--bean", 3), "Perhaps you meant `--beam`?"),
        (
            ("--input", "source.en", "--model", "."),
            "`.` must be a model folder, but has no model.safetensors",
        ),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    generate: Callable[..., None],
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[object, ...],
    text: str,
) -> None:
    write(tmp_path / "empty.en", "")
    monkeypatch.chdir(tmp_path)
    error = fails(capsys, lambda: generate(*arguments))
    assert error.startswith("nmt-generate: error: ")
    assert text in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.en", "source.en"]


def test_an_output_that_exists_is_replaced_at_the_end_alone(
    generate: Callable[..., None], source: Path, expected: list[str], tmp_path: Path
) -> None:
    output = write(tmp_path / "output", "old\n")
    generate("--input", source, "--output", output)
    assert read_lines(output) == expected


def test_a_reference_to_score_against_may_be_longer_than_the_model(
    generate: Callable[..., None], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = write(tmp_path / "reference", "the dog sees " * 40 + "\n" + "the cat\n" * (len(LINES) - 1))
    generate("--input", source, "--output", tmp_path / "output", "--reference", reference)
    assert "BLEU" in capsys.readouterr().out


def test_json_lines_hold_text_scores_and_flags(
    generate: Callable[..., None], model: Path, tmp_path: Path
) -> None:
    lines = ["the dog", "", "a 7 cat " * 9]
    source = write(tmp_path / "source", "\n".join(lines) + "\n")
    generate("--input", source, "--output", tmp_path / "output", "--format", "jsonl", "--nbest", 2)
    records = [json.loads(line) for line in read_lines(tmp_path / "output")]
    assert [record["id"] for record in records] == [0, 1, 2]
    assert [record["source"] for record in records] == lines
    expected = Translator.load(model).translate_with_scores(lines, beam=2, nbest=2)
    for record, hypotheses in zip(records, expected, strict=True):
        assert [x["text"] for x in record["hypotheses"]] == [x.text for x in hypotheses]
        for written, hypothesis in zip(record["hypotheses"], hypotheses, strict=True):
            assert written["score"] == pytest.approx(hypothesis.score, abs=1e-6)
            assert written["token_scores"] == pytest.approx(hypothesis.token_scores, abs=1e-4)
            assert len(written["tokens"]) + 1 == len(written["token_scores"])
    assert (records[1]["flags"], records[1]["signals"]) == ([], None)
    assert {"too_long", "missing_number"} <= set(records[2]["flags"])
    assert records[0]["signals"]["low_confidence"] == pytest.approx(
        -sum(expected[0][0].token_scores) / len(expected[0][0].token_scores), abs=1e-4
    )


def test_integers_where_the_processor_has_no_products_of_them(
    generate: Callable[..., None],
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(int8, "is_available", lambda: False)
    output = tmp_path / "output"
    message = fails(capsys, lambda: generate("--input", source, "--output", output, "--precision", "int8"))
    assert "`precision` int8 must have a processor that multiplies 8-bit integers" in message
    assert not output.exists()


def test_a_long_line_may_be_an_error_that_leaves_no_output(
    generate: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "source", "the dog\n" * 3 + "the " * 100 + "\n")
    output = tmp_path / "output"
    arguments = ("--input", source, "--output", output, "--too-long", "error", "--buffer-size", 2)
    error = fails(capsys, lambda: generate(*arguments))
    assert "Line 4 must have at most 23 pieces, as many as the model takes, but has" in error
    assert not output.exists()


def test_a_baseline_is_compared_in_words(
    generate: Callable[..., None],
    source: Path,
    expected: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reference = write(tmp_path / "reference", "\n".join(expected) + "\n")
    baseline = write(tmp_path / "baseline", "something else altogether, and longer\n" * len(expected))
    files = ("--input", source, "--output", tmp_path / "output", "--reference", reference)
    generate(*files, "--baseline", baseline)
    lines = capsys.readouterr().out.splitlines()
    assert lines[3] == f"against {baseline}, by paired bootstrap:"
    assert [line.split()[0] for line in lines[4:7]] == ["BLEU", "chrF2", "TER"]
    assert lines[7].startswith("Better than the baseline, and not by chance")
    generate(*files, "--baseline", reference)
    assert capsys.readouterr().out.splitlines()[-1] == "The two are equal."


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pairs = {line: line.replace("the", "a") for line in LINES[:3]}
    return write_learned_model(tmp_path_factory.mktemp("other") / "model", pairs)


def test_a_baseline_may_be_a_model_which_translates_in_the_same_way(
    generate: Callable[..., None],
    other_model: Path,
    source: Path,
    expected: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reference = write(tmp_path / "reference", "\n".join(expected) + "\n")
    translations = Translator.load(other_model).translate(LINES, beam=2)
    baseline = write(tmp_path / "baseline", "\n".join(translations) + "\n")
    files = ("--output", tmp_path / "output", "--reference", reference)
    generate("--input", source, *files, "--baseline", baseline)
    wanted = capsys.readouterr().out.replace(str(baseline), str(other_model))
    generate("--input", source, *files, "--baseline", other_model)
    assert capsys.readouterr().out == wanted
    with source.open() as stream:  # a stream can be read but once
        monkeypatch.setattr("sys.stdin", stream)
        generate(*files, "--baseline", other_model, "--buffer-size", 3)
    assert capsys.readouterr().out == wanted
    assert read_lines(tmp_path / "output") == expected


@pytest.mark.parametrize("option", [("--prefix-size", 1), ("--input-is-pieces",)])
def test_a_model_as_baseline_is_not_given_pieces_of_another(
    generate: Callable[..., None],
    other_model: Path,
    source: Path,
    capsys: pytest.CaptureFixture[str],
    option: tuple[object, ...],
) -> None:
    arguments = ("--input", source, "--reference", source, "--baseline", other_model, *option)
    assert "`baseline` must be a file of translations with" in fails(capsys, lambda: generate(*arguments))


def test_a_folder_that_is_no_model_is_refused_as_baseline_and_as_input(
    generate: Callable[..., None], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--input", source, "--reference", source, "--baseline", tmp_path)
    assert f"{tmp_path}" in fails(capsys, lambda: generate(*arguments))
    error = fails(capsys, lambda: generate("--input", tmp_path))
    assert f"{tmp_path} must be a file of text, but is a folder." in error


def test_minimum_bayes_risk_from_the_command_line(
    generate: Callable[..., None], model: Path, source: Path, tmp_path: Path
) -> None:
    options = ("--mbr", "bleu", "--samples", 8, "--mbr-over", "both", "--seed", 5, "--nbest", 2)
    generate("--input", source, "--output", tmp_path / "output", *options)
    nbest = Translator.load(model).translate_with_scores(
        LINES, mbr="bleu", samples=8, mbr_over="both", seed=5, beam=2, nbest=2
    )
    texts = [[x.text for x in found] + [""] * (2 - len(found)) for found in nbest]
    assert read_lines(tmp_path / "output") == [text for of_line in texts for text in of_line]


MODES = [(), ("--format", "fairseq"), ("--format", "jsonl"), ("--prefix-size", "1"), ("--input-is-pieces",)]
MODES += [("--score-reference", "--format", "fairseq"), ("--score-reference", "--format", "jsonl")]


@pytest.mark.parametrize("mode", MODES, ids=" ".join)
@pytest.mark.parametrize("num_references", [2, 30])
def test_unequal_counts_are_said_in_every_mode(
    generate: Callable[..., None],
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    mode: tuple[str, ...],
    num_references: int,
) -> None:
    reference = write(tmp_path / "reference", "the dog\n" * num_references)
    text = f"must have the same number of lines, but have 20 and {num_references}"
    output = tmp_path / "output"
    arguments = ("--reference", reference, "--output", output, "--buffer-size", 3, *mode)
    assert text in fails(capsys, lambda: generate("--input", source, *arguments))
    assert not output.exists()
    # A stream shows its length at the end; what was translated is kept.
    with source.open() as stream:
        monkeypatch.setattr("sys.stdin", stream)
        with pytest.raises(SystemExit):
            generate(*arguments)
    assert f"<stdin> and {reference} {text}" in capsys.readouterr().err
    assert output.exists()


@pytest.mark.parametrize("num_baseline", [2, 30])
def test_unequal_counts_of_a_baseline_are_said(
    generate: Callable[..., None],
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    num_baseline: int,
) -> None:
    reference = write(tmp_path / "reference", "the dog\n" * len(LINES))
    baseline = write(tmp_path / "baseline", "the dog\n" * num_baseline)
    arguments = ("--reference", reference, "--baseline", baseline, "--output", tmp_path / "output")
    text = f"must have the same number of lines, but have 20 and {num_baseline}"
    assert f"{source} and {baseline} {text}" in fails(capsys, lambda: generate("--input", source, *arguments))
    with source.open() as stream:
        monkeypatch.setattr("sys.stdin", stream)
        assert f"{reference} and {baseline} {text}" in fails(capsys, lambda: generate(*arguments))


def test_a_line_is_answered_before_the_next_one_is_read(model: Path, expected: list[str]) -> None:
    command = [Path(sys.executable).with_name("nmt-generate"), "--model", model, "--beam", "2"]
    command += ["--num-threads", "1", "--device", "cpu", "--buffer-size", "1"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        for line, translation in list(zip(LINES, expected, strict=True))[:3]:
            process.stdin.write(line.encode() + b"\n")
            process.stdin.flush()
            assert process.stdout.readline() == translation.encode() + b"\n"
        process.stdin.close()
        assert process.stdout.read() == b""
        assert process.wait(timeout=60) == 0


@pytest.mark.parametrize("is_terminal", [True, False])
def test_what_is_typed_is_answered_line_by_line(monkeypatch: pytest.MonkeyPatch, is_terminal: bool) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.setattr("sys.stdin.isatty", lambda: is_terminal)
    assert _buffer_size(GenerateOptions(model="m")) == (1 if is_terminal else 10_000)
    assert _buffer_size(GenerateOptions(model="m", buffer_size=7)) == 7
    assert _buffer_size(GenerateOptions(model="m", input=Path("x"))) == 10_000


@pytest.mark.parametrize("arguments", [(), ("--reference",), ("--format", "jsonl")], ids=" ".join)
def test_memory_does_not_grow_with_the_number_of_lines(
    generate: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
) -> None:
    def instantly(
        _: Generator, source: torch.Tensor, prefixes: object = None, **options: object
    ) -> list[list[Hypothesis]]:
        assert prefixes is None
        return [[Hypothesis(row[:3], -1.0, [-1.0] * 4)] for row in source.tolist()]

    monkeypatch.setattr(Generator, "generate", instantly)
    monkeypatch.setattr("nmt.data.text_lines._CHUNK_BYTES", 4096)  # a file is read ahead so far

    def peak(num_lines: int) -> int:
        source = write(tmp_path / "source", "the old dog sees a red bird\n" * num_lines)
        files = ("--input", source, "--output", tmp_path / "output")
        values = (source,) if arguments == ("--reference",) else ()
        gc.collect()
        tracemalloc.start()
        generate(*files, "--buffer-size", 100, *arguments, *values)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(read_lines(tmp_path / "output")) == num_lines
        return most

    peak(200)  # what is imported and cached once
    few, many = peak(400), peak(2_400)
    # To keep a string a line would take 160 kB for 2,000 lines more. When garbage is collected varies.
    assert many < few + 110_000
