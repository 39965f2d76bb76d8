"""What translation needs besides the weights: two languages, their vocabularies, and how to split text."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from nmt.config.records import LANGUAGE, Flag, Record, read_record
from nmt.data.data_directory import MODEL_NAME, DataDirectory, dictionary_name
from nmt.data.segmenter import PieceSegmenter, Segmenter
from nmt.data.vocabulary import Vocabulary
from nmt.errors import DamagedError

_TAKE_AGAIN = "Take the whole model folder again."
_LANGUAGES = "languages.json"
_RECORD = Record({"source_lang": LANGUAGE, "target_lang": LANGUAGE}, optional={"segmenter": Flag()})


@dataclass(frozen=True)
class TranslationAssets:
    """The files of a model folder or a data directory that are not weights or examples."""

    source_lang: str
    target_lang: str
    folder: Path
    """Holds `dict.<lang>.txt` of both languages."""
    segmenter: Path | None
    """The SentencePiece model; None if texts are in pieces, joined by blanks, on both sides."""

    @classmethod
    def of_model(cls, folder: Path) -> TranslationAssets:
        """Find the assets of a model folder.

        Raises:
            UserError: A file is missing or damaged.
        """
        path = folder / _LANGUAGES
        try:
            record = read_record(path, _RECORD, what_to_do=_TAKE_AGAIN)
        except FileNotFoundError:
            raise DamagedError(
                f"`{path}` must be a file of the model folder, but is missing. {_TAKE_AGAIN}"
            ) from None
        segmenter = folder / MODEL_NAME if record.get("segmenter", True) else None
        if segmenter is not None and not segmenter.is_file():
            raise DamagedError(f"`{segmenter}` must exist, but is missing. {_TAKE_AGAIN}")
        return cls(record["source_lang"], record["target_lang"], folder=folder, segmenter=segmenter)

    @classmethod
    def of_data(cls, directory: DataDirectory) -> TranslationAssets:
        """Find the assets of a data directory."""
        return cls(
            directory.source_lang,
            directory.target_lang,
            folder=directory.path,
            segmenter=directory.segmenter_path,
        )

    def vocabulary(self, lang: str) -> Vocabulary:
        """Read the vocabulary of one of the two languages."""
        return Vocabulary.load(self.folder / dictionary_name(lang))

    def make_segmenter(self, vocabulary: Vocabulary) -> Segmenter | PieceSegmenter:
        """Return the object that turns text into ids of a vocabulary, and back."""
        return PieceSegmenter(vocabulary) if self.segmenter is None else Segmenter(self.segmenter, vocabulary)

    def save(self, folder: Path) -> None:
        """Copy them into a model folder."""
        if self.segmenter is not None:
            shutil.copyfile(self.segmenter, folder / MODEL_NAME)
        for lang in (self.source_lang, self.target_lang):
            shutil.copyfile(self.folder / dictionary_name(lang), folder / dictionary_name(lang))
        record: dict[str, object] = {"source_lang": self.source_lang, "target_lang": self.target_lang}
        if self.segmenter is None:
            record["segmenter"] = False
        (folder / _LANGUAGES).write_text(json.dumps(record) + "\n", encoding="utf-8")


def is_same_file(before: Path, now: Path) -> bool:
    """Return whether two files of assets with the same name mean the same to a model.

    A model needs only the tokens of a dictionary and their order. The counts, which say how often a token was in
    some text, do not matter.
    """
    if before.read_bytes() == now.read_bytes():
        return True
    is_dictionary = now.name.startswith("dict.") and now.suffix == ".txt"
    return is_dictionary and Vocabulary.load(before) == Vocabulary.load(now)
