"""Sentences beside their translations, as a Markdown table."""

from collections.abc import Iterable
from typing import NamedTuple

# What Markdown, or the HTML that it becomes, would take for a mark; an entity is text in every dialect.
_AS_TEXT = str.maketrans({mark: f"&#{ord(mark)};" for mark in "&<>|\\`*_[]~$"})


class Row(NamedTuple):
    """A sentence, what a person made of it, and what the model makes of it."""

    source: str
    reference: str
    translation: str


def markdown_table(rows: Iterable[Row]) -> str:
    """Return a table with a row for each sentence; the texts are shown as they are, whatever is in them."""
    lines = ["| source | reference | translation |", "|---|---|---|"]
    for row in rows:
        cells = (" ".join(text.split()).translate(_AS_TEXT) for text in row)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
