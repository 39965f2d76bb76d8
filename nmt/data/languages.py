"""The languages that codes name: `zh`, `zh-TW`, `zho_Hans`, `cmn`, `chi`, `zh_CN` are one language.

The first part of a code names the language by two letters (ISO 639-1) or three (639-2, 639-3). The other parts
name script, country or variant (BCP 47, NLLB, mBART).
"""

import re
from collections import Counter

# Only languages that need a treatment of their own. The codes are those of ISO 639-2 and 639-3, also of the kinds
# of Chinese, which share their characters. `jp` and `cn` are countries, but often used for the languages.
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
# Letters by which a language is recognised.
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
    """Return whether a code leaves its language in its own script, and names no other one."""
    return not any(part in _OTHER_SCRIPTS for part in _parts(code)[1:])


def is_written_without_blanks(code: str) -> bool:
    """Return whether a language is written without blanks between words."""
    return language_of(code) in _WRITTEN_WITHOUT_BLANKS and has_own_writing(code)


def _parts(code: str) -> list[str]:
    """Return the parts of a code in small letters, without signs around it as in `<2zh>`, `__zh__`, ` zh`."""
    return re.split(r"[-_.@]", code.lower().strip("<>2_ "))


def is_named_otherwise(code: str, guess: str) -> bool:
    """Return whether a code asks for another treatment than the language that the letters of a text suggest."""
    if guess in ("zh", "ja", "ko"):
        return language_of(code) != guess
    return not is_written_without_blanks(code)  # others share a script, and are treated alike


def guess_language(text: str) -> str | None:
    """Return the language of most letters of a text, if it has no blanks between words or a BLEU of its own.

    Japanese is recognised by its own letters, which nearly every Japanese sentence has. Otherwise Han is Chinese.
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
