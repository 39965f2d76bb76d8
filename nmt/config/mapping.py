"""Options: a typed dataclass <-> a YAML file <-> a command line.

An options dataclass is frozen, lives in an `options.py`, and may nest others (a nest). Field names are unique in
the whole nest, so that flags and YAML keys are flat: `--max-tokens 4096` and `max-tokens: 4096` set the field
`max_tokens`, wherever in the nest it is. A field holds an `int`, `float`, `str`, `bool`, `Path`, `Literal[...]`,
a tuple of these, or one of these or None. The string literal under a field is its help.

A field with `metadata={"presets": {name: {field: value}}}` names a preset: its values become the defaults
of other fields of the same dataclass. A class variable `train_defaults: ClassVar = {field: value}` of a nested
dataclass, such as a task's options, gives other fields, anywhere in the nest, the defaults that suit it.
Precedence: default <- `train_defaults` <- preset <- YAML file <- command line.

Numbers are finite, and whole numbers within 32 bits, unless the field has `metadata={"range": (lowest, highest)}`.
A dataclass may define `check(self) -> None`, which raises `UserError` for values that do not go together.
It is called when all values are there, for inner dataclasses first.
"""

import dataclasses
import platform
import typing
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from nmt import __version__
from nmt.config.command_line import CONFIG_FLAG as CONFIG_FLAG
from nmt.config.command_line import is_flag, missing_options, read_arguments, see_help
from nmt.config.fields import MISSING, Option, build_nest, key_of, list_options
from nmt.config.fields import Positional as Positional
from nmt.config.help import format_help
from nmt.config.other_names import answer
from nmt.config.ranges import check_limits, check_numbers
from nmt.config.untold import hide_places, is_untold
from nmt.config.values import MismatchError, convert, shorten, suggest, to_text
from nmt.config.yaml_file import read_yaml as read_yaml
from nmt.config.yaml_file import write_flat_yaml
from nmt.errors import UserError

T = TypeVar("T")

_BY_FUNCTION = "Make the configuration with nmt.train_config(...), which converts what it is given."


@runtime_checkable
class Checked(Protocol):
    """A dataclass whose values can contradict each other."""

    def check(self) -> None:
        """Raise `UserError` if the values contradict each other."""


def from_mapping(
    type_: type[T],
    mapping: Mapping[str, Any],
    *,
    where: str,
    how_to_give: str = "Add the line `{key}: VALUE`.",
    prog: str = "",
) -> T:
    """Make options from a flat mapping, such as one read from a YAML file.

    Args:
        type_: the dataclass, or an alias of a generic one such as `TrainConfig[TranslationOptions]`.
        mapping: keys with hyphens or underscores; values are text, lists of text or None, as from `read_yaml`, or
            have the field's type already.
        where: where the mapping comes from, for error texts: the path of the file.
        how_to_give: for error texts: how to give a missing `key`, or a field of this `name`, there.
        prog: the command with these options; its users may try names of other toolkits.

    Raises:
        UserError: for an unknown key, a value of another type, or a key that is missing.
    """
    options = list_options(type_)
    given = _convert_mapping(options, mapping, where, prog)
    values = _defaults(options, given) | given
    missing = [option for option in options if values[option.name] is MISSING]
    if missing:
        key, name = missing[0].key, missing[0].name
        raise UserError(f"{where}: `{key}` must be given. {how_to_give.format(key=key, name=name)}")
    instance = build_nest(type_, values)
    try:
        check_options(instance)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return typing.cast(T, instance)


def to_mapping(instance: Any, *, with_paths: bool = True) -> dict[str, Any]:
    """Return options as a flat mapping of hyphened keys to text, lists of text, or None.

    `from_mapping` reads it back exactly.

    Args:
        instance: the options.
        with_paths: False to leave out required paths and to hide other places (`untold.py`), since they tell
            about the machine.
    """
    mapping: dict[str, Any] = {}
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        if dataclasses.is_dataclass(value):
            mapping |= to_mapping(value, with_paths=with_paths)
        elif with_paths:
            mapping[key_of(field.name)] = to_text(value)
        elif not (_holds_path(value) and _is_required(field)):
            mapping[key_of(field.name)] = to_text(hide_places(value))
    return mapping


def _is_required(field: "dataclasses.Field[Any]") -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _holds_path(value: Any) -> bool:
    return isinstance(value, Path) or (isinstance(value, (list, tuple)) and any(map(_holds_path, value)))


def path_options(type_: Any) -> list[Option]:
    """List the options that hold paths."""
    return [option for option in list_options(type_) if option.is_path]


def write_yaml(instance: Any, path: Path, *, with_paths: bool = True) -> None:
    """Write options to a YAML file. `read_yaml` and `from_mapping`, or `--config`, read it back exactly."""
    write_flat_yaml(to_mapping(instance, with_paths=with_paths), path)


def parse_command(
    type_: type[T],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    common: Sequence[str] = (),
    known: tuple[str, Mapping[str, Any]] | None = None,
) -> T:
    """Make options from a command line, and from the YAML file that `--config` names.

    `--help` and `--version` print to stdout and raise `SystemExit`.

    Args:
        type_: the dataclass, or an alias of a generic one.
        argv: the arguments, without the name of the program.
        prog: the name of the program.
        description: what it does, for `--help`.
        common: the fields that most people want, which `--help` shows first.
        known: values to use like those of a YAML file, and where they come from.

    Raises:
        UserError: for anything wrong in the arguments or in the file.
        OSError: if the file cannot be read.
    """
    options = list_options(type_)
    if asks_for(argv, "--version"):
        print_version(prog)
    if asks_for(argv, "--help", "-h"):
        defaults = _defaults(options, _peek_presets(options, argv))
        described = _describe_presets(options, description)
        print(format_help(type_, options, defaults, prog=prog, description=described, common=common), end="")
        raise SystemExit(0)
    typed = read_arguments(options, argv, prog=prog)
    for option in options:
        _check_preset(option, typed.get(option.name), f"`{option.flag}`")
    given = {} if known is None else _convert_mapping(options, known[1], known[0], prog)
    config_path = peek(argv, CONFIG_FLAG)
    if config_path is not None:
        given |= _convert_mapping(options, read_yaml(Path(config_path)), config_path, prog)
    given |= typed
    values = _defaults(options, given) | given
    if missing := [option for option in options if values[option.name] is MISSING]:
        raise missing_options(missing, prog)
    instance = build_nest(type_, values)
    check_options(instance)
    return typing.cast(T, instance)


def asks_for(argv: Sequence[str], *flags: str) -> bool:
    """Return whether one of these flags, which take no value, is among the arguments."""
    before = argv[: list(argv).index("--")] if "--" in argv else argv
    return any(argument in flags for argument in before)


def print_version(prog: str) -> typing.NoReturn:
    """Print the versions that a bug report should name, and raise `SystemExit`."""
    versions = f"Python {platform.python_version()}, torch {metadata.version('torch')}"
    print(f"{prog} {__version__} ({versions})")
    raise SystemExit(0)


def check_types(instance: Any) -> None:
    """Check that each field of a nest of options, which was made by hand, has a value of its type.

    Raises:
        UserError: A field has not.
    """
    hints = typing.get_type_hints(type(instance))
    for field in dataclasses.fields(instance):
        hint, value = hints[field.name], getattr(instance, field.name)
        name = key_of(field.name)
        expected = typing.get_origin(hint) or hint
        if isinstance(hint, TypeVar) or dataclasses.is_dataclass(expected):
            is_fitting = dataclasses.is_dataclass(value) and not isinstance(value, type)
            if not is_fitting or (isinstance(expected, type) and not isinstance(value, expected)):
                what = expected.__name__ if isinstance(expected, type) else "a dataclass of options"
                raise UserError(f"`{name}` must be {what}, but is {shorten(value)}. {_BY_FUNCTION}")
            check_types(value)
            continue
        try:
            converted = convert(hint, value)
        except AssertionError:  # a plugin's field may have a type that no option has
            continue
        except MismatchError as error:
            raise UserError(f"`{name}` must be {error}, but is {shorten(value)}. {_BY_FUNCTION}") from None
        if isinstance(value, str) and not isinstance(converted, str):
            kind = "Path" if isinstance(converted, Path) else type(converted).__name__
            raise UserError(
                f"`{name}` must be of type {kind}, but is the text {shorten(value)}. {_BY_FUNCTION}"
            )


def check_options(instance: Any) -> None:
    """Call `check` of every dataclass in a nest of options, the inner ones first.

    Raises:
        UserError: for values that make no sense alone or together.
    """
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        if dataclasses.is_dataclass(value):
            check_options(value)
    check_limits(instance)
    if isinstance(instance, Checked):
        instance.check()
    check_numbers(instance)  # last, since `check` gives better reasons


def peek(argv: Sequence[str], flag: str) -> str | None:
    """Return the value of a flag before the command line is parsed, or None if it is not given.

    Both `--task x` and `--task=x` are read; the last one counts.
    """
    value = None
    for index, argument in enumerate(argv):
        if argument == "--":
            break
        name, equals, text = argument.partition("=")
        if name.replace("_", "-") != flag:
            continue
        if equals:
            value = text
        elif index + 1 < len(argv) and not is_flag(argv[index + 1]):
            value = argv[index + 1]
    return value


def _defaults(options: Sequence[Option], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults by field name, including those of the presets that are named or default."""
    values = {option.name: option.default for option in options}
    for option in options:
        name = given.get(option.name, option.default)
        if option.presets is None or name is None or name is MISSING:
            continue
        siblings = {other.name for other in options if other.owner == option.owner} - {option.name}
        preset = option.presets[name]
        assert preset.keys() <= siblings, f"preset `{name}` sets {preset.keys() - siblings}: no such fields"
        values |= preset
    return values


def _peek_presets(options: Sequence[Option], argv: Sequence[str]) -> dict[str, str]:
    """Return the presets that the command line names, by field name."""
    named = {}
    for option in options:
        name = peek(argv, option.flag)
        if option.presets is not None and name is not None:
            _check_preset(option, name, f"`{option.flag}`")
            named[option.name] = name
    return named


def _check_preset(option: Option, name: str | None, label: str) -> None:
    if option.presets is not None and name is not None and name not in option.presets:
        known = ", ".join(option.presets)
        near = suggest(name, option.presets)
        raise UserError(f"{label} must be one of {known}, but is {shorten(name)}.{near}")


def _describe_presets(options: Sequence[Option], description: str) -> str:
    for option in options:
        if option.presets:
            description += f"\n\n{option.flag} is one of: {', '.join(option.presets)}."
    return description


def _unknown_key(written: str, by_key: Mapping[str, Option], prog: str) -> str:
    key = written.replace("_", "-")
    hint = answer(prog, key, {CONFIG_FLAG, *(option.flag for option in by_key.values())}).replace("`--", "`")
    hint = hint or suggest(key, by_key)
    hint = hint or (f" {see_help(prog)}" if prog else f" The keys are {', '.join(by_key)}.")
    return f"`{shorten(written, quote=False)}` is not a known key.{hint}"


def _convert_mapping(
    options: Sequence[Option], mapping: Mapping[str, Any], where: str, prog: str
) -> dict[str, Any]:
    """Return the values of a mapping by field name and with the fields' types."""
    by_key = {option.key: option for option in options}
    values: dict[str, Any] = {}
    for written, value in mapping.items():
        option = by_key.get(written.replace("_", "-"))
        if option is None:
            raise UserError(f"{where}: {_unknown_key(written, by_key, prog)}")
        if option.name in values:
            raise UserError(f"{where}: `{option.key}` must be given once, but is there twice. Delete one.")
        try:
            values[option.name] = convert(option.hint, value)
        except MismatchError as error:
            is_empty = value is None or (isinstance(value, str) and not value)
            shown = "empty" if is_empty else shorten(value)
            text = f"{where}: `{option.key}` must be {error}, but is {shown}."
            raise UserError(text + error.suggestion) from None
        _check_preset(option, values[option.name], f"{where}: `{option.key}`")
    return values


def changed_fixed_options(before: Any, now: Any) -> list[tuple[str, Any, Any]]:
    """Return (key, before, now) of the options with `metadata={"fixed": True}` that differ; paths may differ.

    Args:
        before: the options that a run was started with.
        now: the options for going on, of the same type.
    """
    changed: list[tuple[str, Any, Any]] = []
    for field in dataclasses.fields(before):
        old, new = getattr(before, field.name), getattr(now, field.name)
        if dataclasses.is_dataclass(old) and type(old) is type(new):
            changed += changed_fixed_options(old, new)
        elif field.metadata.get("fixed") and old != new and not _holds_path(old) and not is_untold(old):
            changed.append((key_of(field.name), old, new))
    return changed
