"""Places of the machine, and the remark that replaces them in model folders, which are published.

A place is a `Path`, or text that is an absolute path to something that is, or could be, on this machine. It may
stand after NAME=, as in arguments.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

UNTOLD = "(a path that the model folder does not tell)"
_FEWEST_PARTS = 3  # of a path, including its root: "/" and "/x" often mean something else


def hide_places(value: Any) -> Any:
    """Return the value of an option with `UNTOLD` for each place in it; text stays text, a path a path."""
    if isinstance(value, list | tuple):
        return tuple(hide_places(item) for item in value)
    if isinstance(value, Path):
        return Path(UNTOLD)
    if not isinstance(value, str):
        return value
    if _is_place(value):
        return UNTOLD
    name, equals, rest = value.partition("=")
    return f"{name}={UNTOLD}" if equals and _is_place(rest) else value


def is_untold(value: Any) -> bool:
    """Return whether a value, or an item of it, is the remark that replaces a place."""
    if isinstance(value, list | tuple):
        return any(map(is_untold, value))
    return UNTOLD in str(value)


def _is_place(text: str) -> bool:
    path = Path(text)
    if not path.is_absolute() or len(path.parts) < _FEWEST_PARTS:
        return False
    with suppress(OSError):  # for example, a name may be too long
        return path.exists() or path.parent.is_dir()
    return False
