"""The dictionary: tokens, ids, and fairseq's file."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmt.data.vocabulary import BOS_ID, EOS_ID, PAD_ID, SPECIALS, UNK_ID, Vocabulary
from nmt.errors import UserError


def test_specials_come_first_and_tokens_follow_in_order() -> None:
    vocabulary = Vocabulary(["▁a", "b"], [5, 3])
    assert list(vocabulary.tokens) == ["<s>", "<pad>", "</s>", "<unk>", "▁a", "b"]
    assert [vocabulary.id(token) for token in vocabulary.tokens] == [0, 1, 2, 3, 4, 5]
    assert (BOS_ID, PAD_ID, EOS_ID, UNK_ID) == (0, 1, 2, 3)
    assert vocabulary.id("nowhere") == UNK_ID
    assert "b" in vocabulary and "nowhere" not in vocabulary
    assert list(vocabulary.counts) == [0, 0, 0, 0, 5, 3]
    assert len(vocabulary) == 6


def test_file_holds_a_token_and_a_count_per_line_without_the_specials(tmp_path: Path) -> None:
    Vocabulary(["▁a", "b c"], [5, 3]).save(tmp_path / "dict.txt")
    assert (tmp_path / "dict.txt").read_bytes() == "▁a 5\nb c 3\n".encode()


def test_fairseq_dictionary_is_read(tmp_path: Path) -> None:
    path = tmp_path / "dict.en.txt"
    path.write_text(". 56396\n▁a 31827\nmadeupword0000 0\n", encoding="utf-8")
    vocabulary = Vocabulary.load(path)
    assert list(vocabulary.tokens[4:]) == [".", "▁a", "madeupword0000"]
    assert list(vocabulary.counts[4:]) == [56396, 31827, 0]


_tokens = st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]), min_size=1, max_size=5)


@given(st.dictionaries(_tokens, st.integers(0, 2**40)))
def test_save_and_load_give_the_same_vocabulary(
    tmp_path_factory: pytest.TempPathFactory, counts: dict[str, int]
) -> None:
    counts = {token: count for token, count in counts.items() if token not in SPECIALS}
    vocabulary = Vocabulary(counts.keys(), counts.values())
    path = tmp_path_factory.mktemp("dictionary") / "dict.txt"
    vocabulary.save(path)
    loaded = Vocabulary.load(path)
    assert loaded == vocabulary
    assert loaded.counts == vocabulary.counts


def test_equality_is_of_tokens_not_of_counts() -> None:
    assert Vocabulary(["a"], [1]) == Vocabulary(["a"], [2])
    assert Vocabulary(["a", "b"]) != Vocabulary(["b", "a"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a 1\nb\n", r"dict\.txt, line 2"),
        (b"a 1\nb x\n", r"dict\.txt, line 2"),
        (b"a 1\n\nb 1\n", r"dict\.txt, line 2"),
        (b"a 1\n\xff 1\n", r"dict\.txt, line 2.*UTF-8"),
        (b"a 1\nb 1\na 1\n", r"dict\.txt, line 3.*`a` is already in line 1"),
        (b"a 1\n<pad> 1\n", r"dict\.txt, line 2.*special symbols"),
        (b"a 1\n 1\n", r"dict\.txt, line 2.*empty"),
    ],
)
def test_bad_line_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "dict.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        Vocabulary.load(path)


def test_token_with_a_newline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="newline"):
        Vocabulary(["a\nb"]).save(tmp_path / "dict.txt")


@pytest.mark.parametrize("tokens", [["a", "a"], ["<unk>"], [""]])
def test_tokens_must_be_distinct_and_not_empty(tokens: list[str]) -> None:
    with pytest.raises(UserError):
        Vocabulary(tokens)


def test_a_later_token_may_overwrite_an_earlier_one(tmp_path: Path) -> None:
    content = "a 3\n<unk> 2 #fairseq:overwrite\nb 1\na 9 #fairseq:overwrite\n"
    (tmp_path / "dict.en.txt").write_text(content)
    vocabulary = Vocabulary.load(tmp_path / "dict.en.txt")
    assert vocabulary.tokens[4:] == ("a", "<unk>", "b", "a")
    assert (vocabulary.id("a"), vocabulary.id("<unk>"), vocabulary.id("b")) == (7, 5, 6)
    vocabulary.save(tmp_path / "again.txt")
    assert (tmp_path / "again.txt").read_text() == content


def test_byte_order_mark_and_carriage_returns_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "dict.en.txt"
    path.write_bytes("\ufeffa 3\r\n<pad> 2 #fairseq:overwrite\r\nb\r 1\r\n".encode())
    vocabulary = Vocabulary.load(path)
    assert list(vocabulary.tokens[4:]) == ["a", "<pad>", "b\r"]  # a token's own stays
    assert vocabulary.id("<pad>") == 5


def test_a_token_that_begins_with_a_byte_order_mark_keeps_it(tmp_path: Path) -> None:
    vocabulary = Vocabulary(["\ufeff", "\ufeffa"], [2, 1])
    vocabulary.save(tmp_path / "dict.en.txt")
    assert Vocabulary.load(tmp_path / "dict.en.txt") == vocabulary
