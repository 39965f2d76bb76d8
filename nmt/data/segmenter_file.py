"""A SentencePiece model file without the paths of the machine that it was trained on.

The file is a protocol buffer (google/sentencepiece, sentencepiece_model.proto). Its trainer writes down where the
text and the model were. Data directories and model folders get a copy without these fields, which are not needed
to encode text.
"""

from collections.abc import Iterator

_PATHS = {  # field of the model -> its fields that hold paths
    2: (1, 2, 54),  # trainer_spec: input, model_prefix, seed_sentencepieces_file
    3: (6,),  # normalizer_spec: normalization_rule_tsv
    5: (6,),  # denormalizer_spec
}
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


def without_paths(model: bytes) -> bytes:
    """Return a model file without its paths; a file that is not a protocol buffer is returned unchanged."""
    try:
        parts = []
        for number, kind, start, content, end in _fields(model):
            if kind == _LENGTH and number in _PATHS:
                inner = model[content:end]
                kept = b"".join(
                    inner[first:last]
                    for field, _, first, _, last in _fields(inner)
                    if field not in _PATHS[number]
                )
                parts.append(model[start : start + 1] + _varint(len(kept)) + kept)
            else:
                parts.append(model[start:end])
        return b"".join(parts)
    except ValueError:
        return model


def _fields(data: bytes) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield for each field its number, its kind, and the places where it, its content and the next field begin."""
    place = 0
    while place < len(data):
        start = place
        tag, place = _read_varint(data, place)
        number, kind = tag >> 3, tag & 7
        content = place
        if kind == _VARINT:
            _, place = _read_varint(data, place)
        elif kind == _LENGTH:
            length, content = _read_varint(data, place)
            place = content + length
        elif kind in (_FIXED64, _FIXED32):
            place += 8 if kind == _FIXED64 else 4
        else:
            raise ValueError("no field of a protocol buffer")
        if place > len(data):
            raise ValueError("cut short")
        yield number, kind, start, content, place


def _read_varint(data: bytes, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        if place >= len(data):
            raise ValueError("cut short")
        value |= (data[place] & 0x7F) << shift
        place += 1
        if not data[place - 1] & 0x80:
            return value, place
    raise ValueError("no number of a protocol buffer")


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])
