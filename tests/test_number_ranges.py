"""Numbers of every size, for every option that takes one: taken or refused in a line, never a traceback."""

import io
import math
import types
import typing
from collections.abc import Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_translation_model import write_tiny_model

from nmt.cli.generate import main as generate
from nmt.cli.options import AverageOptions, ExportOptions, GenerateOptions, ScoreOptions
from nmt.config.fields import MISSING, Option, list_options
from nmt.config.mapping import check_options, parse_command
from nmt.config.ranges import ANY, Limits, check_numbers, check_ranges, limits
from nmt.data.options import PreprocessOptions
from nmt.errors import UserError
from nmt.generation.options import DecodingOptions
from nmt.options import TrainConfig
from nmt.translation.options import TranslationOptions
from nmt.vision.options import ImageClassificationOptions

TYPES: dict[str, Any] = {
    "nmt-preprocess": PreprocessOptions,
    "nmt-train": TrainConfig[TranslationOptions],
    "nmt-train of images": TrainConfig[ImageClassificationOptions],
    "nmt-generate": GenerateOptions,
    "nmt-score": ScoreOptions,
    "nmt-average": AverageOptions,
    "nmt-convert": ExportOptions,
}
WHOLE = [
    0,
    1,
    -1,
    3,
    10**5,
    2**31 - 1,
    2**31,
    -(2**31),
    2**32,
    2**63 - 1,
    2**63,
    -(2**63) - 1,
    10**10,
    10**400,
]
REAL = [
    *(0.0, -0.0, 0.5, -1.0, 5e-324, 1e-300, 1e-45, 1e-40, 1e30, 1e31, 3.5e38, 1e308, -1e30, -1e300),
    *(300.0, -300.0, math.inf, -math.inf, math.nan),
]


def kinds(hint: Any) -> set[type]:
    """Return which kinds of number an option takes."""
    if hint in (int, float):
        return {hint}
    if typing.get_origin(hint) in (typing.Union, types.UnionType, tuple, typing.Annotated):
        return set().union(*(kinds(part) for part in typing.get_args(hint)))
    return set()


def number_of_values(hint: Any) -> int:
    arguments = typing.get_args(hint)
    is_pair = typing.get_origin(hint) is tuple and arguments[-1] is not Ellipsis
    return len(arguments) if is_pair else 1


def numeric_options(type_: Any) -> list[Option]:
    return [option for option in list_options(type_) if kinds(option.hint)]


def cases() -> Iterator[tuple[str, Option, float]]:
    for prog, type_ in TYPES.items():
        for option in numeric_options(type_):
            for number in (WHOLE if int in kinds(option.hint) else []) + (
                REAL if float in kinds(option.hint) else []
            ):
                yield prog, option, number


def what_must_be_given(type_: Any) -> list[str]:
    argv: list[str] = []
    for option in list_options(type_):
        if option.default is MISSING:
            argv += ["x", "y"] if option.name == "to" else ["x"] if option.is_positional else []
            if not option.is_positional:
                value = {"to": ["ctranslate2", "d"], "target_lang": ["de"]}.get(option.name, ["en"])
                argv += [option.flag, *value]
    return argv


def test_every_number_of_every_command_is_taken_or_refused_by_its_name() -> None:
    count = 0
    for prog, option, number in cases():
        given_number = [str(number)] * number_of_values(option.hint)
        argv = [option.flag, *given_number, *what_must_be_given(TYPES[prog])]
        try:
            parse_command(TYPES[prog], argv, prog="nmt-x", description="")
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 2000, (prog, option.flag, number)
        count += 1
    assert count > 1000


def test_numbers_are_finite_and_whole_ones_within_32_bits_unless_a_field_says_otherwise() -> None:
    @dataclass(frozen=True)
    class Numbers:
        count: int = 0
        rate: float = 0.0
        pair: tuple[float, float] = (0.0, 0.0)
        seed: int = field(default=0, metadata={"range": ANY})
        share: float = field(default=0.0, metadata={"range": (0, 1)})
        maybe: int | None = None
        on: bool = True
        name: str = "9" * 30

    check_numbers(Numbers(2**31 - 1, -1e30, (1e30, 0), 2**70, 1.0, -(2**31) + 1))
    for numbers, said in (
        (Numbers(count=2**31), "`count` must be at most 2,147,483,647, but is 2,147,483,648."),
        (Numbers(count=-(2**31)), "`count` must be at least -2,147,483,647"),
        (Numbers(rate=math.nan), "`rate` must be at least -1e+30, but is nan."),
        (Numbers(pair=(0.0, math.inf)), "`pair` must be at most 1e+30, but is inf."),
        (Numbers(share=1.5), "`share` must be from 0 to 1, but is 1.5."),
        (
            Numbers(maybe=10**500),
            "`maybe` must be at most 2,147,483,647, but is a number of hundreds of digits.",
        ),
    ):
        with pytest.raises(UserError) as caught:
            check_numbers(numbers)
        assert str(caught.value).startswith(said)
    with pytest.raises(UserError, match=r"`count` must be at least 1, but is 0\."):
        check_ranges(Numbers(), {"count": (1, math.inf)})


def test_limits_say_what_they_hold() -> None:
    for bounds, said, inside, outside in (
        ({"least": 1}, "at least 1", [1, 10**30], [0, -5]),
        ({"least": 0, "below": 1}, "at least 0 and below 1", [0, 0.0, 0.5], [1, -0.1, math.nan]),
        ({"above": 0, "below": 1}, "above 0 and below 1", [0.5, 5e-324], [0.0, 1.0, math.nan]),
        ({"above": 0, "most": 1}, "above 0 and at most 1", [1.0, 0.1], [0.0, 1.1]),
        ({"least": 0.0}, "finite and not negative", [0, 7, 0.0, 1e30], [-1, -1e-9, math.inf, math.nan]),
        ({"above": 0.0}, "above 0 and finite", [1, 1e-9], [0, 0.0, -1.0, math.inf, math.nan]),
    ):
        own = Limits(**bounds)  # type: ignore[arg-type]
        assert str(own) == said
        assert all(map(own.hold, inside)) and not any(map(own.hold, outside))
    assert limits(least=1, fixed=True) == {"limits": Limits(least=1), "fixed": True}


def nested(options: Any) -> Iterator[Any]:
    """Yield a dataclass of options and those within it."""
    yield options
    for own in fields(options):
        if is_dataclass(value := getattr(options, own.name)):
            yield from nested(value)


@pytest.mark.parametrize("prog", sorted(TYPES.keys() - {"nmt-convert"}))  # which has none
def test_a_number_beyond_its_limits_is_refused_by_their_rule(prog: str) -> None:
    more = {
        "nmt-preprocess": ["--trainpref", "x", "--target-lang", "fr"],
        "nmt-train of images": ["--val-fraction", "0.1"],
        "nmt-score": ["--reference", "x"],
    }
    argv = [*what_must_be_given(TYPES[prog]), *more.get(prog, [])]
    options = parse_command(TYPES[prog], argv, prog="nmt-x", description="")
    count = 0
    for part in nested(options):
        for own in fields(part):
            if (rule := own.metadata.get("limits")) is None:
                continue
            lowest = rule.least if rule.above is None else rule.above
            number = -1 if lowest == 0 else lowest - 1
            bad = (number, number) if isinstance(getattr(part, own.name), tuple) else number
            flag = own.name.replace("_", "-")
            with pytest.raises(UserError, match=f"^`{flag}` must be {rule}, but (is|are) "):
                check_options(replace(part, **{own.name: bad}))
            count += 1
    assert count > 0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    (folder / "in").write_text("the dog runs\n")
    return write_tiny_model(folder / "model")


SEARCH = numeric_options(DecodingOptions)
NEEDS = {
    "sampling_topk": ["--sampling"],
    "sampling_topp": ["--sampling"],
    "seed": ["--sampling"],
    "samples": ["--mbr", "chrf"],
}


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_what_is_taken_is_computed(data: st.DataObject, model: Path, one_thread: None) -> None:
    """Whatever the number: a translation, or a line that refuses it; the model is not blamed."""
    option = data.draw(st.sampled_from(SEARCH), label="option")
    whole, real = int in kinds(option.hint), float in kinds(option.hint)
    numbers: list[float] = (WHOLE if whole else []) + (REAL if real else [])
    number = data.draw(st.sampled_from(numbers), label="number")
    argv = ["--model", str(model), "--input", str(model.parent / "in"), "--output", str(model.parent / "out")]
    said = io.StringIO()
    with redirect_stderr(said):
        try:
            generate([*argv, "--device", "cpu", *NEEDS.get(option.name, []), option.flag, str(number)])
        except SystemExit as end:
            assert end.code == 2 and said.getvalue().count("\n") == 1
    assert "not a number" not in said.getvalue()


@pytest.mark.parametrize("name", ["lr", "clip-norm"])
def test_what_is_nothing_in_float32_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"`{name}` must be from 1e-30 to 1e"):
        parse_command(
            TrainConfig[TranslationOptions],
            ["data", "--save-dir", "r", f"--{name}", "1e-46"],
            prog="",
            description="",
        )
