"""What a line of text is, told by the text itself and not by how some component normalises it.

Only a newline ends a line. Every reader of text goes by these two functions, so that a line means the same to
preprocessing, translating and scoring, with any SentencePiece model or none.
"""

import unicodedata

_BYTE_ORDER_MARK = "\ufeff"
# White space, control characters (U+0085 NEXT LINE and tab among them), and format characters: joiners, soft
# hyphen, marks of direction, the byte order mark, tags.
_INVISIBLE_CATEGORIES = ("Zs", "Zl", "Zp", "Cc", "Cf")
# Format characters that are drawn: signs of Arabic, Syriac and Kaithi that stand before or over a number.
_VISIBLE_FORMATS = frozenset(
    "\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd"
)
# Of other categories, and yet nothing is drawn: the grapheme joiner, fillers of Hangul, inherent vowels of Khmer,
# selectors of variants, and the blank of braille.
_INVISIBLE_RANGES = (
    (0x034F, 0x034F),
    (0x115F, 0x1160),
    (0x17B4, 0x17B5),
    (0x180B, 0x180F),
    (0x2065, 0x2065),
    (0x2800, 0x2800),
    (0x3164, 0x3164),
    (0xFE00, 0xFE0F),
    (0xFFA0, 0xFFA0),
    (0xFFF0, 0xFFF8),
    (0xE0000, 0xE0FFF),
)


def is_blank(line: str) -> bool:
    """Return whether there is nothing to be seen on a line: it is empty, or all its characters are invisible."""
    return all(map(_is_invisible, line))


def clean_line(line: str) -> str:
    """Return a line as it is meant: without the carriage return of CRLF and without byte order marks before it.

    A mark stands within a file where files were put one after another. A blank line becomes empty.
    """
    line = line.lstrip(_BYTE_ORDER_MARK).rstrip("\r")
    return "" if is_blank(line) else line


def _is_invisible(character: str) -> bool:
    if unicodedata.category(character) in _INVISIBLE_CATEGORIES:
        return character not in _VISIBLE_FORMATS
    return any(first <= ord(character) <= last for first, last in _INVISIBLE_RANGES)
