"""Options: a typed dataclass <-> a YAML file <-> a command line.

An options dataclass is frozen, lives in an `options.py`, and may nest others. The names of its fields are
unique over the whole nest, so that flags and YAML keys are flat: `--max-tokens 4096` and `max-tokens: 4096`
set the field `max_tokens`, wherever in the nest it is. A field holds an `int`, `float`, `str`, `bool`,
`Path`, `Literal[...]`, a tuple of these, or one of these or None; a string literal under it is its help.

A field with `metadata={"presets": {name: {field: value}}}` names a preset: its values become the defaults
of other fields of the same dataclass. A class variable `train_defaults: ClassVar = {field: value}` of a nested
dataclass, such as a task's options, gives other fields, anywhere in the nest, the defaults that suit it.
Precedence: default <- `train_defaults` <- preset <- YAML file <- command line.

A dataclass may define `check(self) -> None`, which raises `UserError` for values that do not go together;
it is called when all values are there, for the inner dataclasses first.
"""

import dataclasses
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar, runtime_checkable

import tyro

from nmt.config_file import read_yaml as read_yaml
from nmt.config_file import write_flat_yaml
from nmt.config_values import MismatchError, convert, suggest, to_text
from nmt.errors import UserError, shown

T = TypeVar("T")

CONFIG_FLAG = "--config"
_MISSING = dataclasses.MISSING


@runtime_checkable
class Checked(Protocol):
    """A dataclass whose values can contradict each other."""

    def check(self) -> None:
        """Raise `UserError` if they do."""


@dataclasses.dataclass(frozen=True)
class Option:
    """One field of a nest of options."""

    name: str
    hint: Any
    default: Any  # dataclasses.MISSING if it must be given
    owner: tuple[str, ...]  # the fields that lead to its dataclass
    presets: Mapping[str, Mapping[str, Any]] | None

    @property
    def key(self) -> str:
        """The name as in a YAML file; the final underscore of a field such as `from_` is left out."""
        return self.name.rstrip("_").replace("_", "-")

    @property
    def is_required(self) -> bool:
        """Whether it must be given."""
        return self.default is _MISSING

    @property
    def is_path(self) -> bool:
        """Whether it holds a path, or several."""
        return (typing.get_args(self.hint) or (self.hint,))[0] is Path  # within Annotated[...], too

    @property
    def flag(self) -> str:
        """The name as on the command line."""
        return "--" + self.key


def from_mapping(
    type_: type[T],
    mapping: Mapping[str, Any],
    *,
    where: str,
    how_to_give: str = "Add the line `{key}: VALUE`.",
) -> T:
    """Make options from a flat mapping, such as one read from a YAML file.

    Args:
        type_: the dataclass, or an alias of a generic one such as `TrainConfig[TranslationOptions]`.
        mapping: hyphened or underscored keys; values are text, lists of text or None, as `read_yaml` gives
            them, or of the field's type already.
        where: where the mapping comes from, for error texts: the path of the file.
        how_to_give: how a `key` that is missing is given there, or a field of this `name`.

    Raises:
        UserError: for an unknown key, a value of another type, or a key that is missing.
    """
    options = list_options(type_)
    given = _convert_mapping(options, mapping, where)
    values = _defaults(options, given) | given
    missing = [option for option in options if values[option.name] is _MISSING]
    if missing:
        key, name = missing[0].key, missing[0].name
        raise UserError(f"{where}: `{key}` must be given. {how_to_give.format(key=key, name=name)}")
    instance = _build(type_, values)
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
        with_paths: False to leave out the options that hold paths: they tell about the machine.
    """
    mapping: dict[str, Any] = {}
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        if dataclasses.is_dataclass(value):
            mapping |= to_mapping(value, with_paths=with_paths)
        elif with_paths or not _holds_path(value):
            mapping[field.name.replace("_", "-")] = to_text(value)
    return mapping


def _holds_path(value: Any) -> bool:
    return isinstance(value, Path) or (isinstance(value, (list, tuple)) and any(map(_holds_path, value)))


def path_options(type_: Any) -> list[Option]:
    """List the options that hold paths."""
    return [option for option in list_options(type_) if option.is_path]


def write_yaml(instance: Any, path: Path, *, with_paths: bool = True) -> None:
    """Write options to a YAML file that `read_yaml` and `from_mapping`, or `--config`, read back exactly."""
    write_flat_yaml(to_mapping(instance, with_paths=with_paths), path)


def parse_command(
    type_: type[T],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    known: tuple[str, Mapping[str, Any]] | None = None,
) -> T:
    """Make options from a command line, and from the YAML file that `--config` names.

    `--help`, and what tyro finds wrong in the values, print to the terminal and leave by `SystemExit`.

    Args:
        type_: the dataclass, or an alias of a generic one.
        argv: the arguments, without the name of the program.
        prog: the name of the program.
        description: what it does, for `--help`.
        known: what stands for the content of a YAML file, and where it is from.

    Raises:
        UserError: for an unknown option, and for anything wrong in the file.
        OSError: if the file cannot be read.
    """
    options = list_options(type_)
    _refuse_unknown_flags(options, argv, prog)
    given = {} if known is None else _convert_mapping(options, known[1], known[0])
    config_path = peek(argv, CONFIG_FLAG)
    if config_path is not None:
        given |= _convert_mapping(options, read_yaml(Path(config_path)), config_path)
    named = _peek_presets(options, argv)
    defaults = _defaults(options, given | named) | given
    for option in options:
        if option.presets:
            description += f"\n\n{option.flag} is one of: {', '.join(option.presets)}."
    instance = _run_tyro(type_, defaults, argv, prog=prog, description=description)
    check_options(instance)
    return typing.cast(T, instance)


def check_options(instance: Any) -> None:
    """Call `check` of every dataclass in a nest of options, the inner ones first.

    Raises:
        UserError: for values that make no sense alone or together.
    """
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        if dataclasses.is_dataclass(value):
            check_options(value)
    if isinstance(instance, Checked):
        instance.check()


def peek(argv: Sequence[str], flag: str) -> str | None:
    """Return the value of a flag before the command line is parsed, or None if it is not there.

    Both `--task x` and `--task=x` are understood; the last one counts.
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
        elif index + 1 < len(argv) and not argv[index + 1].startswith("--"):
            value = argv[index + 1]
    return value


def list_options(type_: Any) -> list[Option]:
    """List the fields of a nest of options in the order of the help, and make sure of their names."""
    options = list(_walk(type_, default=_MISSING, owner=()))
    names = [option.name for option in options]
    twice = sorted({name for name in names if names.count(name) > 1})
    assert not twice, f"{type_}: field names must be unique over the nest, but {twice} are not"
    assert "config" not in names, f"{type_}: `config` is the flag of the YAML file"
    prescribed = dict(_prescribed_defaults(type_))
    assert prescribed.keys() <= set(names), (
        f"{type_}: no fields {prescribed.keys() - set(names)} to prescribe"
    )
    return [
        dataclasses.replace(option, default=prescribed.get(option.name, option.default)) for option in options
    ]


def _prescribed_defaults(type_: Any) -> Iterator[tuple[str, Any]]:
    """Yield what the dataclasses of a nest have in `train_defaults`."""
    for _, hint in _resolved_fields(type_):
        if _is_nested(hint):
            yield from getattr(typing.get_origin(hint) or hint, "train_defaults", {}).items()
            yield from _prescribed_defaults(hint)


def _walk(type_: Any, *, default: Any, owner: tuple[str, ...]) -> Iterator[Option]:
    """Yield the options of a dataclass; `default` is an instance that its outer dataclass prescribes."""
    for field, hint in _resolved_fields(type_):
        value = _default_of(field) if default is _MISSING else getattr(default, field.name)
        if _is_nested(hint):
            yield from _walk(hint, default=value, owner=(*owner, field.name))
        else:
            yield Option(field.name, hint, value, owner, field.metadata.get("presets"))


def _resolved_fields(type_: Any) -> list[tuple[dataclasses.Field[Any], Any]]:
    """Return the fields of a dataclass with their types, the type variables of an alias filled in."""
    cls = typing.get_origin(type_) or type_
    assert dataclasses.is_dataclass(cls), f"{cls} must be a dataclass"
    arguments = dict(zip(getattr(cls, "__parameters__", ()), typing.get_args(type_), strict=False))
    hints = typing.get_type_hints(cls, include_extras=True)
    resolved = []
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if isinstance(hint, TypeVar):
            assert hint in arguments, f"{type_}: fill in the type of `{field.name}`, as in Type[...]"
            hint = arguments[hint]
        elif variables := getattr(hint, "__parameters__", ()):
            hint = hint[tuple(arguments[variable] for variable in variables)]
        resolved.append((field, hint))
    return resolved


def _is_nested(hint: Any) -> bool:
    return dataclasses.is_dataclass(typing.get_origin(hint) or hint)


def _default_of(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is _MISSING else field.default_factory()


def _build(type_: Any, values: Mapping[str, Any]) -> Any:
    """Make the dataclass and those within it; `values` holds every field by its name."""
    arguments = {
        field.name: _build(hint, values) if _is_nested(hint) else values[field.name]
        for field, hint in _resolved_fields(type_)
    }
    return (typing.get_origin(type_) or type_)(**arguments)


def _defaults(options: Sequence[Option], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults by field name, those of the presets that are named (or default) put in."""
    values = {option.name: option.default for option in options}
    for option in options:
        name = given.get(option.name, option.default)
        if option.presets is None or name is None or name is _MISSING:
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
        raise UserError(
            f"{label} must be one of {known}, but is {shown(name)}.{suggest(name, option.presets)}"
        )


def _convert_mapping(options: Sequence[Option], mapping: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the values of a mapping by field name and with the fields' types."""
    by_key = {option.key: option for option in options}
    values: dict[str, Any] = {}
    for written, value in mapping.items():
        option = by_key.get(written.replace("_", "-"))
        if option is None:
            hint = suggest(written.replace("_", "-"), by_key) or f" The keys are {', '.join(by_key)}."
            raise UserError(f"{where}: `{written}` is not a known key.{hint}")
        if option.name in values:
            raise UserError(f"{where}: `{option.key}` must be given once, but is there twice. Delete one.")
        try:
            values[option.name] = convert(option.hint, value)
        except MismatchError as error:
            found = "empty" if value is None or value == "" else shown(value)
            text = f"{where}: `{option.key}` must be {error}, but is {found}."
            raise UserError(text + error.suggestion) from None
        _check_preset(option, values[option.name], f"{where}: `{option.key}`")
    return values


def _refuse_unknown_flags(options: Sequence[Option], argv: Sequence[str], prog: str) -> None:
    """Name a misspelt flag before anything else: tyro would blame what it misses because of it."""
    known = {CONFIG_FLAG, "--help"} | {option.flag for option in options}
    known |= {"--no-" + option.key for option in options if option.hint is bool}
    for argument in argv:
        if argument == "--":
            return
        flag = argument.partition("=")[0].replace("_", "-")
        is_completion = flag.startswith("--tyro-")  # tyro writes completions for shells
        if flag.startswith("--") and flag not in known and not is_completion:
            near = suggest(flag, sorted(known)) or f" See `{prog} --help`."
            raise UserError(f"`{argument.partition('=')[0]}` is not a known option.{near}")


def _run_tyro(
    type_: Any, defaults: Mapping[str, Any], argv: Sequence[str], *, prog: str, description: str
) -> Any:
    """Parse the command line over the defaults; those that are missing are required."""
    values = {name: tyro.MISSING if value is _MISSING else value for name, value in defaults.items()}
    config_file = tyro.conf.arg(
        metavar="FILE", help="YAML file of options: `max-tokens: 4096` for --max-tokens 4096, and so on."
    )
    command = dataclasses.make_dataclass(
        "Command",
        [
            ("options", Annotated[type_, tyro.conf.arg(name="")]),
            ("config", Annotated[Path | None, config_file]),
        ],
        frozen=True,
    )
    parsed = tyro.cli(
        command,
        prog=prog,
        description=description,
        args=list(argv),
        default=command(options=_build(type_, values), config=None),
        config=(
            tyro.conf.OmitArgPrefixes,
            tyro.conf.PositionalMetavarFromFieldName,
        ),
    )
    return parsed.options


def changed_fixed_options(before: Any, now: Any) -> list[tuple[str, Any, Any]]:
    """Return (key, before, now) of the options with `metadata={"fixed": True}` that differ; paths may.

    Args:
        before: the options that a run was started with.
        now: the options that it is to go on with, of the same type.
    """
    changed: list[tuple[str, Any, Any]] = []
    for field in dataclasses.fields(before):
        old, new = getattr(before, field.name), getattr(now, field.name)
        if dataclasses.is_dataclass(old) and type(old) is type(new):
            changed += changed_fixed_options(old, new)
        elif field.metadata.get("fixed") and old != new and not _holds_path(old):
            changed.append((field.name.replace("_", "-"), old, new))
    return changed
