"""Where the pieces of a text stand in it, according to SentencePiece."""

from __future__ import annotations

from collections.abc import Iterator

Span = tuple[int, int]
"""From the first character to the one after the last."""

# Fields of SentencePiece's message `SentencePieceText`, and of `SentencePiece` within it. They are read here
# because its Python interface to them changes from version to version, and needs the package protobuf.
_PIECES = 2
_BEGIN, _END = 4, 5
_VARINT, _BYTES = 0, 2  # kinds of fields


def read_spans(message: bytes, text: str) -> list[Span]:
    """Return the place of each piece of a text.

    Args:
        message: SentencePiece's result of encoding or decoding the text, with `out_type="serialized_proto"`.
        text: The text that was encoded, or the text that decoding gave.
    """
    # SentencePiece counts bytes. A place within a character counts as the beginning of the character.
    places, place = [], 0
    for character in text:
        places += [place] * len(character.encode("utf-8"))
        place += 1
    places.append(place)
    pieces = (dict(_fields(value)) for number, value in _fields(message) if number == _PIECES)
    return [(places[_number(piece.get(_BEGIN, 0))], places[_number(piece.get(_END, 0))]) for piece in pieces]


def _number(value: int | bytes) -> int:
    assert isinstance(value, int)
    return value


def _fields(message: bytes | int) -> Iterator[tuple[int, int | bytes]]:
    """Yield number and value of the fields of a message in protobuf's format."""
    assert isinstance(message, bytes)
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = message[place]
            place += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while place < len(message):
        key = varint()
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            yield number, varint()
        elif kind == _BYTES:
            size = varint()
            yield number, message[place : place + size]
            place += size
        else:
            place += 8 if kind == 1 else 4  # of a fixed size
