"""Warnings that something works, but slower than it could, because a library does not work here."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


class SlowerWarning(UserWarning):
    """Something is slower than it could be; the text says what and why."""


def warn_slower(what: str, error: Exception) -> None:
    """Warn that `what`, such as "Triton", does not work here, and that training is slower without it."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[-1][:200]
    warnings.warn(
        f"training is slower than it could be: {what} does not work here ({reason})",
        SlowerWarning,
        stacklevel=3,
    )


@contextmanager
def telling_what_is_slower(lines: list[str]) -> Iterator[None]:
    """Add a line for each `SlowerWarning` of the block to `lines`; other warnings are shown as usual."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SlowerWarning)
        yield
    for warning in caught:
        if issubclass(warning.category, SlowerWarning):
            lines.append(f"warning: {warning.message}")
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
