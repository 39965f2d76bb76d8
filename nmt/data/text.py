"""What a line of text is. The text itself decides, not the normalisation of some component.

Only a newline ends a line. Every reader of text uses these two functions, so that a line means the same to
preprocessing, translating and scoring, with any SentencePiece model or none.
"""

import unicodedata

_BYTE_ORDER_MARK = "\ufeff"
# White space, control characters (U+0085 NEXT LINE and tab among them), and format characters: joiners, soft
# hyphen, marks of direction, the byte order mark, tags.
_INVISIBLE_CATEGORIES = ("Zs", "Zl", "Zp", "Cc", "Cf")
# Format characters that are visible: signs of Arabic, Syriac and Kaithi that stand before or over a number.
_VISIBLE_FORMATS = frozenset(
    "\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd"
)
# Characters of other categories that are invisible: the grapheme joiner, fillers of Hangul, inherent vowels of
# Khmer, selectors of variants, and the blank of braille.
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
    """Return whether a line is empty, or has only invisible characters."""
    return all(map(_is_invisible, line))


def clean_line(line: str) -> str:
    """Return a line without the carriage return of CRLF and without byte order marks before it.

    A mark may stand within a file if files were joined. A blank line becomes empty.
    """
    line = line.lstrip(_BYTE_ORDER_MARK).rstrip("\r")
    return "" if is_blank(line) else line


def _is_invisible(character: str) -> bool:
    if unicodedata.category(character) in _INVISIBLE_CATEGORIES:
        return character not in _VISIBLE_FORMATS
    return any(first <= ord(character) <= last for first, last in _INVISIBLE_RANGES)
