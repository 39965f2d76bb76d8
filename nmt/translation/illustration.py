"""Sentences beside their translations, as a Markdown table."""

from collections.abc import Iterable
from typing import NamedTuple

# Characters that Markdown, or the HTML made from it, takes for marks. An entity is plain text in all dialects.
_AS_TEXT = str.maketrans({mark: f"&#{ord(mark)};" for mark in "&<>|\\`*_[]~$"})


class Row(NamedTuple):
    """A sentence, a translation by a person, and the translation by the model."""

    source: str
    reference: str
    translation: str


def markdown_table(rows: Iterable[Row]) -> str:
    """Return a table with a row for each sentence; the texts appear exactly as they are."""
    lines = ["| source | reference | translation |", "|---|---|---|"]
    for row in rows:
        cells = (" ".join(text.split()).translate(_AS_TEXT) for text in row)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
