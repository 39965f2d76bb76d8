"""Ranges of numbers: what every option keeps to, and those of single options, so that no arithmetic runs over."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from nmt.errors import UserError

_LARGEST_WHOLE = 2**31 - 1  # what libraries take for sizes and counts
_LARGEST = 1e30  # float32 ends at 3.4e38
Range = tuple[float, float]
ANY: Range = (-math.inf, math.inf)  # of a field whose `check` knows better


def check_numbers(options: Any) -> None:
    """Check the numbers of one dataclass of options: finite, and whole ones within 32 bits.

    A field with `metadata={"range": (lowest, highest)}` has its own range instead.

    Raises:
        UserError: The first number that is out of its range.
    """
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        numbers = value if isinstance(value, tuple) else (value,)
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                continue
            own: Range | None = field.metadata.get("range")
            largest = _LARGEST_WHOLE if isinstance(number, int) else _LARGEST
            if own is not None:
                _check(field.name, number, own)
            elif not abs(number) <= largest:
                rule = f"at most {_show(largest)}" if number > 0 else f"at least {_show(-largest)}"
                raise UserError(
                    f"`{_flag(field.name)}` must be {rule}, but is {_show(number)}. Give another."
                )


def check_ranges(options: Any, ranges: Mapping[str, Range]) -> None:
    """Check fields of options that must lie from one number to another; None and text are no numbers.

    Raises:
        UserError: The first one that does not.
    """
    for name, own in ranges.items():
        value = getattr(options, name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, (int, float)) and not isinstance(number, bool):
                _check(name, number, own)


def _check(name: str, number: float, own: Range) -> None:
    lowest, highest = own
    if not lowest <= number <= highest:
        rule = f"from {_show(lowest)} to {_show(highest)}"
        if math.isinf(highest) or math.isinf(lowest):
            rule = f"at least {_show(lowest)}" if math.isinf(highest) else f"at most {_show(highest)}"
        raise UserError(f"`{_flag(name)}` must be {rule}, but is {_show(number)}.")


def _show(number: float) -> str:
    if isinstance(number, int) and abs(number) < 2**63:
        return f"{number:,}" if abs(number) >= 10_000 else str(number)
    try:
        return f"{float(number):g}"
    except OverflowError:
        return "a number of hundreds of digits"


def _flag(name: str) -> str:
    return name.rstrip("_").replace("_", "-")
