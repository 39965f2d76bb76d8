"""Names from other toolkits: every one is tried on the command that it is for, and its answer must be true."""

import importlib
from typing import Any

import pytest

from nmt.cli.options import (
    AverageOptions,
    ExportOptions,
    GenerateOptions,
    ImportOptions,
    PlotOptions,
    ScoreOptions,
)
from nmt.config.fields import list_options
from nmt.config.other_names import answer, flags_in, read_table
from nmt.config.values import suggest
from nmt.data.options import PreprocessOptions
from nmt.errors import UserError
from nmt.options import TrainConfig, train_config
from nmt.translation.options import TranslationOptions
from nmt.vision.options import ImageClassificationOptions

TRANSLATION, IMAGES = TrainConfig[TranslationOptions], TrainConfig[ImageClassificationOptions]
OPTIONS: dict[str, list[Any]] = {
    "nmt-train": [TRANSLATION, IMAGES],
    "nmt-validate": [TRANSLATION, IMAGES],
    "nmt-preprocess": [PreprocessOptions],
    "nmt-generate": [GenerateOptions],
    "nmt-score": [ScoreOptions],
    "nmt-average": [AverageOptions],
    "nmt-convert": [ExportOptions, ImportOptions],
    "nmt-plot": [PlotOptions],
}
NAMES = [(prog, name) for prog, answers in read_table().items() for name in answers]


def flags_of(type_: Any, prog: str) -> set[str]:
    own = {option.flag for option in list_options(type_) if not option.is_positional}
    return own | {"--config"} | ({"--split"} if prog == "nmt-validate" else set())


def complaint(prog: str, argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    main = importlib.import_module(prog.replace("nmt-", "nmt.cli.")).main
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith(f"{prog}: error: ")
    return said


def test_the_table_has_every_command() -> None:
    assert read_table().keys() == OPTIONS.keys()
    assert len(NAMES) > 900


@pytest.mark.parametrize("prog", OPTIONS)
def test_each_answer_names_flags_that_the_command_has(prog: str) -> None:
    tasks = [flags_of(type_, prog) for type_ in OPTIONS[prog]]
    for name, answers in read_table()[prog].items():
        for text in answers:
            known = any(flags_in(text) <= flags for flags in tasks)
            assert known, f"{prog} --{name}: {text} names {flags_in(text) - set().union(*tasks)}"
            assert text.endswith("."), f"{prog} --{name}: {text}"


@pytest.mark.parametrize("prog", OPTIONS)
def test_each_answer_to_a_name_is_the_first_that_fits_for_some_task(prog: str) -> None:
    """Otherwise nobody gets it, and someone gets the answer for another task."""
    tasks = [flags_of(type_, prog) for type_ in OPTIONS[prog]]
    for name, answers in read_table()[prog].items():
        fitting = [next((text for text in answers if flags_in(text) <= flags), None) for flags in tasks]
        assert len(answers) == 1 or set(answers) <= set(fitting), f"{prog} --{name}: {answers}"


@pytest.mark.parametrize("prog", OPTIONS)
def test_no_name_is_an_option_of_the_command_itself(prog: str) -> None:
    all_flags = set.intersection(*(flags_of(type_, prog) for type_ in OPTIONS[prog]))
    assert not all_flags & {f"--{name}" for name in read_table()[prog]}


@pytest.mark.parametrize("prog", [prog for prog in OPTIONS if prog != "nmt-validate"])
def test_every_name_that_is_tried_is_answered(prog: str, capsys: pytest.CaptureFixture[str]) -> None:
    start = ["--to", "ctranslate2", "x"] if prog == "nmt-convert" else []
    for name, answers in read_table()[prog].items():
        flags = flags_of(OPTIONS[prog][0], prog)
        fitting = [text for text in answers if flags_in(text) <= flags]
        if not fitting or f"--{name}" in flags:
            continue
        said = complaint(prog, [*start, f"--{name}", "1"], capsys)
        assert said == f"{prog}: error: `--{name}` is not a known option. {fitting[0]} See `{prog} --help`.\n"


def test_spellings_with_underscores_capitals_and_one_hyphen_are_the_same_names(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for written in ("--learning_rate", "-learning_rate", "--Learning-Rate", "--learning-rate=3"):
        assert "Here it is `--lr`." in complaint("nmt-train", ["d", written], capsys)


def test_the_answer_depends_on_the_task(capsys: pytest.CaptureFixture[str]) -> None:
    assert "`--dropout`" in complaint("nmt-train", ["--drop", "0.1"], capsys)
    images = complaint("nmt-train", ["--task", "image_classification", "--drop", "0.1"], capsys)
    assert "`--model-args drop_rate=0.1`" in images


def test_keys_of_files_and_keywords_are_answered_without_hyphens() -> None:
    with pytest.raises(UserError, match=r"`learning_rate` is not a known key\. Here it is `lr`\."):
        train_config(data="d", save_dir="s", learning_rate=0.1)


def test_only_what_is_near_is_suggested() -> None:
    known = ["--help", "--dry-run", "--max-update", "--warmup-updates", "--warmup-epochs", "--lr"]
    assert suggest("--max-updates", known) == " Perhaps you meant `--max-update`?"
    assert suggest("--warmup", known) == " Perhaps you meant `--warmup-updates` or `--warmup-epochs`?"
    for name in ("--bpe", "--sync-bn", "--l", "--fp16", "--criterion", "--", ""):
        assert suggest(name, known) == ""


def test_a_command_without_a_table_has_no_answers() -> None:
    assert answer("nmt-x", "learning-rate", {"--lr"}) == ""
