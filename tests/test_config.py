"""Options: text to values and back, the order of precedence, and what is refused."""

import dataclasses
import errno
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nmt
from nmt.config.fields import list_options
from nmt.config.mapping import (
    Positional,
    changed_fixed_options,
    from_mapping,
    parse_command,
    peek,
    read_yaml,
    to_mapping,
    write_yaml,
)
from nmt.errors import UserError

T = TypeVar("T")

SIZES = {"small": {"embed_dim": 64, "num_layers": 2}, "large": {"embed_dim": 1024}}


@dataclass(frozen=True)
class ModelOptions:
    arch: str = field(default="base", metadata={"presets": {"base": {}, **SIZES}})
    """Named sizes."""
    embed_dim: int = 512
    """Width."""
    num_layers: int = 6
    """Depth."""

    def check(self) -> None:
        if self.embed_dim % 2:
            raise UserError(f"`embed-dim` must be even, but is {self.embed_dim}.")


@dataclass(frozen=True)
class WindowOptions:
    window: int = 100
    max_tokens: int = 4096


@dataclass(frozen=True)
class TaskOptions:
    data: Positional[Path]
    """The data directory."""
    model: ModelOptions
    betas: tuple[float, float] = (0.9, 0.98)
    names: tuple[str, ...] = ()
    norm: Literal["pre", "post"] = "post"
    share: bool = False
    """Share the embeddings."""


@dataclass(frozen=True)
class RunOptions(Generic[T]):
    task_options: T
    save_dir: Path
    """The folder of the run."""
    windows: WindowOptions = field(default_factory=lambda: WindowOptions(window=7))
    lr: float = 1e-4
    patience: int | None = None
    note: str | None = None
    label: str = "none"


RUN = RunOptions[TaskOptions]
REQUIRED = {"data": "d", "save-dir": "s"}


def make(**changes: Any) -> RunOptions[TaskOptions]:
    mapping = REQUIRED | {name.replace("_", "-"): value for name, value in changes.items()}
    return from_mapping(RUN, mapping, where="run.yaml")


def parse(*argv: str) -> RunOptions[TaskOptions]:
    return parse_command(RUN, argv, prog="nmt-x", description="Try it.")


def complaint(text: str, tmp_path: Path) -> str:
    """Return what is said of a configuration file."""
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        parse("d", "--save-dir", "s", "--config", str(path))
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_text_becomes_values_of_the_fields_types() -> None:
    run = make(
        lr="5e-4",
        max_tokens="4096",
        share="Yes",
        norm="pre",
        betas=["0.8", "1"],
        note="null",
        patience="null",
    )
    assert run.lr == 5e-4
    assert run.windows == WindowOptions(window=7, max_tokens=4096)
    assert run.task_options.share is True
    assert run.task_options.norm == "pre"
    assert run.task_options.betas == (0.8, 1.0)
    assert run.note == "null"
    assert run.patience is None
    assert run.save_dir == Path("s")


@pytest.mark.parametrize("word, value", [("true", True), ("ON", True), ("No", False), ("off", False)])
def test_booleans_are_words_in_any_case(word: str, value: bool) -> None:
    assert make(share=word).task_options.share is value


def test_underscored_keys_are_read_and_hyphened_ones_written() -> None:
    run = from_mapping(RUN, REQUIRED | {"max_tokens": "5"}, where="x")
    assert run.windows.max_tokens == 5
    assert to_mapping(run)["max-tokens"] == "5"


def test_values_of_the_right_type_are_taken_as_they_are() -> None:
    run = make(lr=1, betas=(0.1, 0.2), save_dir=Path("p"), share=True)
    assert (run.lr, run.task_options.betas, run.save_dir) == (1.0, (0.1, 0.2), Path("p"))


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"lr": "fast"}, "run.yaml: `lr` must be a number, but is 'fast'."),
        ({"lr": None}, "run.yaml: `lr` must be a number, but is empty."),
        ({"lr": True}, "run.yaml: `lr` must be a number, but is True."),
        ({"max_tokens": "4096.5"}, "`max-tokens` must be a whole number, but is '4096.5'."),
        ({"max_tokens": ["1"]}, "`max-tokens` must be a whole number, but is ['1']."),
        ({"share": "1"}, "`share` must be true or false, but is '1'."),
        ({"norm": "prae"}, "`norm` must be one of pre, post, but is 'prae'. Perhaps you meant `pre`?"),
        ({"betas": "0.9"}, "`betas` must be a list such as [a, b], but is '0.9'."),
        ({"betas": ["0.9"]}, "`betas` must be a list of 2, but is ['0.9']."),
        ({"betas": ["0.9", "x"]}, "`betas` must be a list, each item a number, but is ['0.9', 'x']."),
        ({"label": None}, "`label` must be text (in quotes where it looks empty), but is empty."),
        ({"patiance": "3"}, "`patiance` is not a known key. Perhaps you meant `patience`?"),
        ({"zzz": "3"}, "`zzz` is not a known key. The keys are data, arch, embed-dim,"),
        (
            {"arch": "smal"},
            "`arch` must be one of base, small, large, but is 'smal'. Perhaps you meant `small`?",
        ),
        ({"embed_dim": "3"}, "run.yaml: `embed-dim` must be even, but is 3."),
    ],
)
def test_a_wrong_value_is_refused_with_file_and_key(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError) as caught:
        make(**changes)
    assert str(caught.value).startswith("run.yaml: ")
    assert text in str(caught.value)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(UserError, match=r"run\.yaml: `save-dir` must be given"):
        from_mapping(RUN, {"data": "d"}, where="run.yaml")


def test_a_key_in_both_spellings_is_refused() -> None:
    with pytest.raises(UserError, match="`max-tokens` must be given once"):
        from_mapping(RUN, REQUIRED | {"max-tokens": "1", "max_tokens": "1"}, where="x")


finite = st.floats(-1e30, 1e30)
whole = st.integers(-(2**31) + 2, 2**31 - 1)
paths = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])).map(Path)
texts = st.text(st.characters(exclude_categories=["Cs"]))  # files cannot hold lone surrogates
runs = st.builds(
    RunOptions,
    task_options=st.builds(
        TaskOptions,
        data=paths,
        model=st.builds(
            ModelOptions,
            arch=st.sampled_from(["base", *SIZES]),
            embed_dim=whole.map(lambda number: number // 2 * 2),
            num_layers=whole,
        ),
        betas=st.tuples(finite, finite),
        names=st.lists(texts).map(tuple),
        norm=st.sampled_from(["pre", "post"]),
        share=st.booleans(),
    ),
    save_dir=paths,
    windows=st.builds(WindowOptions, window=whole, max_tokens=whole),
    lr=finite,
    patience=st.none() | whole,
    note=st.none() | texts,
    label=texts
    | st.sampled_from(["null", "~", "", "None", "no", "1e3", "a: b", "#", "\x85 ", "\u2028", "- x"]),
)


@given(run=runs)
@settings(max_examples=200, deadline=None)
def test_reading_what_was_written_gives_the_same_options(
    run: RunOptions[TaskOptions], tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert from_mapping(RUN, to_mapping(run), where="memory") == run
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    write_yaml(run, path)
    assert from_mapping(RUN, read_yaml(path), where=str(path)) == run


def test_a_written_file_is_plain_to_read(tmp_path: Path) -> None:
    write_yaml(WindowOptions(), tmp_path / "a.yaml")
    assert (tmp_path / "a.yaml").read_text() == "window: 100\nmax-tokens: 4096\n"
    assert [path.name for path in tmp_path.iterdir()] == ["a.yaml"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_file_that_the_disk_has_no_room_for_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "config.yaml.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError) as caught:
        write_yaml(WindowOptions(), tmp_path / "config.yaml")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "config.yaml"))
    assert list(tmp_path.iterdir()) == []


def test_yaml_values_are_text_lists_of_text_or_none(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("a: 5e-4\nb_c: no\nd: [1, x]\ne:\nf: ''\ng: 'null'\nh: null\ni:\n- 1\n- 2\n")
    assert read_yaml(path) == {
        "a": "5e-4",
        "b-c": "no",
        "d": ["1", "x"],
        "e": None,
        "f": "",
        "g": "null",
        "h": None,
        "i": ["1", "2"],
    }


def test_an_empty_file_sets_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("# only a comment\n")
    assert read_yaml(tmp_path / "a.yaml") == {}


@pytest.mark.parametrize(
    "text, said",
    [
        ("lr: 1\nnote: 'open\n", "line 3: must be YAML"),
        ("lr: 1\n\nlabel: a: b\n", "line 3: must be YAML"),
        ("lr: 1\nlr: 2\n", "line 2: `lr` must be given once"),
        ("max-tokens: 1\nmax_tokens: 2\n", "line 2: `max-tokens` must be given once"),
        ("lr: 1\nmodel:\n  arch: small\n", "line 3: `model` must be one value"),
        ("betas: [[1], 2]\n", "line 1: `betas` must be one value"),
        ("- lr\n", "line 1: must be a line `key: value`"),
        ("just text\n", "line 1: must be a line `key: value`"),
        ("? [a]\n: 1\n", "line 1: the key must be one word"),
        ("lr: 1\n---\nlr: 2\n", "line 2: must be YAML"),
        ("lr: 1\nnote: \x07\n", "line 2: must be YAML"),
        ("betas: &x [*x]\n", "line 1: `betas` must be one value"),
        ("patiance: 1\n", "`patiance` is not a known key. Perhaps you meant `patience`?"),
        ("arch: larg\n", "Perhaps you meant `large`?"),
    ],
)
def test_a_wrong_file_is_refused_with_its_line(text: str, said: str, tmp_path: Path) -> None:
    assert said in complaint(text, tmp_path)


def test_a_file_that_is_not_utf8_is_refused_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"lr: 1\nnote: \xff\n")
    with pytest.raises(UserError, match=r"a\.yaml, line 2: must be UTF-8"):
        read_yaml(tmp_path / "a.yaml")


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        parse("d", "--save-dir", "s", "--config", str(tmp_path / "none.yaml"))


def test_command_line_beats_file_beats_preset_beats_default(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("arch: small\nnum-layers: 3\nlr: 1e-3\ndata: from_file\n")
    run = parse("--config", str(path), "--save-dir", "s", "--lr", "2e-3")
    model = run.task_options.model
    assert model == ModelOptions(arch="small", embed_dim=64, num_layers=3)
    assert run.lr == 2e-3
    assert run.task_options.data == Path("from_file")
    run = parse("there", f"--config={path}", "--save-dir", "s", "--arch=large", "--num-layers", "9")
    assert run.task_options.model == ModelOptions(arch="large", embed_dim=1024, num_layers=9)
    assert run.task_options.data == Path("there")


@dataclass(frozen=True)
class OddTaskOptions:
    train_defaults: ClassVar[dict[str, Any]] = {"window": 7, "max_tokens": 99}
    size: int = 1


@dataclass(frozen=True)
class OddConfig(Generic[T]):
    task_options: T
    batching: WindowOptions = field(default_factory=WindowOptions)


def test_a_task_gives_training_its_own_defaults_which_all_else_beats(tmp_path: Path) -> None:
    config_type = OddConfig[OddTaskOptions]
    assert from_mapping(config_type, {}, where="here").batching == WindowOptions(window=7, max_tokens=99)
    file = tmp_path / "config.yaml"
    file.write_text("window: 8\n")
    found = parse_command(
        config_type, ["--config", str(file), "--max-tokens", "5"], prog="prog", description=""
    )
    assert found.batching == WindowOptions(window=8, max_tokens=5)
    assert found.task_options == OddTaskOptions(size=1)


@dataclass(frozen=True)
class SmallOptions:
    side: int = 3


@dataclass(frozen=True)
class OpenOptions(Generic[T]):
    """Of a model that is filled in, or else the usual one."""

    model: T = field(default_factory=ModelOptions)  # type: ignore[assignment]
    smoothing: float = 0.1


def test_an_open_type_is_that_of_the_default_unless_it_is_filled_in(tmp_path: Path) -> None:
    usual = from_mapping(OpenOptions, {"num-layers": "9", "smoothing": "0.2"}, where="here")
    assert usual == OpenOptions(ModelOptions(num_layers=9), 0.2)
    filled = OpenOptions[SmallOptions]
    found = from_mapping(RunOptions[filled], {"side": "5", "save-dir": "s"}, where="here")
    assert found.task_options == OpenOptions(SmallOptions(side=5))
    write_yaml(found, tmp_path / "run.yaml")
    assert from_mapping(RunOptions[filled], read_yaml(tmp_path / "run.yaml"), where="here") == found
    with pytest.raises(UserError, match="`num-layers` is not a known key"):
        from_mapping(filled, {"num-layers": "9"}, where="here")

    @dataclass(frozen=True)
    class Within:
        inner: OpenOptions  # type: ignore[type-arg]

    assert from_mapping(Within, {"embed-dim": "8"}, where="here").inner.model.embed_dim == 8


def test_a_preset_in_the_mapping_sets_what_is_not_given() -> None:
    assert make(arch="small", embed_dim="8").task_options.model == ModelOptions("small", 8, 2)


def test_flags_are_flat_and_typed() -> None:
    run = parse(
        "d", "--save_dir", "s", "--share", "--betas", "0.1", "0.2", "--names", "a", "b", "--patience=3"
    )
    assert run == RunOptions(
        TaskOptions(Path("d"), ModelOptions(), betas=(0.1, 0.2), names=("a", "b"), share=True),
        Path("s"),
        WindowOptions(window=7),
        patience=3,
    )
    assert parse("d", "--save-dir", "s", "--share", "--no-share").task_options.share is False


def test_a_file_is_changed_back_by_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("share: yes\npatience: 3\n")
    run = parse(
        "d", "--save-dir", "s", "--config", str(tmp_path / "a.yaml"), "--no-share", "--patience", "None"
    )
    assert run.task_options.share is False
    assert run.patience is None


@pytest.mark.parametrize(
    "argv, said",
    [
        (
            ["--patiance", "3", "d", "--save-dir", "s"],
            "`--patiance` is not a known option. Perhaps you meant `--patience`?",
        ),
        (["d", "--save-dri=s"], "`--save-dri` is not a known option. Perhaps you meant `--save-dir`?"),
        (["d", "--save-dir", "s", "--no-shar"], "Perhaps you meant `--no-share`?"),
        (["d", "--save-dir", "s", "--xyzzy"], "`--xyzzy` is not a known option. See `nmt-x --help`."),
        (
            ["d", "--save-dir", "s", "--arch", "smal"],
            "`--arch` must be one of base, small, large, but is 'smal'.",
        ),
        (["d", "--save-dir", "s", "--embed-dim", "3"], "`embed-dim` must be even"),
    ],
)
def test_a_misspelt_option_is_refused_with_the_nearest(argv: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(*argv)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "`DATA` and `--save-dir` must be given, but are missing."),
        (["d"], "`--save-dir` must be given, but is missing."),
        (["--save-dir", "s"], "`DATA` must be given, but is missing."),
        (["d", "e", "--save-dir", "s"], "`nmt-x` takes DATA and options, but 'e' is left over."),
        (["d", "--save-dir", "s", "--lr", "1e-3x"], "`--lr` must be a number, but is '1e-3x'."),
        (["d", "--save-dir", "s", "--lr="], "`--lr` must have a value, but it is empty."),
        (["d", "--save-dir", "s", "--lr"], "`--lr` must have a value, but none follows."),
        (["d", "--save-dir", "--lr", "3"], "`--save-dir` must have a value, but none follows."),
        (["d", "--save-dir", "s", "--config"], "`--config` must have a value, but none follows."),
        (
            ["d", "--save-dir", "s", "--max-tokens", "4k"],
            "`--max-tokens` must be a whole number, but is '4k'.",
        ),
        (
            ["d", "--save-dir", "s", "--norm", "prae"],
            "`--norm` must be one of pre, post, but is 'prae'. Perhaps you meant `pre`?",
        ),
        (
            ["d", "--save-dir", "s", "--betas", "(0.9, 0.98)"],
            "`--betas` must have 2 values with blanks between them, but only '(0.9, 0.98)' follows.",
        ),
        (
            ["d", "--save-dir", "s", "--betas", "0.9", "x"],
            "`--betas` must be a list, each item a number, but is '0.9 x'.",
        ),
        (
            ["d", "--save-dir", "s", "--share", "false"],
            "`--share` must stand without a value, but 'false' follows. Write --no-share alone.",
        ),
        (
            ["d", "--save-dir", "s", "--no-share=yes"],
            "`--no-share` must stand without a value, but 'yes' follows. Write --no-share alone.",
        ),
        (
            ["--data", "d", "--save-dir", "s"],
            "`--data` is not a known option. Write it without a flag: nmt-x DATA.",
        ),
        (["d", "-s", "s"], "`-s` is not a known option."),
        (
            ["d", "--save-dir", "s", "--note", "x" * 10_000, "--lr", "\x1b" * 10_000],
            "`--lr` must be a number, but is '" + "\\x1b" * 19 + "'.",
        ),
    ],
)
def test_usage_errors_are_one_line_that_says_where_all_is_explained(argv: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(*argv)
    text = str(caught.value)
    assert text.endswith(" See `nmt-x --help`.") and "\n" not in text
    if "\\x1b" not in said:
        assert text == f"{said} See `nmt-x --help`."
    assert len(text) < 250


def test_values_may_be_negative_numbers_and_flags_may_end() -> None:
    assert parse("d", "--save-dir", "s", "--lr", "-1e-3").lr == -1e-3
    assert parse("--save-dir", "s", "--", "--d").task_options.data == Path("--d")
    assert parse("--names", "a", "-", "--save-dir=--x", "d").save_dir == Path("--x")


def test_the_last_of_several_counts_and_none_empties() -> None:
    run = parse("d", "--save-dir", "a", "--save-dir", "b", "--note", "x", "--note", "None", "--names")
    assert (run.save_dir, run.note, run.task_options.names) == (Path("b"), None, ())


@given(st.lists(st.text(max_size=12) | st.sampled_from(["--lr", "--share", "--betas", "--names", "=", "--"])))
@settings(max_examples=300, deadline=None)
def test_whatever_the_arguments_are_they_are_taken_or_refused_in_a_line(argv: list[str]) -> None:
    if {"--help", "-h", "--version"} & set(argv):
        return
    try:
        parse("--save-dir", "s", "d", *argv)
    except UserError as error:
        assert "\n" not in str(error)
    except FileNotFoundError:
        assert "--config" in " ".join(argv)


def test_help_shows_the_file_flag_and_the_help_texts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as caught:
        parse("--arch", "small", "--help")
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: nmt-x DATA --save-dir PATH [options]\n")
    assert "--config FILE" in shown
    assert "The data directory. (required)" in shown
    assert "  --share\n      Share the embeddings.\n" in shown
    assert "Width. (default: 64)" in shown
    assert "--arch is one of: base, small, large." in shown


@dataclass(frozen=True)
class ShownOptions:
    """What is shown of options. And more."""

    @dataclass(frozen=True)
    class Inner:
        """Of the inner ones."""

        no_scale: bool = False
        """Do not scale."""
        on: bool = True
        """Be on."""
        size: int | Literal["auto"] | None = None
        """Size."""
        pair: tuple[float, float] = (0.5, 1.0)
        """Two."""

    inner: Inner = field(default_factory=Inner)
    names: Positional[tuple[str, ...]] = ()
    """Some names."""
    kind: Literal["a", "b"] = "a"
    """Kind."""


def test_help_is_plain_and_begins_with_what_most_people_want(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        parse_command(
            ShownOptions, ["--help"], prog="nmt-x", description="Show.", common=("size", "absent", "names")
        )
    assert (
        capsys.readouterr().out
        == """usage: nmt-x [NAMES ...] [options]

Show.

  [NAMES ...]
      Some names.

What most people set
  --size N|auto
      Size.

Other options
  --kind a|b
      Kind. (default: a)
  --config FILE
      YAML file of options: `max-tokens: 4096` for --max-tokens 4096, and so on.
  --help, --version
      Print this text, or the version, and stop.

Of the inner ones
  --no-scale
      Do not scale.
  --on, --no-on
      Be on. (default: --on)
  --pair X X
      Two. (default: 0.5 1.0)
"""
    )


def test_what_is_named_by_no_is_switched_off_without_it() -> None:
    def no_scale(*argv: str) -> bool:
        options = parse_command(ShownOptions, argv, prog="nmt-x", description="")
        return options.inner.no_scale

    assert (no_scale("--no-scale"), no_scale("--no-scale", "--scale"), no_scale()) == (True, False, False)
    with pytest.raises(UserError, match="--no-no-scale"):
        no_scale("--no-no-scale")


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("--version")
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(f"nmt-x {nmt.__version__} (Python 3.")


def test_peek_finds_the_last_value_of_a_flag() -> None:
    assert peek(["--task", "a", "--task=b"], "--task") == "b"
    assert peek(["--save_dir", "x"], "--save-dir") == "x"
    assert peek(["x", "--tasks", "y"], "--task") is None
    assert peek(["--task"], "--task") is None
    assert peek(["--task", "--lr", "3"], "--task") is None
    assert peek(["--", "--task", "a"], "--task") is None


def test_field_names_are_unique_over_a_nest() -> None:
    @dataclass(frozen=True)
    class Clash:
        model: ModelOptions
        embed_dim: int = 3

    with pytest.raises(AssertionError, match="embed_dim"):
        list_options(Clash)


def test_options_that_may_not_change_are_listed_where_they_do() -> None:
    @dataclass(frozen=True)
    class Inner:
        width: int = field(default=1, metadata={"fixed": True})
        speed: int = 1

    @dataclass(frozen=True)
    class Outer:
        inner: Inner = field(default_factory=Inner)
        the_seed: int = field(default=1, metadata={"fixed": True})

    before = Outer()
    assert changed_fixed_options(before, Outer(Inner(speed=2))) == []
    assert changed_fixed_options(before, Outer(Inner(width=2), 3)) == [("width", 1, 2), ("the-seed", 1, 3)]


def test_options_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().lr = 3.0  # type: ignore[misc]


def test_configuration_imports_no_torch() -> None:
    code = "import sys, nmt.config.mapping, nmt.task; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ["dé", "日本"])
def test_a_path_is_written_and_read_where_the_locale_has_no_such_characters(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / name).mkdir()
    code = (
        "import sys; from pathlib import Path; from nmt.config.values import convert, to_text\n"
        "assert sys.getfilesystemencoding() != 'utf-8'\n"
        "path = Path(sys.argv[1]); text = to_text(path)\n"
        "assert text.encode('utf-8') == bytes(path), text\n"
        "assert convert(Path, text) == path and convert(Path, text).is_dir()\n"
    )
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / name)],
        env=os.environ | plain,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()


def test_text_that_cannot_be_written_is_refused_before_anything_is(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"`data` must be text in UTF-8.*'x\\udce9'"):
        write_yaml(TaskOptions(Path("x\udce9"), ModelOptions()), tmp_path / "config.yaml")
    assert not list(tmp_path.iterdir())
