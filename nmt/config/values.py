"""One value of an option: text <-> the type of its field, strictly. Also the known name nearest to a wrong one."""

import difflib
import numbers
import os
import types
import typing
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from nmt.config.records import is_unicode
from nmt.errors import shown

_NEAR, _NEAR_IF_SHORT = 0.8, 0.75  # similarity by difflib: one letter in five may differ, or in four
_SHORT = 5  # letters
_MOST_SUGGESTIONS = 3
_LONGEST_SHOWN = 80
_NUMBERS: dict[Any, type] = {int: numbers.Integral, float: numbers.Real}  # include NumPy's numbers
_MOST = 10**100  # Python does not print numbers of thousands of digits
_EMPTY_WORDS = ("", "~", "null", "none")
_BOOLEAN_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class MismatchError(Exception):
    """A value does not have its field's type; the text completes "must be ..."."""

    def __init__(self, rule: str, suggestion: str = "") -> None:
        super().__init__(rule)
        self.suggestion = suggestion


def convert(hint: Any, value: Any) -> Any:
    """Convert text, a list of text, or a value that has the type already, to the type of a field.

    Raises:
        MismatchError: if the value cannot be of that type.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return convert(arguments[0], value)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(hint, value)
    if origin is Literal:
        choices = {str(to_text(choice)): choice for choice in arguments}
        # The text of an object that is neither text nor a number may be anything.
        is_simple = (
            value is None or isinstance(value, str | float) or (isinstance(value, int) and value < 2**63)
        )
        text = str(to_text(value)) if is_simple else ""
        if text in choices:
            return choices[text]
        near = suggest(text, choices)
        raise MismatchError(f"one of {', '.join(choices)}", near)
    if origin is tuple:
        return _convert_tuple(arguments, value)
    return _convert_scalar(hint, value)


def to_text(value: Any) -> Any:
    """Return a value as the text, list of text, or None that `convert` reads back."""
    if value is None:
        return None
    if isinstance(value, (list, tuple)):
        return [to_text(item) for item in value]
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Path):
        return path_to_text(value)
    return repr(value) if isinstance(value, float) else str(value)


def path_to_text(path: Path) -> str:
    """Return a path as text of UTF-8, even if the locale lacks characters of its name.

    A name that is not UTF-8 stays as Python has it, with halves of characters in it.
    """
    text = str(path)
    with suppress(UnicodeError):
        return text if is_unicode(text) else os.fsencode(text).decode("utf-8")
    return text


def _to_path(text: str) -> Path:
    """Return the path that text stands for, even if the locale lacks some of its characters.

    Raises:
        UnicodeError: No path can have this name.
    """
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        text = os.fsdecode(text.encode("utf-8"))
    return Path(text)


def suggest(name: str, known: Iterable[str]) -> str:
    """Return " Perhaps you meant `...`?" with the known name nearest to `name`, or "" if none is near.

    Near is a typing error, or the beginning of a longer name up to a hyphen. A wrong hint is worse than none.
    """
    bare = {candidate.lstrip("-"): candidate for candidate in known}
    wanted = name.lstrip("-")
    matches = difflib.get_close_matches(
        wanted, list(bare), n=1, cutoff=_NEAR_IF_SHORT if len(wanted) <= _SHORT else _NEAR
    )
    if not matches and wanted:
        matches = [candidate for candidate in bare if candidate.startswith(wanted + "-")][:_MOST_SUGGESTIONS]
    if not matches:
        return ""
    return f" Perhaps you meant {' or '.join(f'`{bare[match]}`' for match in matches)}?"


def shorten(value: object, *, quote: bool = True) -> str:
    """Show a value in an error: without control characters, and not longer than one line."""
    try:
        text = repr(value)
    except Exception:  # an unknown object may raise anything, and Python refuses thousands of digits
        return shown(value)
    if not quote:
        text = text[1:-1]
    return text if len(text) <= _LONGEST_SHOWN else text[: _LONGEST_SHOWN - 4] + "..." + text[-1] * quote


def _convert_union(hint: Any, value: Any) -> Any:
    """Convert to the first of `A | B | None` that fits."""
    kinds = [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
    if len(kinds) < len(typing.get_args(hint)):
        if value is None:
            return None
        # If the field takes text, only an unquoted null of a YAML file means None, and that is None already.
        if isinstance(value, str) and str not in kinds and value.lower() in _EMPTY_WORDS:
            return None
    mismatches = []
    for kind in kinds:
        try:
            return convert(kind, value)
        except MismatchError as mismatch:
            mismatches.append(mismatch)
    raise MismatchError(" or ".join(map(str, mismatches)), mismatches[-1].suggestion)


def _convert_tuple(arguments: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise MismatchError("a list such as [a, b]")
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        arguments = (arguments[0],) * len(value)
    if len(value) != len(arguments):
        raise MismatchError(f"a list of {len(arguments)}")
    try:
        return tuple(convert(kind, item) for kind, item in zip(arguments, value, strict=True))
    except MismatchError as error:
        raise MismatchError(f"a list, each item {error}", error.suggestion) from None


def _convert_scalar(hint: Any, value: Any) -> Any:
    if isinstance(value, str):
        if hint is bool and value.lower() in _BOOLEAN_WORDS:
            return _BOOLEAN_WORDS[value.lower()]
        if hint in (int, float):
            with suppress(ValueError):  # not a number, or one of thousands of digits
                return hint(value)
        if hint is str:
            return value
        if hint is Path and value and "\0" not in value:
            with suppress(UnicodeError):
                return _to_path(value)
    elif hint in (int, float) and isinstance(value, _NUMBERS[hint]) and not isinstance(value, bool):
        with suppress(OverflowError):
            number = hint(value)
            if hint is float or abs(number) < _MOST:
                return number
    elif (hint is bool and isinstance(value, bool)) or (hint is Path and isinstance(value, Path)):
        return value
    rules = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text (in quotes where it looks empty)",
        Path: "a path",
    }
    assert hint in rules, f"{hint} is not a type that options may have"
    raise MismatchError(rules[hint])
