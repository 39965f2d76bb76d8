"""The options of preprocessing and of batching. Imports no torch."""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from nmt.config.fields import key_of
from nmt.config.ranges import check_limits, check_ranges, limits
from nmt.config.records import is_unicode
from nmt.errors import UserError, shown

MOST_PIECES = 10_000_000  # of a vocabulary; larger ones have not been heard of
MOST_WORKERS = 256  # processes, of some 150 MB each


@dataclass(frozen=True)
class PreprocessOptions:
    """What to make a data directory of, and how."""

    source_lang: str
    """Source language: the last part of the names of the source files, as `en` in `train.en`."""
    target_lang: str
    """Target language: the last part of the names of the target files."""
    destdir: Path
    """The data directory to make."""
    trainpref: str | None = None
    """Prefix of the training files: `DIR/train` for `DIR/train.en` and `DIR/train.de`, or both with `.gz`."""
    validpref: str | None = None
    """Prefix of the validation files."""
    testpref: str | None = None
    """Prefix of the test files."""
    sentencepiece_model: Path | None = None
    """Take this SentencePiece model; without it, one is trained on both sides of the training text."""
    vocab_size: int = field(default=8000, metadata=limits(least=1))
    """Size of the joint vocabulary, special symbols included; lowered if the text yields fewer pieces."""
    model_type: Literal["bpe", "unigram"] = "bpe"
    """Kind of SentencePiece model."""
    character_coverage: float = 0.9995
    """Share of the text's characters to have their own piece; the others are spelled in bytes."""
    extra_symbols: tuple[str, ...] = ()
    """Strings that are always one piece, such as `<formal>`."""
    normalization: Literal["nmt_nfkc", "nfkc", "identity"] = "nmt_nfkc"
    """How text is changed before it is split, and so what translations look like. nmt_nfkc: compatible characters
    become one (… becomes ..., ½ becomes 1⁄2), control characters go, every white space is a blank. nfkc: the first
    of these alone. identity: characters stay as they are."""
    max_length: int = 1024
    """Drop training pairs with a longer side than this, in pieces, the end of sentence included."""
    workers: int = field(default=1, metadata=limits(least=1))
    """Number of processes; the result does not depend on it."""
    overwrite: bool = False
    """Replace the data directory that is there. It must hold nothing else, a run or raw text for example."""

    def check(self) -> None:
        """Raise `UserError` for values that make no sense alone or together."""
        for name, language in (("source-lang", self.source_lang), ("target-lang", self.target_lang)):
            if (
                not language
                or any(character in "/\\" or character.isspace() for character in language)
                or not is_unicode(language)
            ):
                raise UserError(
                    f"`{name}` must be a part of a file name, such as `en`, but is {shown(language)}."
                )
        if self.source_lang == self.target_lang:
            raise UserError(
                f"`source-lang` and `target-lang` must differ, but both are `{self.source_lang}`."
            )
        if self.trainpref is None and self.sentencepiece_model is None:
            raise UserError(
                "`trainpref` or `sentencepiece-model` must be given, but both are missing. "
                "Name the training text to train a SentencePiece model on."
            )
        if self.trainpref is None and self.validpref is None and self.testpref is None:
            raise UserError(
                "`trainpref`, `validpref` or `testpref` must be given, but all are missing. Name a text."
            )
        check_ranges(self, {"vocab_size": (1, MOST_PIECES), "workers": (1, MOST_WORKERS)})
        if self.max_length < 2:
            raise UserError(
                f"`max-length` must be at least 2, a piece and the end, but is {self.max_length}."
            )
        if not 0.98 <= self.character_coverage <= 1.0:
            raise UserError(f"`character-coverage` must be from 0.98 to 1, but is {self.character_coverage}.")
        for symbol in self.extra_symbols:
            if not symbol or any(character.isspace() for character in symbol):
                raise UserError(f"`extra-symbols` must be without white space, but one is {shown(symbol)}.")
            if not is_unicode(symbol):
                raise UserError(
                    f"`extra-symbols` must be text, but one is {shown(symbol)}, which the locale makes of it. "
                    "Set LC_ALL=C.UTF-8."
                )
        if len(set(self.extra_symbols)) < len(self.extra_symbols):
            raise UserError(f"`extra-symbols` must differ, but are {' '.join(self.extra_symbols)}.")
        self._check_training_options_are_used()

    def _check_training_options_are_used(self) -> None:
        """Refuse options of the training of a SentencePiece model where there is none."""
        if self.sentencepiece_model is None:
            return
        defaults = {option.name: option.default for option in dataclasses.fields(self)}
        for name in (
            "vocab_size",
            "model_type",
            "character_coverage",
            "extra_symbols",
            "normalization",
        ):
            if getattr(self, name) != defaults[name]:
                raise UserError(
                    f"`{key_of(name)}` must not be set with `sentencepiece-model`, which is trained already. "
                    "Leave one of them out."
                )


@dataclass(frozen=True)
class BatchingOptions:
    """How examples are gathered into batches, and batches into updates."""

    max_tokens: int | Literal["auto"] | None = field(default=4096, metadata=limits(least=1))
    """Largest size of a batch on one device: its number of examples times its longest side, padding included;
    where batches are packed, the sum of either side. Longer examples are left out of training and counted.
    auto: as much as fits into the memory of the GPU, but no more than leaves an epoch some 300 updates."""

    batch_size: int | None = field(default=None, metadata=limits(least=1))
    """Largest number of examples in a batch."""

    update_freq: int = field(default=1, metadata=limits(least=1))
    """Number of batches per device that are summed into one update."""

    required_batch_size_multiple: int = field(default=8, metadata=limits(least=1))
    """Where more than this many examples fit into a padded batch, their number is a multiple of it."""

    min_batch_size: int = field(default=1, metadata=limits(least=1))
    """A batch of fewer examples, at the end of an epoch, goes with the one before it. Batch norm may need two.
    Without effect where `batch-size` is smaller, and where batches are packed."""

    packing: Literal["auto", "on", "off"] = "auto"
    """Training batches without padding, all of one shape: sentences one after another in one row. auto: on a GPU,
    where updates are then recorded once and replayed, if the task can pack."""

    num_workers: int | Literal["auto"] = "auto"
    """Number of processes per device that read and collate batches ahead. 0: the training process does it. auto: 2
    on a GPU, else 0."""

    window_size: int = field(default=2**20, metadata=limits(least=1))
    """Number of examples that are sorted by length together. A smaller data set is sorted as a whole."""

    def check(self) -> None:
        """Check what no single field can tell.

        Raises:
            UserError: a value is out of range, or no option limits the size of a batch.
        """
        check_limits(self)
        if self.max_tokens is None and self.batch_size is None:
            raise UserError(
                "`max-tokens` or `batch-size` must be given, but both are missing. "
                "Set one of them: without it all examples would be one batch."
            )
        if self.packing == "on" and self.max_tokens is None:
            raise UserError(
                "`packing` must have `max-tokens`, the size of the rows, but there is none. Set it, or leave "
                "`packing` out."
            )
        check_ranges(self, {"num_workers": (-math.inf, MOST_WORKERS)})
        if self.num_workers != "auto" and self.num_workers < 0:
            raise UserError(
                f"`num-workers` must be at least 0, but is {self.num_workers}. "
                "Give 0 to read the data in the training process."
            )
