"""Languages behind the codes that name them: `zh`, `zh-TW`, `zho_Hans`, `cmn`, `chi`, `zh_CN` are one.

A code's first part names the language by two letters (ISO 639-1) or three (639-2, 639-3); the other parts name
script, country or variant (BCP 47, NLLB, mBART).
"""

import re
from collections import Counter

# Only languages that are treated in a way of their own. By ISO 639-2 and 639-3, kinds of Chinese among them, which
# are written in the same characters; `jp` and `cn` are countries, but often taken for their languages.
_CODES = {
    "zh": "zho chi cmn yue wuu gan hak nan hsn cjy cpx cdo mnp cnp csp czh czo lzh cn chinese mandarin cantonese",
    "ja": "jpn jp japanese",
    "ko": "kor korean",
    "th": "tha nod tts thai",
    "lo": "lao",
    "km": "khm kxm khmer",
    "my": "mya bur shn mnw blk burmese myanmar",
    "bo": "bod tib adx khg tibetan",
    "dz": "dzo dzongkha",
}
_LETTERS_OF = {name: language for language, names in _CODES.items() for name in names.split()}
_WRITTEN_WITHOUT_BLANKS = ("zh", "ja", "th", "lo", "km", "my", "bo", "dz")
# Letters by which a language is told.
_SCRIPTS = (
    ("th", 0x0E01, 0x0E5B),
    ("lo", 0x0E81, 0x0EDF),
    ("bo", 0x0F40, 0x0FBC),
    ("my", 0x1000, 0x109F),
    ("km", 0x1780, 0x17D3),
    ("ja", 0x3041, 0x30FF),
    ("zh", 0x3400, 0x9FFF),
    ("ko", 0xAC00, 0xD7A3),
    ("zh", 0x20000, 0x3134F),
)
_OTHER_SCRIPTS = ("latn", "cyrl", "arab", "hebr", "grek", "deva")  # romanised and the like: words have blanks


def language_of(code: str) -> str:
    """Return the language that a code names: by two letters where it is one of `_CODES`, else its first part."""
    language = _parts(code)[0]
    return _LETTERS_OF.get(language, language)


def has_own_writing(code: str) -> bool:
    """Return whether a code does not say that its language is written in another script than its own."""
    return not any(part in _OTHER_SCRIPTS for part in _parts(code)[1:])


def is_written_without_blanks(code: str) -> bool:
    """Return whether words of a language stand side by side without blanks."""
    return language_of(code) in _WRITTEN_WITHOUT_BLANKS and has_own_writing(code)


def _parts(code: str) -> list[str]:
    """Return the parts of a code in small letters, without what stands around it: `<2zh>`, `__zh__`, ` zh`."""
    return re.split(r"[-_.@]", code.lower().strip("<>2_ "))


def is_named_otherwise(code: str, guess: str) -> bool:
    """Return whether a code does not say that a language is to be treated as the one that its letters tell."""
    if guess in ("zh", "ja", "ko"):
        return language_of(code) != guess
    return not is_written_without_blanks(code)  # others share a script, and are treated alike


def guess_language(text: str) -> str | None:
    """Return the language that most letters of a text belong to, if its words have no blanks or are BLEU's own.

    Japanese is told by its own letters, which hardly any of its sentences is without; else Han is Chinese.
    """
    counts = Counter(script for letter in text if (script := _script(letter)) is not None)
    num_letters = sum(letter.isalpha() for letter in text)
    if 10 * counts["ja"] >= counts["ja"] + counts["zh"] > 0:
        counts["ja"] += counts.pop("zh", 0)
    language, number = max(counts.items(), key=lambda item: item[1], default=(None, 0))
    return language if 2 * number > num_letters else None


def _script(letter: str) -> str | None:
    place = ord(letter)
    return next((code for code, first, last in _SCRIPTS if first <= place <= last), None)
