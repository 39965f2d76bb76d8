"""Names of options in other toolkits, and the answer to a user who tries one. The table is `other_names.txt`."""

import re
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path

_TABLE = Path(__file__).with_suffix(".txt")


def answer(prog: str, name: str, known: Collection[str]) -> str:
    """Return the answer to a name of another toolkit, after a blank; "" if the table does not have the name.

    Args:
        prog: the command that it was given to.
        name: the option as written, with or without hyphens before it.
        known: the flags of the command, which depend on its task. An answer that names other flags is skipped.
    """
    if prog not in read_table():
        return ""
    wanted = name.lstrip("-").replace("_", "-").lower()
    for text in read_table()[prog].get(wanted, ()):
        if flags_in(text) <= set(known):
            return f" {text}"
    return ""


def flags_in(text: str) -> set[str]:
    """Return the flags in backquotes. Those are flags of the command itself."""
    return set(re.findall(r"`(--[\w-]+)[^`]*`", text))


@cache
def read_table() -> Mapping[str, Mapping[str, tuple[str, ...]]]:
    """Return the answers to each name, for each command."""
    table: dict[str, dict[str, tuple[str, ...]]] = {}
    answers: dict[str, tuple[str, ...]] = {}
    text = ""
    for line in _TABLE.read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        if line.startswith("["):
            answers = table.setdefault(line.strip("[]"), {})
        elif line.startswith("include "):
            for name, others in table[line.split()[1]].items():
                answers.setdefault(name, others)
        else:
            written, _, names = line.rpartition("|")
            if not line.startswith(" "):
                text = _sentence(written.strip())
            for name in names.split():
                answers[name] = (*answers.get(name, ()), text)
    return table


def _sentence(written: str) -> str:
    return f"Here it is `{written}`." if written.startswith("--") else written
