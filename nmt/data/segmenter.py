"""Text to pieces and back, by SentencePiece."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from nmt.data.piece_spans import Span, read_spans
from nmt.data.text import clean_line
from nmt.data.vocabulary import BOS_ID, EOS_ID, PAD_ID, SPECIALS, UNK_ID, Vocabulary
from nmt.errors import DamagedError, UserError, counted

# Fixed, because it changes the model file, and the rounding of a unigram model's scores.
_NUM_TRAINING_THREADS = 8

_NUM_BYTES = 256
_LONGEST_TRAINING_LINE = 4192  # bytes; SentencePiece's own default
_BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")
_NOT_IN_TRAINING = ("\0", "\u2585")
_ERRORS_ONLY = 2  # SentencePiece's log level


class Segmenter:
    """A SentencePiece model that uses a vocabulary's ids.

    Pieces are matched to the vocabulary by name, and a model's special ids to ours. So models trained elsewhere
    and dictionaries of other toolkits work. Each process reads the model by itself, at first use: pickling carries
    only its path and the vocabulary.
    """

    def __init__(self, model_path: Path, vocabulary: Vocabulary) -> None:
        """Name the model and the vocabulary; nothing is read yet."""
        self.model_path = Path(model_path)
        self.vocabulary = vocabulary
        self._loaded: _LoadedModel | None = None

    def encode(self, lines: Sequence[str]) -> list[NDArray[np.int32]]:
        """Split each line into pieces; return their vocabulary ids: (number of pieces,) int32, no EOS."""
        ids, sizes = self.encode_flat(lines)
        return np.split(ids, np.cumsum(sizes)[:-1]) if len(sizes) else []

    def encode_flat(self, lines: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Split lines into pieces, without an array for each.

        Returns:
            The vocabulary ids of all lines one after the other, and the number of pieces of each line,
            which is 0 for a blank line, and for one that normalisation leaves empty.
        """
        model = self._model()
        cleaned = [clean_line(line) for line in lines]
        pieces: list[list[int]] = model.processor.encode(cleaned, out_type=int, num_threads=1)
        sizes = np.fromiter(map(len, pieces), dtype=np.int64, count=len(pieces))
        flat = np.fromiter(itertools.chain.from_iterable(pieces), dtype=np.int32, count=int(sizes.sum()))
        return model.to_vocabulary[flat], sizes

    def spans(self, line: str) -> list[Span]:
        """Return for each piece of a line the span of characters that it was made of.

        If several pieces spell one character, it belongs to the last of them. The others are empty, before it.
        """
        cleaned = clean_line(line)
        encoded = self._model().processor.encode(cleaned, out_type="serialized_proto")
        offset = line.index(cleaned)
        return [(start + offset, end + offset) for start, end in read_spans(encoded, cleaned)]

    def decoded_spans(self, ids: Sequence[int] | NDArray[np.integer]) -> list[Span]:
        """Return for each of a sequence of ids its span in the text that `decode` makes of them."""
        model = self._model()
        known = np.asarray(ids, dtype=np.int64)
        shown = np.flatnonzero(known >= UNK_ID)
        spans = [(0, 0)] * len(known)
        if len(shown):
            piece_ids = model.from_vocabulary[known[shown]].tolist()
            decoded = model.processor.decode(piece_ids, out_type="serialized_proto")
            text = model.processor.decode(piece_ids)
            for place, span in zip(shown, read_spans(decoded, text), strict=True):
                spans[place] = span
        return spans

    def decode(self, sequences: Iterable[Sequence[int] | NDArray[np.integer]]) -> list[str]:
        """Join the pieces of each sequence of ids into a line of text.

        BOS, PAD and EOS are skipped; an unknown token is shown as by SentencePiece. A newline or a carriage
        return, which byte pieces can spell, becomes a space, so that one sequence is one line for every reader.
        """
        model = self._model()
        texts = []
        for sequence in sequences:
            ids = np.asarray(sequence, dtype=np.int64)
            piece_ids = model.from_vocabulary[ids[ids >= UNK_ID]].tolist()
            text = model.processor.decode(piece_ids) if piece_ids else ""
            texts.append(text.replace("\n", " ").replace("\r", " "))
        return texts

    @property
    def is_byte(self) -> NDArray[np.bool_]:
        """True for vocabulary ids that are bytes, which spell characters without a piece of their own: (V,)."""
        return self._model().is_byte

    def __getstate__(self) -> tuple[Path, Vocabulary]:
        return self.model_path, self.vocabulary

    def __setstate__(self, state: tuple[Path, Vocabulary]) -> None:
        self.model_path, self.vocabulary = state
        self._loaded = None

    def _model(self) -> _LoadedModel:
        if self._loaded is None:
            self._loaded = _LoadedModel(self.model_path, self.vocabulary)
        return self._loaded


class PieceSegmenter:
    """Splits only at white space: for text that is in pieces already.

    It replaces a `Segmenter` if there is no SentencePiece model.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary

    def encode(self, lines: Sequence[str]) -> list[NDArray[np.int32]]:
        """Return the vocabulary ids of each line's pieces: (number of pieces,) int32, no EOS."""
        return [
            np.array([self._id(piece) for piece in clean_line(line).split()], dtype=np.int32)
            for line in lines
        ]

    def decode(self, sequences: Iterable[Sequence[int] | NDArray[np.integer]]) -> list[str]:
        """Join the pieces of each sequence by blanks; BOS, PAD and EOS are skipped."""
        tokens = self.vocabulary.tokens
        return [" ".join(tokens[index] for index in ids if index >= UNK_ID) for ids in sequences]

    def _id(self, piece: str) -> int:
        """Return the id of a piece of text; one that is spelled like a special symbol is unknown."""
        return max(self.vocabulary.id(piece), UNK_ID)


class _LoadedModel:
    """SentencePiece's processor and the tables between its ids and a vocabulary's."""

    def __init__(self, path: Path, vocabulary: Vocabulary) -> None:
        self.processor = _load_processor(path)
        num_pieces = self.processor.get_piece_size()
        names = [self.processor.id_to_piece(piece_id) for piece_id in range(num_pieces)]
        specials = _special_ids(self.processor)
        # Text that is spelled like a special symbol is an unknown piece: it neither ends nor pads a line.
        to_vocabulary = [
            specials.get(piece_id, max(vocabulary.id(name), UNK_ID)) for piece_id, name in enumerate(names)
        ]
        self.to_vocabulary = np.array(to_vocabulary, dtype=np.int32)
        self.from_vocabulary = np.full(len(vocabulary), self.processor.unk_id(), dtype=np.int64)
        self.is_byte = np.zeros(len(vocabulary), dtype=np.bool_)
        num_known = 0
        for piece_id, token_id in enumerate(to_vocabulary):
            if token_id >= len(SPECIALS):
                num_known += 1
                self.from_vocabulary[token_id] = piece_id
                self.is_byte[token_id] = self.processor.is_byte(piece_id)
        # A dictionary may lack rare pieces or have a few more tokens, but most of its pieces must be the model's.
        if 2 * num_known < len(vocabulary) - len(SPECIALS):
            raise UserError(
                f"the vocabulary must belong to {path}, but only {num_known:,} of its "
                f"{counted(len(vocabulary) - len(SPECIALS), 'token')} can be found among the pieces of that "
                "model. Take both from one data directory."
            )


def read_vocabulary(model_path: Path) -> Vocabulary:
    """Return a model's pieces in the order of its ids, with our special symbols instead of its own.

    Raises:
        UserError: The file is not a SentencePiece model.
    """
    return Vocabulary(name for name in _own_pieces(model_path) if name not in SPECIALS)


def find_misnamed_pieces(model_path: Path) -> list[str]:
    """Return a model's pieces of text that are spelled like our special symbols, and are therefore unknown."""
    return [name for name in _own_pieces(model_path) if name in SPECIALS]


def _own_pieces(model_path: Path) -> list[str]:
    processor = _load_processor(model_path)
    specials = _special_ids(processor)
    return [processor.id_to_piece(i) for i in range(processor.get_piece_size()) if i not in specials]


def train_segmenter(
    sentences: Iterable[bytes | str],
    model_path: Path,
    *,
    vocab_size: int,
    model_type: str,
    character_coverage: float,
    extra_symbols: Sequence[str] = (),
    normalization: str = "nmt_nfkc",
    named: str = "the training text",
) -> int:
    """Train a SentencePiece model with our special ids and byte fallback, and write it.

    The same sentences in the same order give the same file.

    Args:
        sentences: The training text; blank lines are skipped, and lines above 4,192 bytes are cut.
        model_path: Where to write the model.
        vocab_size: Number of pieces wanted, the specials included.
        model_type: `bpe` or `unigram`.
        character_coverage: Share of the text's characters that get a piece of their own.
        extra_symbols: Strings that are always one piece.
        normalization: How SentencePiece changes text before it splits it. `nmt_nfkc`, its default: NFKC, control
            characters dropped, every white space a plain one. `identity`: only runs of blanks become one.
        named: A name of the sentences for error texts.

    Returns:
        The number of pieces: `vocab_size`, or less if the text does not yield so many.

    Raises:
        UserError: `vocab_size` is too small (the text names the smallest possible one), or no sentence is usable.
    """
    for symbol in extra_symbols:
        if symbol in SPECIALS or _BYTE_PIECE.fullmatch(symbol):
            kind = "special symbol" if symbol in SPECIALS else "piece of a byte"
            raise UserError(f"`extra-symbols` must be new, but `{symbol}` is a {kind} already. Leave it out.")
    failures: list[BaseException] = []
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_remember_failure(training_lines(sentences), failures),
            model_writer=model,
            model_type=model_type,
            # Below this SentencePiece fails before it knows its alphabet, and so the size it needs.
            vocab_size=max(vocab_size, len(SPECIALS) + _NUM_BYTES + len(extra_symbols)),
            hard_vocab_limit=False,  # lower a size that the text cannot fill
            character_coverage=character_coverage,
            user_defined_symbols=list(extra_symbols),
            normalization_rule_name=normalization,
            bos_id=BOS_ID,
            pad_id=PAD_ID,
            eos_id=EOS_ID,
            unk_id=UNK_ID,
            byte_fallback=True,
            num_threads=_NUM_TRAINING_THREADS,
            max_sentence_length=_LONGEST_TRAINING_LINE,
            minloglevel=_ERRORS_ONLY,
        )
    except RuntimeError as error:
        if failures:
            raise failures[0] from None
        _explain(str(error), vocab_size, named)
    model_path.write_bytes(model.getvalue())
    return len(read_vocabulary(model_path))


def training_lines(sentences: Iterable[bytes | str]) -> Iterator[str]:
    """Yield text in a form that SentencePiece's trainer takes, since it silently leaves out other lines.

    Lines above 4,192 bytes are cut, at blanks if there are any. The null character, and the sign that
    SentencePiece uses itself, become blanks. Blank lines are skipped.
    """
    for sentence in sentences:
        line = clean_line(sentence if isinstance(sentence, str) else sentence.decode("utf-8"))
        for character in _NOT_IN_TRAINING:
            line = line.replace(character, " ")
        # No character has more than four bytes.
        if 4 * len(line) > _LONGEST_TRAINING_LINE:
            yield from _cut(line)
        elif line:
            yield line


def _cut(line: str) -> Iterator[str]:
    """Cut a line into parts of at most as many bytes as SentencePiece's trainer takes."""
    data = line.encode("utf-8")
    while len(data) > _LONGEST_TRAINING_LINE:
        end = data.rfind(b" ", 1, _LONGEST_TRAINING_LINE) + 1
        if not end:
            end = _LONGEST_TRAINING_LINE
            while data[end] & 0xC0 == 0x80:  # within a character
                end -= 1
        yield data[:end].decode("utf-8")
        data = data[end:]
    yield data.decode("utf-8")


def _remember_failure(sentences: Iterable[str], failures: list[BaseException]) -> Iterator[str]:
    """Pass sentences on; SentencePiece turns what they raise into a RuntimeError, so keep the original."""
    try:
        yield from sentences
    except BaseException as error:
        failures.append(error)
        raise


def _explain(message: str, vocab_size: int, named: str) -> NoReturn:
    """Raise a UserError for a message of SentencePiece's trainer."""
    if too_small := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        raise UserError(
            f"`vocab-size` must be at least {too_small[1]} for this text (special symbols, bytes, alphabet), "
            f"but is {vocab_size}. Ask for more, or lower `character-coverage`."
        ) from None
    if "sentences_.empty()" in message or "all_chars_count" in message:
        raise UserError(
            f"{named} must hold sentences to train a vocabulary on, but all lines are blank. Name another text."
        ) from None
    raise UserError(f"SentencePiece could not be trained: {' '.join(message.split())}") from None


def _load_processor(path: Path) -> sentencepiece.SentencePieceProcessor:
    data = path.read_bytes()
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(data)
        for piece_id in range(processor.get_piece_size()):
            processor.id_to_piece(piece_id)
    except (RuntimeError, UnicodeDecodeError):  # the latter if a message or a piece is not UTF-8
        raise DamagedError(
            f"{path} must be a SentencePiece model, but is not, or is cut short. Name another."
        ) from None
    return processor


def _special_ids(processor: sentencepiece.SentencePieceProcessor) -> dict[int, int]:
    """Map a model's special ids to ours. A symbol that the model lacks has the id -1, which no piece has."""
    return {
        processor.bos_id(): BOS_ID,
        processor.pad_id(): PAD_ID,
        processor.eos_id(): EOS_ID,
        processor.unk_id(): UNK_ID,
    }
