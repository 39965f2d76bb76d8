"""Places of the machine, and what stands for them where they are not told: in model folders, which are published.

A place is a `Path`, or text that is an absolute path to something that is, or could be, on this machine; also
after NAME=, as arguments have it.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

UNTOLD = "(a path that the model folder does not tell)"
_FEWEST_PARTS = 3  # of a path, its root included: "/" and "/x" may well mean something else


def hide_places(value: Any) -> Any:
    """Return the value of an option with `UNTOLD` for each place in it; of the same type, as far as text goes."""
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
    """Return whether a value, or an item of it, is a place that has not been told."""
    if isinstance(value, list | tuple):
        return any(map(is_untold, value))
    return UNTOLD in str(value)


def _is_place(text: str) -> bool:
    path = Path(text)
    if not path.is_absolute() or len(path.parts) < _FEWEST_PARTS:
        return False
    with suppress(OSError):  # such as a name that is too long
        return path.exists() or path.parent.is_dir()
    return False
