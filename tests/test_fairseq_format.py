"""nmt-generate with fairseq's lines, with given pieces, prefixes and references, and with several models."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.table_model import EOS, PAD, UNK, A, B, TableModel, from_table, random_table

from nmt.cli.generate import main
from nmt.generation.generator import Generator
from nmt.generation.options import DecodingOptions
from nmt.generation.rules import forbid_repeats_
from nmt.translation.translator import Translator

pytestmark = pytest.mark.usefixtures("one_thread")

LINES = ["the old dog", "", "a cat \u2603", "the bird sees the tree"]
REFERENCES = ["the cat", "a", "the \u2603", "a dog sings"]


@pytest.fixture
def run(model: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Run nmt-generate on LINES; return what it writes."""
    (tmp_path / "source").write_text("\n".join(LINES) + "\n")
    (tmp_path / "reference").write_text("\n".join(REFERENCES) + "\n")

    def command(*arguments: object, name: str = "output", named: str = str(model)) -> list[str]:
        fixed = [
            "--model",
            named,
            "--input",
            tmp_path / "source",
            "--output",
            tmp_path / name,
            "--device",
            "cpu",
        ]
        main([*map(str, fixed), *map(str, arguments)])
        return (tmp_path / name).read_bytes().decode().removesuffix("\n").split("\n")

    return command


def test_the_lines_of_fairseq(run: Callable[..., list[str]], model: Path, tmp_path: Path) -> None:
    arguments = ("--beam", 3, "--nbest", 2)
    lines = run("--format", "fairseq", "--reference", tmp_path / "reference", *arguments)
    kinds = [re.match(r"([A-Z])-(\d+)\t", line) for line in lines]
    hypotheses = "HDP" * 2
    expected = [
        (kind, str(number))
        for number in range(4)
        for kind in "ST" + ("HDP" if number == 1 else hypotheses)  # a blank line has one empty hypothesis
    ]
    assert [match.groups() for match in kinds if match] == expected
    translations = Translator.load(model).translate_lines(LINES, DecodingOptions(beam=3, nbest=2))
    texts = [line.split("\t")[2] for line in lines if line.startswith("D-")]
    assert texts == [text for x in translations for text in (x.texts or [""])]
    for text_line, score_line in zip(
        [line for line in lines if line.startswith("H-")],
        [line for line in lines if line.startswith("P-")],
        strict=True,
    ):
        score = float(text_line.split("\t")[1])
        token_scores = [float(x) for x in score_line.split("\t")[1].split(" ")]
        assert len(token_scores) == len(text_line.split("\t")[2].split()) + 1
        assert sum(token_scores) / len(token_scores) == pytest.approx(score, abs=1e-4)


def test_pieces_are_read_as_they_are(run: Callable[..., list[str]], tmp_path: Path) -> None:
    whole = run("--format", "fairseq", "--reference", tmp_path / "reference")
    for kind, name in (("S", "source"), ("T", "reference")):
        pieces = [line.split("\t")[1] for line in whole if line.startswith(f"{kind}-")]
        (tmp_path / name).write_text("\n".join(pieces) + "\n")
    again = run("--format", "fairseq", "--reference", tmp_path / "reference", "--input-is-pieces")
    assert again == whole


def test_the_model_scores_its_own_translations_as_it_found_them(
    run: Callable[..., list[str]], tmp_path: Path
) -> None:
    found = run("--format", "fairseq", "--beam", 2, "--max-len-a", 1)
    for kind, name in (("S", "source"), ("H", "reference")):
        pieces = [line.split("\t")[-1] for line in found if line.startswith(f"{kind}-")]
        (tmp_path / name).write_text("\n".join(pieces) + "\n")
    arguments = ("--input-is-pieces", "--score-reference", "--reference", tmp_path / "reference")
    scored = run("--format", "fairseq", *arguments)

    def numbers(lines: list[str]) -> list[float]:
        return [float(x) for line in lines if line[0] == "P" for x in line.split("\t")[1].split(" ")]

    assert numbers(scored) == pytest.approx(numbers(found), abs=2e-4)


def test_translations_begin_with_the_reference(run: Callable[..., list[str]], tmp_path: Path) -> None:
    arguments = ("--reference", tmp_path / "reference", "--prefix-size", 2, "--beam", 3)
    lines = run("--format", "fairseq", *arguments)
    hypotheses = [line.split("\t")[2].split(" ") for line in lines if line.startswith("H-")]
    references = [line.split("\t")[1].split(" ") for line in lines if line.startswith("T-")]
    for number, (hypothesis, reference) in enumerate(zip(hypotheses, references, strict=True)):
        if LINES[number]:
            assert hypothesis[:2] == reference[:2]


def test_one_model_twice_is_the_model(run: Callable[..., list[str]], model: Path) -> None:
    assert run(named=f"{model}:{model}") == run(name="once")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--prefix-size", 1), "`prefix-size` must have a reference"),
        (("--score-reference", "--format", "fairseq"), "`score-reference` must have a reference"),
        (("--prefix-size", -1), "`prefix-size` must be at least 0"),
        (("--no-repeat-ngram-size", -1), "`no-repeat-ngram-size` must be at least 0"),
    ],
)
def test_what_cannot_be_done_is_said(
    run: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[object, ...],
    text: str,
) -> None:
    with pytest.raises(SystemExit):
        run(*arguments)
    assert text in capsys.readouterr().err


def search(options: DecodingOptions, model: TableModel) -> Generator:
    return Generator([model], options, pad_id=PAD, eos_id=EOS, unk_id=UNK)


def test_repeats_are_those_of_tokens_so_far() -> None:
    tokens = torch.tensor([[[A, B, A], [A, A, B]]])
    log_probs = torch.zeros(1, 2, 6)
    forbid_repeats_(log_probs, tokens, size=2)
    assert (log_probs == -math.inf).nonzero().tolist() == [[0, 0, B]]  # A B again; B was followed by nothing
    log_probs = torch.zeros(1, 2, 6)
    forbid_repeats_(log_probs, tokens, size=4)
    assert not log_probs.any()
    forbid_repeats_(log_probs, tokens, size=1)
    assert (log_probs == -math.inf).nonzero()[:, 2].tolist() == [A, B, A, B]


def test_a_forbidden_repeat_is_replaced_by_the_next_best() -> None:
    table = from_table({(A,) * n: {A: 0.9, EOS: 0.1} for n in range(9)})
    options = DecodingOptions(beam=1, no_repeat_ngram_size=2, max_len_a=0, max_len_b=8)
    ((hypothesis,),) = search(options, TableModel(table)).generate(torch.tensor([[A, EOS]]))
    assert hypothesis.tokens == [A, A]


def test_forced_tokens_keep_the_models_scores_and_go_before_other_rules() -> None:
    table = from_table({(): {A: 0.7, B: 0.2, EOS: 0.1}, (B,): {A: 0.6, B: 0.3, EOS: 0.1}})
    options = DecodingOptions(beam=2, nbest=2, min_len=3, no_repeat_ngram_size=1, max_len_a=0, max_len_b=6)
    prefixes = torch.tensor([[B, B, EOS], [B, EOS, PAD]])
    results = search(options, TableModel(table)).generate(torch.tensor([[A, EOS], [B, EOS]]), prefixes)
    for nbest, tokens, probabilities in zip(
        results, ([B, B], [B]), ([0.2, 0.3, 1.0], [0.2, 0.1]), strict=True
    ):
        assert [x.tokens for x in nbest] == [tokens, tokens]  # the whole translation is given
        for hypothesis in nbest:
            assert hypothesis.token_scores == pytest.approx([math.log(p) for p in probabilities])


def test_a_shorter_prefix_leaves_the_rest_free() -> None:
    table = random_table(3, 8)
    options = DecodingOptions(beam=3, max_len_a=0, max_len_b=5)
    source = torch.tensor([[4, EOS], [5, EOS]])
    generator = search(options, TableModel(table))
    forced = generator.generate(source, torch.tensor([[6, 7], [PAD, PAD]]))
    assert forced[0][0].tokens[:2] == [6, 7]
    assert forced[1] == generator.generate(source)[1]
