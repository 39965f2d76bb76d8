"""Languages behind the codes that name them: `zh`, `zh-TW`, `zho_Hans`, `cmn`, `chi`, `zh_CN` are one.

A code's first part names the language by two letters (ISO 639-1) or three (639-2, 639-3); the other parts name
script, country or variant (BCP 47, NLLB, mBART).
"""

import re

# Only languages that are treated in a way of their own. By ISO 639-2 and 639-3, kinds of Chinese among them, which
# are written in the same characters; `jp` and `cn` are countries, but often taken for their languages.
_CODES = {
    "zh": "zho chi cmn yue wuu gan hak nan hsn cjy cpx cdo mnp cnp csp czh czo lzh cn chinese mandarin cantonese",
    "ja": "jpn jp japanese",
    "ko": "kor korean",
    "th": "tha nod tts thai",
    "lo": "lao",
    "km": "khm kxm khmer",
    "my": "mya bur burmese myanmar",
    "bo": "bod tib adx khg tibetan",
    "dz": "dzo dzongkha",
}
_LETTERS_OF = {name: language for language, names in _CODES.items() for name in names.split()}
_WRITTEN_WITHOUT_BLANKS = ("zh", "ja", "th", "lo", "km", "my", "bo", "dz")
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
    return re.split(r"[-_.@]", code.lower())
