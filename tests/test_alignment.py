"""Attention outside the search, words made of pieces, and links between them."""

import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_translation_model import WORDS, write_tiny_model

from nmt.cli.generate import main
from nmt.data.segmenter import PieceSegmenter
from nmt.data.vocabulary import EOS_ID, PAD_ID, Vocabulary
from nmt.errors import UserError
from nmt.generation.options import DecodingOptions
from nmt.models import attention as attention_module
from nmt.models.cross_attention import cross_attention_weights
from nmt.translation.alignment import align, attention, check_layer, link_words, to_pharaoh, word_numbers
from nmt.translation.attention_plot import plot_attention
from nmt.translation.translator import Translator

LINES = ["the old dog", "a cat sees the red bird", "", "the big cat sees a dog. " * 4]


@pytest.fixture(scope="module")
def model(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("run") / "model")


@pytest.fixture(scope="module")
def translator(model: Path) -> Translator:
    return Translator.load(model)


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
    weights = cross_attention_weights(model, source, target, layer=-1)
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


def test_pieces_are_counted_as_words_of_their_line() -> None:
    vocabulary = Vocabulary(["▁a", "b", "▁", "c"])  # ids 4 to 7
    assert word_numbers([4, 5, 4, 6, 7], None, vocabulary) == [0, 0, 1, 2, 2]
    assert word_numbers([5, 4], None, vocabulary) == [0, 1]
    assert word_numbers([4, 5, EOS_ID, 5, 4], None, vocabulary) == [0, 0, -1, 1, 2]
    assert word_numbers([4, 5, 7], PieceSegmenter(vocabulary), vocabulary) == [0, 1, 2]


def test_a_word_is_linked_to_the_word_that_its_pieces_attend_to_most() -> None:
    weights = np.array(
        [
            [0.4, 0.3, 0.3, 0.0],  # 0.4 and 0.3 are of one word
            [0.1, 0.0, 0.5, 0.4],
            [0.0, 0.0, 0.1, 0.9],  # the end of the sentence is no word
        ],
        dtype=np.float32,
    )
    # The first two pieces of the text are one word: 0.7 + 0.1 against 0.3 + 0.5, then 0.0 against 0.1.
    assert link_words(weights + np.eye(3, 4, dtype=np.float32) * 0.01, [0, 0, 1], [0, 0, 1]) == [
        (0, 0),
        (1, 1),
    ]
    assert link_words(weights, [0, 0, 1], [0, 1, 2]) == [(0, 0), (1, 1), (1, 2)]
    assert to_pharaoh([(0, 0), (1, 1), (1, 2)]) == "0-0 1-1 1-2"


def test_every_word_of_every_hypothesis_has_a_link(translator: Translator) -> None:
    lines = [" ".join(WORDS[i : i + 4]) for i in range(10)]
    translations = list(translator.translate_lines(lines, DecodingOptions(beam=3, nbest=2)))
    for x, alignments in zip(translations, align(translator, translations, layer=-1), strict=True):
        assert len(alignments) == len(x.hypotheses)
        for hypothesis, links in zip(x.hypotheses, alignments, strict=True):
            numbers = word_numbers(hypothesis.tokens, None, translator.task.target_vocabulary)
            assert [target for _, target in links] == sorted(set(numbers))
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
