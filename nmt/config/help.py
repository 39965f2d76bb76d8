"""What `--help` prints: usage, the options that most people want, and all others in groups with their help."""

import shutil
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from nmt.config.command_line import CONFIG_FLAG
from nmt.config.fields import MISSING, Option, help_texts, list_groups
from nmt.config.values import to_text

_WIDEST, _NARROWEST = 110, 40
_INDENT = 6
_HELP = "YAML file of options: `max-tokens: 4096` for --max-tokens 4096, and so on."
_METAVARS = {int: "N", float: "X", str: "NAME", Path: "PATH"}


def format_help(
    type_: Any,
    options: Sequence[Option],
    defaults: Mapping[str, Any],
    *,
    prog: str,
    description: str,
    common: Sequence[str] = (),
) -> str:
    """Return the text of `--help`, as wide as the terminal.

    Args:
        type_: the dataclass, or an alias of a generic one.
        options: its options, from `list_options`.
        defaults: their defaults, by field name.
        prog: the name of the command.
        description: what it does.
        common: fields that most people want. They come first; fields that `type_` lacks are skipped.
    """
    width = max(_NARROWEST, min(_WIDEST, shutil.get_terminal_size().columns))
    groups = dict(list_groups(type_))
    texts = {owner: help_texts(cls) for owner, cls in groups.items()}
    by_name = {option.name: option for option in options}

    def entry(option: Option) -> str:
        text = _with_default(option, defaults[option.name], texts[option.owner].get(option.name, ""))
        return _entry(_invocation(option, defaults[option.name]), text, width)

    positional = [option for option in options if option.is_positional]
    most_used = [by_name[name] for name in common if name in by_name and not by_name[name].is_positional]
    first = [option for option in options if not option.owner and option not in (*most_used, *positional)]
    required = [option for option in options if defaults[option.name] is MISSING and option not in positional]
    usage = [_invocation(option, defaults[option.name]) for option in (*positional, *required)]
    blocks = [_wrap(" ".join(["usage:", prog, *usage, "[options]"]), width), _wrap(description, width)]
    if positional:
        blocks.append(_block("", map(entry, positional)))
    if most_used:
        blocks.append(_block("What most people set", map(entry, most_used)))
    shared = [_entry(f"{CONFIG_FLAG} FILE", _HELP, width)]
    shared.append(_entry("--help, --version", "Print this text, or the version, and stop.", width))
    blocks.append(_block("Other options" if most_used else "Options", [*map(entry, first), *shared]))
    for owner, cls in groups.items():
        own = [x for x in options if x.owner == owner and owner and x not in (*most_used, *positional)]
        if own:
            blocks.append(_block(_title(cls), map(entry, own)))
    return "\n\n".join(blocks) + "\n"


def _title(cls: type) -> str:
    """Return the first sentence of the docstring of a group of options, as a title."""
    return " ".join((cls.__doc__ or cls.__name__).split("\n\n")[0].split()).partition(". ")[0].rstrip(".")


def _block(title: str, entries: Iterator[str] | Sequence[str]) -> str:
    return "\n".join([*([title] if title else []), *entries])


def _entry(invocation: str, text: str, width: int) -> str:
    indent = " " * _INDENT
    lines = textwrap.wrap(invocation, width, initial_indent="  ", subsequent_indent=indent, **_WHOLE_WORDS)
    lines += textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent, **_WHOLE_WORDS)
    return "\n".join(lines)


_WHOLE_WORDS: Any = {"break_long_words": False, "break_on_hyphens": False}


def _wrap(text: str, width: int) -> str:
    return "\n".join(textwrap.fill(line, width, **_WHOLE_WORDS) for line in text.split("\n"))


def _invocation(option: Option, default: Any) -> str:
    """Show how an option is written; one that is false by default needs only its flag."""
    if option.is_positional:
        return _metavar_of_positional(option, default)
    if option.hint is bool:
        return f"{option.flag}, {option.opposite}" if default else option.flag
    return f"{option.flag} {_metavar(option.hint, option.presets)}"


def _metavar_of_positional(option: Option, default: Any) -> str:
    label = option.label + (" ..." if typing.get_origin(typing.get_args(option.hint)[0]) is tuple else "")
    return label if default is MISSING else f"[{label}]"


def _metavar(hint: Any, presets: Mapping[str, Any] | None = None) -> str:
    """Name a kind of value: `N` is a whole number, `X` any number; the others are words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if presets is not None:
        return "NAME"  # the description lists the names
    if origin is Annotated:
        return _metavar(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return "|".join(_metavar(kind) for kind in arguments if kind is not types.NoneType)
    if origin is Literal:
        return "|".join(map(str, arguments))
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"{_metavar(arguments[0])} ..."
        return " ".join(map(_metavar, arguments))
    return _METAVARS[hint]


def _with_default(option: Option, default: Any, text: str) -> str:
    """Append the default if it says something that the text and the flag do not."""
    if default is MISSING:
        return f"{text} (required)"
    if default is None or default is False or default == ():
        return text
    if default is True:
        return f"{text} (default: {option.flag})"
    shown = to_text(default)
    return f"{text} (default: {' '.join(shown) if isinstance(shown, list) else shown})"
