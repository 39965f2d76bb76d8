"""Ranges of numbers: one for all options, and narrower ones of single options, so that no arithmetic overflows."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from nmt.config.fields import key_of
from nmt.errors import UserError

_LARGEST_WHOLE = 2**31 - 1  # the largest size or count that libraries take
_LARGEST = 1e30  # float32 ends at 3.4e38
Range = tuple[float, float]
ANY: Range = (-math.inf, math.inf)  # for a field whose own `check` has the range


class Limits(NamedTuple):
    """The values that make sense for an option. A float must also be finite."""

    least: float | None = None
    above: float | None = None
    below: float | None = None
    most: float | None = None

    def hold(self, number: float) -> bool:
        """Return whether a number is within."""
        return (
            (self.least is None or number >= self.least)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
            and (self.most is None or number <= self.most)
            and (isinstance(number, int) or math.isfinite(number))
        )

    def __str__(self) -> str:
        """Say the rule, to follow "must be"."""
        lower = [f"at least {self.least:g}"] if self.least is not None else []
        lower += [f"above {self.above:g}"] if self.above is not None else []
        upper = [f"below {self.below:g}"] if self.below is not None else []
        upper += [f"at most {self.most:g}"] if self.most is not None else []
        if not upper and isinstance(self.least, float):
            return "finite and not negative" if self.least == 0 else f"finite and {lower[0]}"
        if not upper and isinstance(self.above, float):
            return f"{lower[0]} and finite"
        return " and ".join(lower + upper)


def limits(
    *,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    most: float | None = None,
    fixed: bool = False,
) -> dict[str, Any]:
    """Return the metadata of a field of options that has limits.

    Args:
        least: The smallest number that may be given.
        above: Numbers must be larger than this.
        below: Numbers must be smaller than this.
        most: The largest number that may be given.
        fixed: Like `metadata={"fixed": True}`: the option may not change when a run is resumed.
    """
    return {"limits": Limits(least, above, below, most), **({"fixed": True} if fixed else {})}


def check_limits(options: Any) -> None:
    """Check the fields of one dataclass of options that have limits; None and text are not numbers.

    Raises:
        UserError: The first number that is out of its limits.
    """
    for field in dataclasses.fields(options):
        own: Limits | None = field.metadata.get("limits")
        value = getattr(options, field.name)
        if own is not None and not all(map(own.hold, _numbers(value))):
            is_, said = ("are", str(value)) if isinstance(value, tuple) else ("is", _plain(value))
            raise UserError(f"`{key_of(field.name)}` must be {own}, but {is_} {said}.")


def check_numbers(options: Any) -> None:
    """Check the numbers of one dataclass of options: finite, and whole numbers within 32 bits.

    A field with `metadata={"range": (lowest, highest)}` has its own range instead.

    Raises:
        UserError: The first number that is out of its range.
    """
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        for number in _numbers(value):
            own: Range | None = field.metadata.get("range")
            largest = _LARGEST_WHOLE if isinstance(number, int) else _LARGEST
            if own is not None:
                _check(field.name, number, own)
            elif not abs(number) <= largest:
                rule = f"at most {_show(largest)}" if number > 0 else f"at least {_show(-largest)}"
                raise UserError(
                    f"`{key_of(field.name)}` must be {rule}, but is {_show(number)}. Give another."
                )


def check_ranges(options: Any, ranges: Mapping[str, Range]) -> None:
    """Check fields of options that must lie from one number to another; None and text are not numbers.

    Raises:
        UserError: The first number that does not.
    """
    for name, own in ranges.items():
        for number in _numbers(getattr(options, name)):
            _check(name, number, own)


def _check(name: str, number: float, own: Range) -> None:
    lowest, highest = own
    if not lowest <= number <= highest:
        rule = f"from {_show(lowest)} to {_show(highest)}"
        if math.isinf(highest) or math.isinf(lowest):
            rule = f"at least {_show(lowest)}" if math.isinf(highest) else f"at most {_show(highest)}"
        raise UserError(f"`{key_of(name)}` must be {rule}, but is {_show(number)}.")


def _numbers(value: Any) -> list[float]:
    """Return the numbers of an option: none, one or several."""
    several = value if isinstance(value, tuple) else (value,)
    return [x for x in several if isinstance(x, (int, float)) and not isinstance(x, bool)]


def _plain(number: float) -> str:
    return str(number) if abs(number) < 2**63 else _show(number)


def _show(number: float) -> str:
    if isinstance(number, int) and abs(number) < 2**63:
        return f"{number:,}" if abs(number) >= 10_000 else str(number)
    try:
        return f"{float(number):g}"
    except OverflowError:
        return "a number of hundreds of digits"
