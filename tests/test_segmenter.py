"""Text to ids and back, with models of our own and of others."""

import pickle
import random
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nmt.data.segmenter import (
    PieceSegmenter,
    Segmenter,
    find_misnamed_pieces,
    read_vocabulary,
    train_segmenter,
    training_lines,
)
from nmt.data.vocabulary import BOS_ID, EOS_ID, PAD_ID, SPECIALS, UNK_ID, Vocabulary
from nmt.errors import UserError


def sentences(number: int = 400) -> list[str]:
    """Sentences of made-up words over a small alphabet."""
    choose = random.Random(1)
    words = ["".join(choose.choices("abdegiklmnorstuä", k=choose.randint(1, 7))) for _ in range(150)]
    return [" ".join(choose.choices(words, k=choose.randint(1, 12))) + "." for _ in range(number)]


def train(
    path: Path, *, vocab_size: int = 400, model_type: str = "bpe", extra_symbols: tuple[str, ...] = ()
) -> int:
    return train_segmenter(
        sentences(),
        path,
        vocab_size=vocab_size,
        model_type=model_type,
        character_coverage=1.0,
        extra_symbols=extra_symbols,
    )


def pieces(segmenter: Segmenter, ids: Iterable[int]) -> list[str]:
    return [segmenter.vocabulary.tokens[index] for index in ids]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("segmenter") / "sentencepiece.model"
    assert train(path, extra_symbols=("<formal>",)) == 400
    return path


@pytest.fixture(scope="module")
def segmenter(model_path: Path) -> Segmenter:
    return Segmenter(model_path, read_vocabulary(model_path))


def test_ids_of_our_own_models_are_sentencepieces(model_path: Path, segmenter: Segmenter) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model_path))
    tokens = [processor.id_to_piece(piece_id) for piece_id in range(processor.get_piece_size())]
    assert list(segmenter.vocabulary.tokens) == tokens
    assert tokens[:4] == list(SPECIALS)
    lines = sentences(20)
    assert [ids.tolist() for ids in segmenter.encode(lines)] == processor.encode(lines)


def test_flat_encoding_is_the_lines_in_a_row(segmenter: Segmenter) -> None:
    lines = ["", *sentences(5), " ", "\u200b"]
    ids, sizes = segmenter.encode_flat(lines)
    encoded = segmenter.encode(lines)
    assert sizes.tolist() == [len(line) for line in encoded]
    assert ids.tolist() == [token for line in encoded for token in line]
    assert sizes[[0, -2, -1]].tolist() == [0, 0, 0]
    assert segmenter.encode([]) == []


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_training_twice_gives_the_same_file(tmp_path: Path, model_type: str) -> None:
    for name in ("first", "second"):
        train(tmp_path / name, model_type=model_type)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(
        st.sampled_from("abdegiklmnorstuäß.☃") | st.characters(exclude_categories=["C", "Z"]), max_size=30
    )
)
def test_decoding_undoes_encoding_up_to_normalisation(segmenter: Segmenter, text: str) -> None:
    normalised = sentencepiece.SentencePieceNormalizer(rule_name="nmt_nfkc").normalize(text)
    (ids,) = segmenter.encode([text])
    assert UNK_ID not in ids  # what has no piece is spelled in bytes
    assert segmenter.decode([ids]) == segmenter.decode([[0, *ids, EOS_ID, 1]])
    assert segmenter.decode([ids])[0].split() == normalised.replace("▁", " ").split()


def test_decoding_shows_unknown_tokens_and_keeps_one_line(segmenter: Segmenter) -> None:
    newline = segmenter.vocabulary.id("<0x0A>")
    carriage_return = segmenter.vocabulary.id("<0x0D>")
    assert segmenter.decode([[carriage_return, newline]]) == ["  "]
    assert segmenter.decode([[], [EOS_ID], [UNK_ID], [newline]]) == ["", "", " \u2047 ", " "]


def test_bytes_are_marked(segmenter: Segmenter) -> None:
    (ids,) = segmenter.encode(["☃"])
    assert segmenter.is_byte[ids].tolist() == [False, True, True, True]  # ▁ and three bytes
    assert segmenter.is_byte.sum() == 256


def test_extra_symbols_are_one_piece(segmenter: Segmenter) -> None:
    (ids,) = segmenter.encode(["<formal> bad"])
    assert "<formal>" in pieces(segmenter, ids)


def test_pickled_segmenter_encodes_the_same(segmenter: Segmenter) -> None:
    lines = sentences(3)
    segmenter.encode(lines)
    copy = pickle.loads(pickle.dumps(segmenter))
    assert [ids.tolist() for ids in copy.encode(lines)] == [ids.tolist() for ids in segmenter.encode(lines)]


def test_model_with_other_special_ids_speaks_ours(tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences()),
        model_prefix=str(tmp_path / "other"),
        vocab_size=80,
        unk_id=0,
        bos_id=-1,
        eos_id=5,
        pad_id=-1,
        eos_piece="[END]",
        minloglevel=2,
    )
    vocabulary = read_vocabulary(tmp_path / "other.model")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "other.model"))
    assert list(vocabulary.tokens[:4]) == list(SPECIALS)
    assert "[END]" not in vocabulary
    assert len(vocabulary) == 80 - 2 + 4  # without the model's own two, with our four
    segmenter = Segmenter(tmp_path / "other.model", vocabulary)
    lines = [*sentences(5), "☃"]
    encoded = segmenter.encode(lines)
    assert [pieces(segmenter, ids) for ids in encoded[:-1]] == processor.encode(lines[:-1], out_type=str)
    assert encoded[-1].tolist()[-1] == UNK_ID
    assert segmenter.decode(encoded[:-1]) == lines[:-1]


def test_dictionary_in_another_order_and_with_gaps_is_followed(model_path: Path) -> None:
    tokens = read_vocabulary(model_path).tokens[4:]
    shuffled = random.Random(1).sample(tokens, len(tokens))
    vocabulary = Vocabulary([*shuffled, "madeupword0000"])
    segmenter = Segmenter(model_path, vocabulary)
    (ids,) = segmenter.encode(["bad"])
    assert segmenter.decode([ids]) == ["bad"]
    assert segmenter.decode([[vocabulary.id("madeupword0000")]]) == [" \u2047 "]
    without = Vocabulary(token for token in tokens if token != pieces(segmenter, ids)[0])
    assert Segmenter(model_path, without).encode(["bad"])[0][0] == UNK_ID


def test_dictionary_of_another_model_is_refused(model_path: Path) -> None:
    with pytest.raises(UserError, match=r"must belong to .*only 1 of its 3 tokens"):
        Segmenter(model_path, Vocabulary(["▁quite", "▁another", "a"])).encode(["bad"])


def test_size_that_the_text_cannot_fill_is_lowered(tmp_path: Path) -> None:
    for model_type in ("bpe", "unigram"):
        size = train(tmp_path / "model", vocab_size=50_000, model_type=model_type)
        assert 300 < size < 50_000
        assert size == len(read_vocabulary(tmp_path / "model"))


@pytest.mark.parametrize("vocab_size", [1, 3, 100, 270])
def test_size_too_small_names_the_least(tmp_path: Path, vocab_size: int) -> None:
    with pytest.raises(UserError, match=rf"at least 278 .* but is {vocab_size}\.") as raised:
        train(tmp_path / "model", vocab_size=vocab_size)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "model").exists()
    assert train(tmp_path / "model", vocab_size=278) == 278  # 4 + 256 + 17 letters and signs + the word mark


@pytest.mark.parametrize("text", [[], ["", " "], ["\u00ad", "\u0085\r"]])
def test_text_without_a_usable_sentence_is_refused(tmp_path: Path, text: list[str]) -> None:
    with pytest.raises(UserError, match="must hold sentences"):
        train_segmenter(text, tmp_path / "model", vocab_size=300, model_type="bpe", character_coverage=1.0)


@pytest.mark.parametrize("symbol", ["<s>", "<unk>", "<0x41>"])
def test_extra_symbol_that_is_there_already_is_refused(tmp_path: Path, symbol: str) -> None:
    with pytest.raises(UserError, match=symbol):
        train(tmp_path / "model", extra_symbols=(symbol,))


def test_what_goes_wrong_in_the_text_is_raised_as_it_is(tmp_path: Path) -> None:
    def interrupted() -> object:
        yield "a sentence"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_segmenter(
            interrupted(), tmp_path / "model", vocab_size=300, model_type="bpe", character_coverage=1.0
        )


@pytest.mark.parametrize("data", [b"", b"no model", b"\x00" * 50])
def test_file_that_is_no_model_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "bad.model").write_bytes(data)
    with pytest.raises(UserError, match=r"bad\.model must be a SentencePiece model"):
        read_vocabulary(tmp_path / "bad.model")


def test_ids_are_int32(segmenter: Segmenter) -> None:
    assert segmenter.encode(["bad"])[0].dtype == np.int32


GIVEN_MODELS = {
    "identity": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "extra blanks": {"remove_extra_whitespaces": False},
    "no prefix": {"add_dummy_prefix": False, "normalization_rule_name": "identity"},
    "suffix": {"treat_whitespace_as_suffix": True},
    "across words": {"split_by_whitespace": False, "max_sentencepiece_length": 30},
    "bytes": {"byte_fallback": True, "vocab_size": 400, "model_type": "bpe"},
    "special symbols": {"user_defined_symbols": ["<pad>", "</s>", "<s>"]},
}


@pytest.fixture(params=GIVEN_MODELS.values(), ids=GIVEN_MODELS, scope="module")
def given_segmenter(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Segmenter:
    """A model that somebody else has trained, with other settings than ours."""
    prefix = tmp_path_factory.mktemp("given") / "given"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences()),
        model_prefix=str(prefix),
        hard_vocab_limit=False,
        minloglevel=2,
        **{"vocab_size": 150, **request.param},
    )
    path = prefix.with_suffix(".model")
    return Segmenter(path, read_vocabulary(path))


def test_blank_lines_and_line_ends_do_not_depend_on_the_model(given_segmenter: Segmenter) -> None:
    lines = ["abd dig", *sentences(3)]
    plain = [ids.tolist() for ids in given_segmenter.encode(lines)]
    assert [x.tolist() for x in given_segmenter.encode([line + "\r" for line in lines])] == plain
    assert [x.tolist() for x in given_segmenter.encode(["\ufeff" + line for line in lines])] == plain
    blank = ["", " ", "\t", "\r", "\u00a0", "\u3000", "\u0085", "\u00ad", "\u200d\u2060", "\u202a\u202c"]
    assert [len(x) for x in given_segmenter.encode(blank)] == [0] * len(blank)


def test_every_character_of_a_line_belongs_to_a_piece(given_segmenter: Segmenter) -> None:
    for line in [*sentences(5), "abd \u2026 dig\u00e4r", "\ufeffabd dig\r", "a\u0308b \u2603 b"]:
        (ids,) = given_segmenter.encode([line])
        spans = given_segmenter.spans(line)
        assert len(spans) == len(ids)
        assert "".join(line[start:end] for start, end in spans).split() == line.strip("\ufeff\r").split()
        text = given_segmenter.decode([ids])[0]
        spans = given_segmenter.decoded_spans([BOS_ID, *ids, EOS_ID])
        assert spans[0] == spans[-1] == (0, 0)
        assert "".join(text[start:end] for start, end in spans) == text
    assert given_segmenter.spans("") == given_segmenter.decoded_spans([]) == []


def test_words_of_a_text_that_are_spelled_like_special_symbols_do_not_end_or_pad_it(
    given_segmenter: Segmenter,
) -> None:
    for name in SPECIALS:
        (ids,) = given_segmenter.encode([f"abd {name} dig"])
        assert not set(ids.tolist()) & {BOS_ID, PAD_ID, EOS_ID}
        assert len(ids) > len(given_segmenter.encode(["abd dig"])[0])  # nothing is swallowed


def test_pieces_that_text_cannot_have_are_named(tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences()),
        model_prefix=str(tmp_path / "given"),
        vocab_size=100,
        user_defined_symbols=["<pad>", "</s>"],
        minloglevel=2,
    )
    assert sorted(find_misnamed_pieces(tmp_path / "given.model")) == ["</s>", "<pad>"]
    train(tmp_path / "own")
    assert find_misnamed_pieces(tmp_path / "own") == []


def test_special_symbols_among_given_pieces_are_unknown() -> None:
    pieces = PieceSegmenter(Vocabulary(["a", "b"]))
    (ids,) = pieces.encode(["a <s> </s> <pad> <unk> b\r"])
    assert ids.tolist() == [4, UNK_ID, UNK_ID, UNK_ID, UNK_ID, 5]
    assert [len(x) for x in pieces.encode(["\u00ad", "\u0085", "\r"])] == [0, 0, 0]


def test_a_token_that_takes_the_name_of_a_special_symbol_keeps_its_id() -> None:
    pieces = PieceSegmenter(Vocabulary(["a", "<pad>"], overwriting=[5]))
    assert pieces.encode(["<pad> a"])[0].tolist() == [5, 4]


@given(
    st.lists(st.text(st.sampled_from("ab \u0e01\U0001f600\0\u2585"), max_size=40), max_size=4), st.booleans()
)
def test_long_lines_are_cut_for_training_and_nothing_is_lost(lines: list[str], is_bytes: bool) -> None:
    long = [line * 300 for line in lines]
    given = [line.encode() for line in long] if is_bytes else long
    cut = list(training_lines(given))
    assert all(0 < len(line.encode()) <= 4192 for line in cut)
    assert not any("\0" in line or "\u2585" in line for line in cut)
    kept = [line for line in long if line.strip(" \0")]
    assert "".join(cut) == "".join(kept).replace("\0", " ").replace("\u2585", " ")
    if len(long) == len(kept) == 1 and " " in long[0]:
        assert all(line.endswith(" ") for line in cut[:-1])  # words stay whole


def test_a_vocabulary_knows_a_script_whose_lines_are_all_long(tmp_path: Path) -> None:
    choose = random.Random(3)
    thai = ["".join(choose.choices("\u0e01\u0e02\u0e04\u0e07", k=2000)) for _ in range(5)]
    train_segmenter(thai, tmp_path / "model", vocab_size=280, model_type="bpe", character_coverage=1.0)
    segmenter = Segmenter(tmp_path / "model", read_vocabulary(tmp_path / "model"))
    assert not segmenter.is_byte[segmenter.encode(["\u0e01\u0e07"])[0]].any()


def test_text_may_stay_as_it_is(tmp_path: Path) -> None:
    lines = [f"{word} \u2026 \u00bd\u2026 x" for word in sentences(50)]
    for name, expected in (("nmt_nfkc", "abd... 1\u20442"), ("identity", "abd\u2026 \u00bd")):
        path = tmp_path / name
        train_segmenter(
            lines, path, vocab_size=350, model_type="bpe", character_coverage=1.0, normalization=name
        )
        segmenter = Segmenter(path, read_vocabulary(path))
        assert segmenter.decode(segmenter.encode(["abd\u2026 \u00bd"])) == [expected]
