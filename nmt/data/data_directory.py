"""The data directories of nmt-preprocess, opened and checked. Those of fairseq-preprocess are opened, too."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from nmt.config.records import LANGUAGE, NAME, MapOf, Record, Whole, read_record
from nmt.data.indexed_dataset import IndexedDataset, bin_path, idx_path
from nmt.data.vocabulary import Vocabulary
from nmt.errors import DamagedError, UserError, counted

FORMAT_VERSION = 1
RECORD_NAME = "preprocess.json"
MODEL_NAME = "sentencepiece.model"
SPLITS = ("train", "valid", "test")

_MAKE_AGAIN = "Make it again with nmt-preprocess."
_VERSION = Record({"format_version": Whole()})
_RECORD = Record(
    {
        "files": MapOf(Whole(), names=NAME),
        "source_lang": LANGUAGE,
        "target_lang": LANGUAGE,
        "vocabulary_size": Whole(),
        "splits": MapOf(Record({"pairs": Whole()})),
    }
)


def split_name(split: str, source_lang: str, target_lang: str, lang: str) -> str:
    """Return the name of one side of a split, to which `.bin` and `.idx` are added."""
    return f"{split}.{source_lang}-{target_lang}.{lang}"


def dictionary_name(lang: str) -> str:
    """Return the name of a language's dictionary."""
    return f"dict.{lang}.txt"


def find_language_pair(path: Path) -> tuple[str, str] | None:
    """Return source and target language from the names of binarised splits, or None if there is no split.

    Raises:
        UserError: The names have more than one pair of languages.
    """
    pairs = {
        (match[1], match[2])
        for file in path.glob("*.idx")
        if (match := re.fullmatch(r"\w+\.([^.]+?)-([^.]+)\.(?:\1|\2)\.idx", file.name))
    }
    if len(pairs) > 1:
        named = ", ".join(sorted("-".join(pair) for pair in pairs))
        raise UserError(
            f"{path} must hold data of one pair of languages, but holds {named}. Give each pair a folder."
        )
    return pairs.pop() if pairs else None


class DataDirectory:
    """A directory of binarised splits, with the SentencePiece model and the dictionaries they were made with.

    A directory of fairseq-preprocess has no record, no raw text and no SentencePiece model. The names of its files
    say what is there.

    Attributes:
        path: Where it is.
        record: The content of its `preprocess.json`.
        source_lang: Source language.
        target_lang: Target language.
        segmenter_path: The SentencePiece model, if there is one.
        has_raw_text: Whether there are `raw_path`s.
    """

    def __init__(self, path: Path) -> None:
        """Read its record, and check that every file is there in full size.

        Raises:
            UserError: It is not a data directory, has another version, or a file is missing or cut short.
        """
        self.path = Path(path)
        # A directory of nmt-preprocess without its record is damaged. It is not one of fairseq's.
        is_ours = any((self.path / name).exists() for name in (RECORD_NAME, MODEL_NAME))
        pair = None if is_ours else find_language_pair(self.path)
        self.has_raw_text = pair is None
        self.record = _read_record(self.path) if pair is None else _fairseq_record(self.path, *pair)
        self.source_lang: str = self.record["source_lang"]
        self.target_lang: str = self.record["target_lang"]
        self.segmenter_path = self.path / MODEL_NAME if pair is None else None

    def vocabulary(self, lang: str) -> Vocabulary:
        """Read the dictionary of one of the two languages."""
        path = self.path / dictionary_name(self._check_language(lang))
        vocabulary = Vocabulary.load(path)
        if len(vocabulary) != self.record.get("vocabulary_size", len(vocabulary)):
            raise UserError(
                f"{path} must have {counted(self.record['vocabulary_size'], 'token')} with the special ones, as "
                f"{RECORD_NAME} says, but has {len(vocabulary):,}. {_MAKE_AGAIN}"
            )
        return vocabulary

    def has_split(self, split: str) -> bool:
        """Return whether the split exists: `train`, `valid` or `test`."""
        return split in self.record["splits"]

    def num_pairs(self, split: str) -> int:
        """Return the number of pairs of a split."""
        return int(self.record["splits"][self._check_split(split)]["pairs"])

    def split_prefix(self, split: str, lang: str) -> Path:
        """Return the path prefix of the `IndexedDataset` of one side of a split."""
        self._check_split(split)
        self._check_language(lang)
        return self.path / split_name(split, self.source_lang, self.target_lang, lang)

    def raw_path(self, split: str, lang: str) -> Path:
        """Return the path of the raw text of `valid` or `test`: line i is pair i. Only a newline ends a line."""
        self._check_split(split)
        assert self.has_raw_text, "fairseq-preprocess keeps no raw text"
        assert split != "train", "the raw training text is not kept"
        return self.path / f"{split}.{self._check_language(lang)}"

    def _check_split(self, split: str) -> str:
        if not self.has_split(split):
            there = ", ".join(self.record["splits"])
            known = split in SPLITS
            what_to_do = (
                f"Make it again with nmt-preprocess --{split}pref." if known else "Name one of these."
            )
            raise UserError(f"{self.path} must have the split `{split}`, but has {there}. {what_to_do}")
        return split

    def _check_language(self, lang: str) -> str:
        assert lang in (self.source_lang, self.target_lang), f"{lang} is none of the two languages"
        return lang


def _fairseq_record(path: Path, source_lang: str, target_lang: str) -> dict[str, Any]:
    """Return the record that a directory of fairseq-preprocess would have.

    Raises:
        UserError: A file of a split is missing.
    """
    splits = {}
    for split in SPLITS:
        prefixes = [
            path / split_name(split, source_lang, target_lang, lang) for lang in (source_lang, target_lang)
        ]
        files = [file for prefix in prefixes for file in (bin_path(prefix), idx_path(prefix))]
        missing = [file for file in files if not file.is_file()]
        if missing and len(missing) < len(files):
            raise UserError(f"{missing[0]} must exist beside the other files of `{split}`, but is missing.")
        if not missing:
            splits[split] = {"pairs": len(IndexedDataset(prefixes[0]))}
    return {"source_lang": source_lang, "target_lang": target_lang, "splits": splits}


def _read_record(directory: Path) -> dict[str, Any]:
    path = directory / RECORD_NAME
    if not directory.is_dir():
        raise UserError(
            f"{directory} must be a data directory, but there is none. Make it with nmt-preprocess."
        )
    if not path.is_file():
        raise UserError(f"{directory} must be a data directory, but has no {RECORD_NAME}. {_MAKE_AGAIN}")
    version = read_record(path, _VERSION, what_to_do=_MAKE_AGAIN)["format_version"]
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} must be of format version {FORMAT_VERSION}, but is of {version}. {_MAKE_AGAIN}"
        )
    record: dict[str, Any] = read_record(path, _RECORD, what_to_do=_MAKE_AGAIN)
    for name, size in record["files"].items():
        _check_size(directory / name, size)
    return record


def _check_size(path: Path, size: int) -> None:
    try:
        actual = path.stat().st_size
    except FileNotFoundError:
        raise DamagedError(
            f"{path} must exist, as {RECORD_NAME} says, but is missing. {_MAKE_AGAIN}"
        ) from None
    if actual != size:
        what = "is cut short" if actual < size else "was changed"
        raise DamagedError(f"{path} {what}: it must have {size:,} bytes, but has {actual:,}. {_MAKE_AGAIN}")
