"""The exceptions that are shown as one line, and how foreign text and numbers are shown in it."""

import re

_LONGEST_VALUE = 80
_LONGEST_WORD = 300  # longer than most paths, which are left whole
_LONGEST_LINE = 2000
_MOST_ITEMS = 6
_DEEPEST = 2  # levels of nested containers that are shown of a value
_LONG_WORD = re.compile(rf"\S{{{_LONGEST_WORD},}}")

EXIT_RESUMABLE = 75
"""nmt-train's exit code if the same command goes on: EX_TEMPFAIL of sysexits.h, which means "try again". No shell,
signal or Python uses it by itself."""


class UserError(ValueError):
    """Something that a user can cause and put right.

    The commands show it as one line, without a traceback, and exit with code 2. Its text says what is
    wrong, where, and what to do: "`name` must be <rule>, but is <value>. <What to do>." The text is always one
    line of printable characters, and not longer than a few lines of a terminal.
    """

    def __init__(self, text: str) -> None:
        """Take the text, and change it as `one_line` does."""
        super().__init__(one_line(text))


class DamagedError(UserError):
    """A file that one of the commands wrote is not as it was written."""


class UnreadableExamplesError(UserError):
    """Examples cannot be read, such as those of a damaged file; a run saves what it has learned before it ends."""


class LostRankError(UserError):
    """Another rank of the run has ended or does not answer. Starting the run again resumes it.

    The commands end with `exit_code` at once, without waiting for the other ranks.
    """

    exit_code = EXIT_RESUMABLE


def one_line(text: str) -> str:
    """Return text as one line for a terminal: no control characters, and not too long.

    The text may hold anything that was found in a file. An escape sequence is shown as `\\x1b...`, a word of
    hundreds of characters is cut, and a text that is too long loses its middle.
    """
    line = printable(" ".join(text.split("\n")))
    line = _LONG_WORD.sub(lambda match: _cut(match[0], _LONGEST_VALUE), line)
    return _cut(line, _LONGEST_LINE)


def printable(text: str) -> str:
    """Return text with the characters that do not print as escapes: control characters, lone surrogates."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(value: object, *, depth: int = 0) -> str:
    """Return a value for an error text: its `repr`, of about 80 characters at most.

    The value may be of any size and depth.
    """
    if isinstance(value, (str, bytes)):
        return _cut(printable(repr(value[: 2 * _LONGEST_VALUE])), _LONGEST_VALUE)
    if isinstance(value, int) and value.bit_length() > 3 * _LONGEST_VALUE:
        return f"a number of some {int(value.bit_length() * 0.30103):,} digits"
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)) and depth < _DEEPEST:
        items = [shown(item, depth=depth + 1) for item in value[:_MOST_ITEMS]]
        if len(value) > _MOST_ITEMS:
            items.append("...")
        left, right = "[]" if isinstance(value, list) else "()"
        return _cut(f"{left}{', '.join(items)}{right}", _LONGEST_VALUE)
    if isinstance(value, (list, tuple, dict, set)):
        kind = {list: "a list", tuple: "a tuple", set: "a set"}.get(type(value), "a record")
        return f"{kind} of {len(value):,}"
    return _cut(printable(type(value).__name__), _LONGEST_VALUE)


def counted(count: int, one: str, many: str | None = None) -> str:
    """Return a number with its noun: `one` for a single thing, else `many`, or `one` with an s.

    >>> counted(1, "pair"), counted(2000, "pair"), counted(0, "query", "queries")
    ('1 pair', '2,000 pairs', '0 queries')
    """
    return f"{count:,} {one if count == 1 else many or f'{one}s'}"


def by_number(count: int, one: str, many: str) -> str:
    """Return the word, such as a verb, that goes with one thing or with several."""
    return one if count == 1 else many


def _cut(text: str, longest: int) -> str:
    """Leave out the middle of a text that is too long; its end often says what to do."""
    if len(text) <= longest:
        return text
    end = longest // 3
    return f"{text[: longest - end - 3]}...{text[-end:]}"
