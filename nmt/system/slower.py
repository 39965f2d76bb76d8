"""Try out what makes training faster; warn where a library does not work here, and it stays slower."""

import warnings
from collections.abc import Callable, Iterator
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


def works(what: str, try_out: Callable[[], None]) -> bool:
    """Return whether `what`, such as "Triton", works, so that `try_out` raises nothing; a warning says why not."""
    try:
        try_out()
    # Triton, the compiler that it calls and the driver raise errors without a common type.
    except Exception as error:
        warn_slower(what, error)
        return False
    return True


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
