"""Records: what a schema lets through, and how it names what it does not."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmt.config.records import (
    LANGUAGE,
    NAME,
    Flag,
    ListOf,
    MapOf,
    Maybe,
    Number,
    Pair,
    Record,
    RecordError,
    Text,
    Whole,
    parse_json,
    read_record,
)
from nmt.errors import DamagedError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        (Whole(1, 9), [1, 9], [0, 10, 1.0, True, "1", None, [1], float("nan"), 10**5000]),
        (Number(0, 1), [0, 1, 0.5], [-0.1, 1.1, float("nan"), float("inf"), "0", False, 10**400]),
        (Number(is_finite=False), [float("inf"), float("-inf"), 3], [None, "x", 10**400]),
        (Flag(), [True, False], [0, 1, None, "true"]),
        (Flag(takes_numbers=True), [True, 0, 1, None], [2, 1.0, "1"]),
        (Text(longest=3), ["", "abc"], ["abcd", "\ud800", 1, None]),
        (NAME, ["a b", ".x"], ["", "..", "a/b", "a\\b", "a\0", "a\n", "x" * 201]),
        (LANGUAGE, ["en", "zho_Hans"], ["", "e n", "../en", "e\x1bn"]),
        (Maybe(Whole()), [None, 3], [-1, "x"]),
        (ListOf(Whole(), shortest=1), [[1], [1, 2]], [[], [None], 1, "12", {"0": 1}]),
        (Pair(Whole(), Flag()), [[1, True]], [[1], [1, 2], [1, True, 1]]),
        (MapOf(Whole()), [{}, {"a": 1}], [{"a": "b"}, {"\ud800": 1}, {1: 1}, []]),
        (
            Record({"a": Whole()}, optional={"b": Flag()}),
            [{"a": 1}, {"a": 1, "c": 2}],
            [{}, {"a": 1, "b": 1}],
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_schema_takes(schema: Any, right: list[Any], wrong: list[Any]) -> None:
    for value in right:
        assert schema.check(value, "x") in (value, bool(value))
    for value in wrong:
        with pytest.raises(RecordError, match=r"must be .*, but is"):
            schema.check(value, "x")


def test_the_place_is_named() -> None:
    schema = Record({"a": ListOf(MapOf(Record({"b": Whole(0, 5)})))})
    with pytest.raises(RecordError, match=r"`a\[1\]\.k\.b` must be a whole number from 0 to 5, but is 'x'"):
        schema.check({"a": [{}, {"k": {"b": "x"}}]}, "")
    with pytest.raises(
        RecordError, match=r"`a\[0\]\.k\.b` must be a whole number from 0 to 5, but is missing"
    ):
        schema.check({"a": [{"k": {}}]}, "")


@given(JSON)
def test_json_is_read_back(value: object) -> None:
    assert json.dumps(parse_json(json.dumps(value).encode())) == json.dumps(value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe{}",
        b'{"a": "\xed\xa0\x80"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": "\\ud800"}',
        b'{"a": null}',
        b"[1]",
        b"NaN",
        b'{"a": "' + b"x" * 1_000_000 + b'"}',
        b'{"a": "\\u001b[31m"}',
    ],
    ids=range(13),
)
def test_a_damaged_file_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(content)
    with pytest.raises(DamagedError, match=r"record\.json.*Take another\.") as error:
        read_record(path, Record({"a": Whole()}), what_to_do="Take another.")
    assert len(str(error.value)) < 400 and str(error.value).isprintable()


def test_a_file_that_is_far_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    with path.open("wb") as file:
        file.truncate(2**40)  # takes no room on the disk
    with pytest.raises(DamagedError, match="at most 67,108,864 bytes"):
        read_record(path, Record({}), what_to_do="")


def test_a_byte_order_mark_before_a_record_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n')
    assert read_record(path, Record({"a": Whole()}), what_to_do="") == {"a": 1}
