"""The fields of nested options dataclasses as one flat list, and the dataclasses made of values by field name."""

import ast
import dataclasses
import inspect
import textwrap
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

T = TypeVar("T")

MISSING: Any = dataclasses.MISSING


class _PositionalMark:
    """Marks a field that the command line takes without a flag."""


_POSITIONAL = _PositionalMark()
Positional = Annotated[T, _POSITIONAL]


@dataclasses.dataclass(frozen=True)
class Option:
    """One field of nested options dataclasses."""

    name: str
    hint: Any
    default: Any  # MISSING if the option must be given
    owner: tuple[str, ...]  # the fields that lead to the option's dataclass
    presets: Mapping[str, Mapping[str, Any]] | None

    @property
    def key(self) -> str:
        """The name in a YAML file."""
        return key_of(self.name)

    @property
    def is_required(self) -> bool:
        """Whether it must be given."""
        return self.default is MISSING

    @property
    def is_path(self) -> bool:
        """Whether it holds a path, or several."""
        return (typing.get_args(self.hint) or (self.hint,))[0] is Path  # also within Annotated[...]

    @property
    def flag(self) -> str:
        """The name on the command line."""
        return "--" + self.key

    @property
    def opposite(self) -> str | None:
        """The flag that sets an option of true or false to false: `--no-x` for `--x`, and `--x` for `--no-x`."""
        if self.hint is not bool:
            return None
        return "--" + (self.key.removeprefix("no-") if self.key.startswith("no-") else "no-" + self.key)

    @property
    def is_positional(self) -> bool:
        """Whether the command line takes it without a flag."""
        return any(mark is _POSITIONAL for mark in getattr(self.hint, "__metadata__", ()))

    @property
    def label(self) -> str:
        """How `--help` and errors name it."""
        return self.key.upper() if self.is_positional else self.flag


def key_of(name: str) -> str:
    """Return the key of a field: its name with hyphens, without the final underscore of one such as `from_`."""
    return name.rstrip("_").replace("_", "-")


def list_options(type_: Any) -> list[Option]:
    """List the fields of nested options in the order of the dataclasses, and check that names are unique."""
    options = list(_walk(type_, default=MISSING, owner=()))
    names = [option.name for option in options]
    twice = sorted({name for name in names if names.count(name) > 1})
    assert not twice, f"{type_}: field names must be unique over the nest, but {twice} are not"
    assert not {"config", "help", "version"} & set(names), f"{type_}: a field has the name of a common flag"
    prescribed = dict(_prescribed_defaults(type_))
    assert prescribed.keys() <= set(names), (
        f"{type_}: no fields {prescribed.keys() - set(names)} to prescribe"
    )
    return [
        dataclasses.replace(option, default=prescribed.get(option.name, option.default)) for option in options
    ]


def build_nest(type_: Any, values: Mapping[str, Any]) -> Any:
    """Make the dataclass and the ones within it; `values` holds every field by its name."""
    arguments = {
        field.name: build_nest(hint, values) if _is_nested(hint) else values[field.name]
        for field, hint in _resolved_fields(type_)
    }
    return (typing.get_origin(type_) or type_)(**arguments)


def list_groups(type_: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield each dataclass of a nest with the fields that lead to it, the outermost first."""
    yield (), typing.get_origin(type_) or type_
    for field, hint in _resolved_fields(type_):
        if _is_nested(hint):
            yield from (((field.name, *owner), cls) for owner, cls in list_groups(hint))


def help_texts(cls: type) -> dict[str, str]:
    """Return the string literals under the fields of a dataclass, by field; none without its source code."""
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    except (OSError, TypeError, SyntaxError):
        return {}
    assert isinstance(tree, ast.ClassDef)
    texts = {}
    for field, text in zip(tree.body, tree.body[1:], strict=False):
        if not isinstance(field, ast.AnnAssign) or not isinstance(text, ast.Expr):
            continue
        if isinstance(text.value, ast.Constant):
            texts[ast.unparse(field.target)] = " ".join(str(text.value.value).split())
    return texts


def _prescribed_defaults(type_: Any) -> Iterator[tuple[str, Any]]:
    """Yield the `train_defaults` of a nest of dataclasses, field by field."""
    for _, hint in _resolved_fields(type_):
        if _is_nested(hint):
            yield from getattr(typing.get_origin(hint) or hint, "train_defaults", {}).items()
            yield from _prescribed_defaults(hint)


def _walk(type_: Any, *, default: Any, owner: tuple[str, ...]) -> Iterator[Option]:
    """Yield the options of a dataclass. `default` is an instance, if the outer dataclass prescribes one."""
    for field, hint in _resolved_fields(type_):
        value = _default_of(field) if default is MISSING else getattr(default, field.name)
        if _is_nested(hint):
            if not isinstance(value, typing.get_origin(hint) or hint):
                value = MISSING  # the default belongs to another type than the field has here
            yield from _walk(hint, default=value, owner=(*owner, field.name))
        else:
            yield Option(field.name, hint, value, owner, field.metadata.get("presets"))


def _resolved_fields(type_: Any) -> list[tuple[dataclasses.Field[Any], Any]]:
    """Return the fields of a dataclass with their types; an alias fills in the type variables."""
    cls = typing.get_origin(type_) or type_
    assert dataclasses.is_dataclass(cls), f"{cls} must be a dataclass"
    arguments = dict(zip(getattr(cls, "__parameters__", ()), typing.get_args(type_), strict=False))
    hints = typing.get_type_hints(cls, include_extras=True)
    resolved = []
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if isinstance(hint, TypeVar):
            # A type variable that is not filled in is the type of the field's default.
            hint = arguments.get(hint, field.default_factory)
            assert hint is not MISSING, f"{type_}: fill in the type of `{field.name}`, as in Type[...]"
        elif not isinstance(hint, type) and (variables := getattr(hint, "__parameters__", ())):
            hint = hint[tuple(arguments[variable] for variable in variables)]
        resolved.append((field, hint))
    return resolved


def _is_nested(hint: Any) -> bool:
    return dataclasses.is_dataclass(typing.get_origin(hint) or hint)


def _default_of(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
