"""Records in files, read by a schema: our JSON, and the settings that other toolkits keep in checkpoints.

Files come from anywhere. The caller says what a record must hold, with types and bounds. It gets exactly that, or
a `UserError` that names the place: no value of another kind passes. Names that a schema does not have are passed
on as they are, so that a later release may write more.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Protocol

from nmt.errors import DamagedError, UserError, shown

LARGEST_COUNT = 2**53  # the largest that JSON's numbers hold exactly in any language
_LARGEST_FILE = 2**26  # bytes: ten times the state of a run with a hundred thousand validations


class Schema(Protocol):
    """Says what a value must be, and checks it."""

    @property
    def rule(self) -> str:
        """Complete "must be ..."."""

    def check(self, value: Any, place: str) -> Any:
        """Return the value, converted to its type; `place` is its name in the record.

        Raises:
            RecordError: It breaks the rule.
        """


class RecordError(Exception):
    """A value is not what its schema says."""

    def __init__(self, place: str, rule: str, but: str) -> None:
        super().__init__(
            f"`{place}` must be {rule}, but is {but}" if place else f"it must be {rule}, but is {but}"
        )


@dataclass(frozen=True)
class Whole:
    """A whole number within bounds."""

    low: int = 0
    high: int = LARGEST_COUNT

    @property
    def rule(self) -> str:
        """Complete "must be ..."."""
        return f"a whole number from {self.low:,} to {self.high:,}"

    def check(self, value: Any, place: str) -> int:
        """Return it."""
        if type(value) is not int or not self.low <= value <= self.high:
            _refuse(self, value, place)
        return value


@dataclass(frozen=True)
class Number:
    """A number within bounds, whole or not. With `is_finite` False, NaN and infinities are taken too."""

    low: float = -math.inf
    high: float = math.inf
    is_finite: bool = True

    @property
    def rule(self) -> str:
        """Complete "must be ..."."""
        is_bounded = math.isfinite(self.low) or math.isfinite(self.high)
        bounds = f" from {self.low:g} to {self.high:g}" if is_bounded else ""
        return f"a {'finite ' if self.is_finite else ''}number{bounds}"

    def check(self, value: Any, place: str) -> float:
        """Return it."""
        if type(value) not in (int, float):
            _refuse(self, value, place)
        try:
            number = float(value)
        except OverflowError:
            _refuse(self, value, place)
        if math.isfinite(number):
            if not self.low <= number <= self.high:
                _refuse(self, value, place)
        elif self.is_finite:
            _refuse(self, value, place)
        return number


@dataclass(frozen=True)
class Flag:
    """True or false. With `takes_numbers` also 1 or 0, and None for false."""

    takes_numbers: bool = False
    rule: str = "true or false"

    def check(self, value: Any, place: str) -> bool:
        """Return it."""
        is_number = self.takes_numbers and (value is None or (type(value) is int and value in (0, 1)))
        if not isinstance(value, bool) and not is_number:
            _refuse(self, value, place)
        return bool(value)


@dataclass(frozen=True)
class Text:
    """Text that can be written as UTF-8."""

    longest: int = 10_000
    is_right: Callable[[str], bool] = lambda _: True
    rule: str = "text"

    def check(self, value: Any, place: str) -> str:
        """Return it."""
        if (
            not isinstance(value, str)
            or len(value) > self.longest
            or not is_unicode(value)
            or not self.is_right(value)
        ):
            _refuse(self, value, place)
        return value


def _is_name(text: str) -> bool:
    return text.isprintable() and not set(text) & set("/\\") and text not in ("", ".", "..")


NAME = Text(longest=200, is_right=_is_name, rule="a part of a file name")
LANGUAGE = Text(
    longest=64, is_right=lambda text: _is_name(text) and " " not in text, rule="a language, such as en"
)


@dataclass(frozen=True)
class Maybe:
    """Something, or None."""

    of: Schema

    @property
    def rule(self) -> str:
        """Complete "must be ..."."""
        return f"{self.of.rule}, or null"

    def check(self, value: Any, place: str) -> Any:
        """Return it."""
        return None if value is None else self.of.check(value, place)


@dataclass(frozen=True)
class Either:
    """A value that one of two schemas takes."""

    first: Schema
    second: Schema

    @property
    def rule(self) -> str:
        """Complete "must be ..."."""
        return self.second.rule

    def check(self, value: Any, place: str) -> Any:
        """Return it."""
        try:
            return self.first.check(value, place)
        except RecordError:
            return self.second.check(value, place)


@dataclass(frozen=True)
class ListOf:
    """A list of values of one kind."""

    of: Schema
    shortest: int = 0
    longest: int = 10_000_000

    @property
    def rule(self) -> str:
        """Complete "must be ..."."""
        return "a list" if self.shortest == 0 else f"a list of at least {self.shortest}"

    def check(self, value: Any, place: str) -> list[Any]:
        """Return it."""
        if not isinstance(value, (list, tuple)) or not self.shortest <= len(value) <= self.longest:
            _refuse(self, value, place)
        return [self.of.check(item, f"{place}[{number}]") for number, item in enumerate(value)]


@dataclass(frozen=True)
class Pair:
    """Two values."""

    first: Schema
    second: Schema
    rule: str = "a pair"

    def check(self, value: Any, place: str) -> list[Any]:
        """Return them."""
        if not isinstance(value, (list, tuple)) or len(value) != 2:
            _refuse(self, value, place)
        return [self.first.check(value[0], f"{place}[0]"), self.second.check(value[1], f"{place}[1]")]


@dataclass(frozen=True)
class MapOf:
    """Values of one kind by names that are not known in advance."""

    of: Schema
    names: Schema = field(default_factory=Text)
    rule: str = "a record"

    def check(self, value: Any, place: str) -> dict[str, Any]:
        """Return them."""
        if not isinstance(value, dict):
            _refuse(self, value, place)
        return {
            self.names.check(name, f"a name in {place}"): self.of.check(item, _within(place, name))
            for name, item in value.items()
        }


@dataclass(frozen=True)
class Record:
    """Values by name: all of `fields`, any of `optional`; others pass unless the record is closed."""

    fields: Mapping[str, Schema]
    optional: Mapping[str, Schema] = field(default_factory=dict)
    is_closed: bool = False
    rule: str = "a record"

    def check(self, value: Any, place: str) -> dict[str, Any]:
        """Return them."""
        if not isinstance(value, dict):
            _refuse(self, value, place)
        if self.is_closed and (
            others := [x for x in value if x not in self.fields and x not in self.optional]
        ):
            known = ", ".join([*self.fields, *self.optional]) or "nothing"
            raise RecordError(place, f"a record of {known}", f"one with {shown(others[0])}")
        checked = dict(value)
        for name, schema in self.fields.items():
            if name not in value:
                raise RecordError(_within(place, name), schema.rule, "missing")
            checked[name] = schema.check(value[name], _within(place, name))
        for name, schema in self.optional.items():
            if name in value:
                checked[name] = schema.check(value[name], _within(place, name))
        return checked


def read_record(path: Path, schema: Schema, *, what_to_do: str) -> Any:
    """Read a JSON file and check it.

    Args:
        path: The file.
        schema: What it must hold.
        what_to_do: The last sentence of the error.

    Raises:
        DamagedError: It is not JSON, or breaks the schema.
        OSError: It cannot be read.
    """
    try:
        return schema.check(parse_json(read_limited(path)), "")
    except RecordError as mismatch:
        raise DamagedError(f"{path} must be as it was written, but {mismatch}. {what_to_do}") from None
    except ValueError as error:
        raise DamagedError(
            f"{path} must be complete JSON, but is cut short or damaged ({error}). {what_to_do}"
        ) from None


def check_record(schema: Schema, value: Any, *, where: str, error: type[UserError] = UserError) -> Any:
    """Check a value that has been read.

    Raises:
        UserError: The value breaks the schema. It is of the type `error`, and its text begins with `where`.
    """
    try:
        return schema.check(value, "")
    except RecordError as mismatch:
        raise error(f"{where}: {mismatch}.") from None


def parse_json(data: bytes) -> Any:
    """Parse JSON in UTF-8, with or without a byte order mark.

    Raises:
        ValueError: It is not JSON, or is nested deeper than Python can follow.
    """
    try:
        return json.loads(data.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None


def read_limited(path: Path, largest: int = _LARGEST_FILE) -> bytes:
    """Read a file that is small unless it is damaged.

    Raises:
        DamagedError: It is larger than `largest` bytes.
    """
    with path.open("rb") as file:
        data = file.read(largest + 1)
    if len(data) > largest:
        raise DamagedError(f"`{path}` must have at most {largest:,} bytes, but has more. It is another file.")
    return data


def is_unicode(text: str) -> bool:
    """Return whether text can be written as UTF-8. Half a surrogate pair, which JSON and YAML can hold, cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _refuse(schema: Schema, value: Any, place: str) -> NoReturn:
    raise RecordError(place, schema.rule, shown(value))


def _within(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name
