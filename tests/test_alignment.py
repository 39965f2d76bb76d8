"""Attention outside the search, words made of pieces, and links between them."""

import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
import torch.nn.functional as F
from support.tiny_translation_model import WORDS

from nmt.cli.generate import main
from nmt.data.segmenter import PieceSegmenter, Segmenter, read_vocabulary
from nmt.data.vocabulary import EOS_ID, PAD_ID, Vocabulary
from nmt.errors import UserError
from nmt.generation.options import DecodingOptions
from nmt.models import attention as attention_module
from nmt.translation.alignment import (
    Membership,
    align,
    attention,
    check_layer,
    link_words,
    to_pharaoh,
    words_of_source,
    words_of_text,
)
from nmt.translation.attention_plot import plot_attention
from nmt.translation.long_sentences import join_texts
from nmt.translation.request import Request, Translation
from nmt.translation.translator import Translator

LINES = ["the old dog", "a cat sees the red bird", "", "the big cat sees a dog. " * 4]


def test_weights_are_those_that_the_decoder_applies(
    translator: Translator, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = translator.models[0]
    source = torch.tensor([[10, 11, 12, EOS_ID], [13, EOS_ID, PAD_ID, PAD_ID]])
    target = torch.tensor([[EOS_ID, 20, 21], [EOS_ID, 22, PAD_ID]])
    applied: list[torch.Tensor] = []
    plain = attention_module.attend

    def attend(
        query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, **options: object
    ) -> torch.Tensor:
        if options.get("attention_mask") is not None and query.size(2) == target.size(1):
            # Attention over unit vectors gives the weights themselves.
            unit = torch.eye(keys.size(2)).expand(*keys.shape[:2], -1, -1)
            mask = options["attention_mask"]
            applied.append(F.scaled_dot_product_attention(query, keys, unit, attn_mask=mask).mean(dim=1))
        return plain(query, keys, values, **options)

    monkeypatch.setattr(attention_module, "attend", attend)
    with torch.inference_mode():
        model.decode(target, model.encode(source))
    weights = model.attention_weights(source, target, layer=-1)
    torch.testing.assert_close(weights, applied[0])
    torch.testing.assert_close(weights.sum(dim=2), torch.ones(2, 3))
    assert weights[1, :, 2:].eq(0).all()


def test_attention_does_not_depend_on_the_batch(translator: Translator) -> None:
    translations = list(translator.translate_lines(LINES * 3, DecodingOptions(beam=2, nbest=2)))
    pairs = [(x.source_ids, hypothesis.tokens) for x in translations for hypothesis in x.hypotheses]
    together = attention(translator, pairs, layer=-1)
    for pair, weights in zip(pairs, together, strict=True):
        (alone,) = attention(translator, [pair], layer=-1)
        np.testing.assert_allclose(weights, alone, atol=1e-5)
        assert weights.shape == (len(pair[1]), len(pair[0]) + 1)


def test_each_part_of_a_split_sentence_looks_at_itself(translator: Translator) -> None:
    (weights,) = attention(translator, [([10, 11, EOS_ID, 12], [20, EOS_ID, 21, 22])], layer=-1)
    (first,), (second,) = (
        attention(translator, [pair], layer=-1) for pair in (([10, 11], [20]), ([12], [21, 22]))
    )
    assert weights.shape == (4, 5)  # two pieces and eos, one piece and eos
    np.testing.assert_allclose(weights[:1, :3], first, atol=1e-5)
    np.testing.assert_allclose(weights[2:, 3:], second, atol=1e-5)
    assert weights[:1, 3:].sum() == weights[2:, :3].sum() == weights[1].sum() == 0


def members(words: list[list[int]], num_words: int) -> Membership:
    """Turn the words of each piece into a table (W, N)."""
    table = np.zeros((num_words, len(words)), dtype=np.bool_)
    for place, own in enumerate(words):
        table[own, place] = True
    return table


def test_a_word_is_linked_to_the_word_that_its_pieces_attend_to_most() -> None:
    weights = np.array(
        [
            [0.4, 0.3, 0.3, 0.0],  # 0.4 and 0.3 are of one word
            [0.1, 0.0, 0.5, 0.4],
            [0.0, 0.0, 0.1, 0.9],  # the end of the sentence is no word
        ],
        dtype=np.float32,
    )
    source = members([[0], [0], [1]], 2)
    # The first two pieces of the text are one word: 0.7 + 0.1 against 0.3 + 0.5, then 0.0 against 0.1.
    assert link_words(
        weights + np.eye(3, 4, dtype=np.float32) * 0.01, source, members([[0], [0], [1]], 2)
    ) == [(0, 0), (1, 1)]
    assert link_words(weights, source, members([[0], [1], [2]], 3)) == [(0, 0), (1, 1), (1, 2)]
    # A piece that spans two words is looked at by both.
    assert link_words(weights, source, members([[0, 1], [2], [2]], 3)) == [(0, 0), (0, 1), (1, 2)]
    assert to_pharaoh([(0, 0), (1, 1), (1, 2)]) == "0-0 1-1 1-2"


def test_given_pieces_are_words() -> None:
    translation = Translation(Request("a b"), ["x"], [], np.array([4, 5, EOS_ID, 6]))
    segmenter = PieceSegmenter(Vocabulary(["a", "b", "c"]))
    expected = members([[0], [1], [], [2]], 3)
    np.testing.assert_array_equal(words_of_source(translation, segmenter), expected)
    np.testing.assert_array_equal(words_of_text("", [4, 5, EOS_ID, 6], segmenter, "de"), expected)


SETTINGS = {
    "default": {},
    "suffix": {"treat_whitespace_as_suffix": True},
    "across words": {"split_by_whitespace": False, "max_sentencepiece_length": 30},
    "identity": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "bytes": {"byte_fallback": True, "vocab_size": 400, "model_type": "bpe"},
}


@pytest.fixture(params=SETTINGS.values(), ids=SETTINGS, scope="module")
def segmenter(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Segmenter:
    prefix = tmp_path_factory.mktemp("given") / "given"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))] * 5),
        model_prefix=str(prefix),
        hard_vocab_limit=False,
        minloglevel=2,
        **{"vocab_size": 60, **request.param},
    )
    path = prefix.with_suffix(".model")
    return Segmenter(path, read_vocabulary(path))


@pytest.mark.parametrize(
    "line",
    [
        "the old dog sees a house",
        "  the   old dog ",
        "the\u00a0old dog",  # a no-break space is white space
        "the \u2026 dog\u2026 \u00bd a",  # three dots and four signs, when they are normalised
        "old\u00b4s dog",  # which the default normalises to "old \u0301s dog"
        "old\u200bdog sees",  # likewise
        "\ufeffthe old dog\r",
        "\u2603 dog \u2603\u2603",  # of several bytes each
    ],
)
def test_words_are_numbered_by_the_blanks_of_the_given_text(segmenter: Segmenter, line: str) -> None:
    (ids,) = segmenter.encode([line])
    table = words_of_source(Translation(Request(line), [], [], ids), segmenter)
    words = line.strip("\ufeff").split()
    assert table.shape == (len(words), len(ids))
    assert table.any(axis=0).all()  # each piece has a word
    spans = segmenter.spans(line)
    for number, word in enumerate(words):
        own = "".join(line[start:end] for place, (start, end) in enumerate(spans) if table[number, place])
        assert word in own


def test_words_of_a_translation_are_those_of_its_text(segmenter: Segmenter) -> None:
    first, second = segmenter.encode(["the old dog", "a red bird sees"])
    joined = [*first.tolist(), EOS_ID, *second.tolist()]
    for language, num_words in (("de", 7), ("zho_Hans", 6)):
        texts = segmenter.decode([first, second])
        text = join_texts([x.strip() if language != "de" else x for x in texts], language=language)
        table = words_of_text(text, joined, segmenter, language)
        if not texts[0].endswith(" "):
            assert len(table) == len(text.split()) == num_words
        assert not table[:, len(first)].any()
        assert table[:, : len(first)].any(axis=0).all()
        assert table.any(axis=1).all()


def test_every_word_of_every_hypothesis_has_a_link(translator: Translator) -> None:
    lines = [" ".join(WORDS[i : i + 4]) for i in range(10)] + LINES
    translations = list(translator.translate_lines(lines, DecodingOptions(beam=3, nbest=2)))
    assert any(x.num_parts > 1 for x in translations)
    for x, alignments in zip(translations, align(translator, translations, layer=-1), strict=True):
        assert len(alignments) == len(x.hypotheses)
        for text, links in zip(x.texts, alignments, strict=True):
            assert [target for _, target in links] == list(range(len(text.split())))
            assert all(0 <= source < len(x.source.split()) for source, _ in links)


def test_a_layer_that_is_not_there_is_refused(translator: Translator) -> None:
    with pytest.raises(UserError, match="`alignment-layer` must be from -1 to 0, but is 1"):
        check_layer(translator, 1)


@pytest.fixture
def generate(model: Path, tmp_path: Path) -> Callable[..., list[str]]:
    source = tmp_path / "source"
    source.write_text("\n".join(LINES) + "\n")

    def run(*arguments: str) -> list[str]:
        files = ["--model", str(model), "--input", str(source), "--output", str(tmp_path / "output")]
        main([*files, "--beam", "2", "--device", "cpu", *arguments])
        return (tmp_path / "output").read_bytes().decode().removesuffix("\n").split("\n")

    return run


def test_alignments_are_printed_in_each_format(generate: Callable[..., list[str]]) -> None:
    plain = generate()
    with_links = generate("--print-alignment")
    assert [line.split(" ||| ")[0] for line in with_links] == plain
    links = [line.split(" ||| ")[1] for line in with_links]
    assert links[2] == ""
    records = [json.loads(line) for line in generate("--print-alignment", "--format", "jsonl")]
    written = [x["hypotheses"][0]["alignment"] if x["hypotheses"] else [] for x in records]
    assert [" ".join(f"{s}-{t}" for s, t in pairs) for pairs in written] == links
    fairseq = generate("--print-alignment", "--format", "fairseq")
    assert [line for line in fairseq if line.startswith("A-")] == [
        f"A-{number}\t{text}" for number, text in enumerate(links) if number != 2
    ]


@pytest.mark.parametrize("format_", ["jsonl", "fairseq"])
def test_a_scored_reference_is_shown_and_numbered_as_it_is_given(
    generate: Callable[..., list[str]], tmp_path: Path, format_: str
) -> None:
    """NFKC makes two words of the first of the second line."""
    given = ["the big\u00a0dog", "old\u00b4s dog", "a cat", "the old  tree runs"]
    (tmp_path / "reference").write_text("\n".join(given) + "\n", encoding="utf-8")
    arguments = ("--score-reference", "--reference", str(tmp_path / "reference"), "--print-alignment")
    lines = generate(*arguments, "--format", format_)
    if format_ == "jsonl":
        found = [json.loads(line)["hypotheses"] for line in lines]
        texts = [hypotheses[0]["text"] for hypotheses in found if hypotheses]
        links = [[target for _, target in hypotheses[0]["alignment"]] for hypotheses in found if hypotheses]
    else:
        texts = [line.split("\t")[2] for line in lines if line.startswith("D-")]
        texts.remove("")  # of the blank line
        links = [
            [int(link.split("-")[1]) for link in line.split("\t")[1].split()]
            for line in lines
            if line.startswith("A-")
        ]
    given.pop(2)  # of a blank line
    assert texts == given
    assert links == [list(range(len(text.split()))) for text in given]


def test_a_picture_is_drawn_for_each_line(generate: Callable[..., list[str]], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    generate("--plot-attention", str(tmp_path / "plots"))
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == [
        "000001.png",
        "000002.png",
        "000004.png",  # line 3 is blank
    ]


def test_a_picture_grows_with_the_sentence_up_to_a_limit(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    sizes = []
    for length in (5, 30, 300):
        weights = np.full((length, length), 1 / length, dtype=np.float32)
        path = tmp_path / f"{length}.png"
        plot_attention(path, weights, ["▁größer"] * length, ["a$b$c"] * length, title="x")
        sizes.append(struct.unpack(">II", path.read_bytes()[16:24]))
    assert sizes[0] < sizes[1] < sizes[2]
    assert max(sizes[2]) <= 40 * 120


def test_matplotlib_is_named_where_it_is_missing(
    generate: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as error:
        generate("--plot-attention", str(tmp_path / "plots"))
    assert error.value.code == 2
    assert "matplotlib must be installed for `plot-attention`, but is missing." in capsys.readouterr().err
