"""Text in, text out, through a small untrained model."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_translation_model import MAX_POSITIONS, WORDS, write_tiny_model

from nmt.errors import UserError
from nmt.generation.options import DecodingOptions
from nmt.translation.translator import Batching, Translator

LINES = [" ".join(WORDS[i % 7 : i % 7 + 1 + i % 5]) + f" {WORDS[i % 16]}" for i in range(40)]


@pytest.fixture(scope="module")
def translator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Translator]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Translator.load(write_tiny_model(tmp_path_factory.mktemp("run") / "model"))
    torch.set_num_threads(num_threads)


def test_translations_come_in_the_order_of_the_lines(translator: Translator) -> None:
    together = translator.translate(LINES)
    assert together == [translator.translate([line])[0] for line in LINES]
    assert len(set(together)) > 10  # the model does tell lines apart


@pytest.mark.parametrize(
    "batching",
    [Batching(buffer_size=7), Batching(max_tokens=1), Batching(max_tokens=100), Batching(batch_size=3)],
)
def test_batching_changes_no_translation(translator: Translator, batching: Batching) -> None:
    options = DecodingOptions(beam=3)
    changed = list(translator.translate_lines(LINES, options, batching=batching))
    assert [x.text for x in changed] == [x.text for x in translator.translate_lines(LINES, options)]


@pytest.mark.parametrize("blank", ["", " ", "\t", "\r", "\u2028", "\u200b\r"])
def test_blank_in_blank_out(translator: Translator, blank: str) -> None:
    translations = translator.translate(["a dog", blank, "a cat"])
    assert translations[1] == ""
    assert [translations[0], translations[2]] == translator.translate(["a dog", "a cat"])


def test_no_lines_no_translations(translator: Translator) -> None:
    assert translator.translate([]) == []
    assert translator.translate(["", " "]) == ["", ""]


def test_decoding_options_are_given_by_name(translator: Translator) -> None:
    narrow = translator.translate(LINES, beam=1, max_len_a=0, max_len_b=2)
    assert narrow != translator.translate(LINES, beam=4)
    with pytest.raises(TypeError, match="beams"):
        translator.translate(LINES, beams=4)
    with pytest.raises(UserError, match="`beam` must be at least 1"):
        translator.translate(LINES, beam=0)


def test_hypotheses_come_with_their_texts_best_first(translator: Translator) -> None:
    (translation,) = translator.translate_lines(["the old dog"], DecodingOptions(beam=4, nbest=3))
    assert len(translation.texts) == len(translation.hypotheses) == 3
    scores = [hypothesis.score for hypothesis in translation.hypotheses]
    assert scores == sorted(scores, reverse=True)
    decode = translator.task.target_segmenter.decode
    assert translation.texts == decode([hypothesis.tokens for hypothesis in translation.hypotheses])
    assert translation.text == translation.texts[0]


def test_a_source_that_is_too_long_is_cut_and_counted(translator: Translator) -> None:
    num_pieces = len(translator.task.source_segmenter.encode(["the " * 100])[0])
    fits = MAX_POSITIONS - 1
    translations = list(
        translator.translate_lines(["the " * 100, "the", "the " * fits], DecodingOptions(beam=2))
    )
    assert [x.num_dropped_pieces for x in translations] == [num_pieces - fits, 0, 0]
    assert translations[0].text == translations[2].text


def test_a_stream_is_read_by_the_buffer(translator: Translator) -> None:
    num_read = 0

    def endless() -> Iterator[str]:
        nonlocal num_read
        for line in itertools.cycle(LINES):
            num_read += 1
            yield line

    translations = translator.translate_lines(
        endless(), DecodingOptions(beam=1), batching=Batching(buffer_size=10)
    )
    assert [x.source for x in itertools.islice(translations, 15)] == LINES[:15]
    assert num_read == 20


def test_progress_counts_every_line(translator: Translator) -> None:
    steps: list[int] = []
    lines = ["", *LINES, " "]
    list(translator.translate_lines(lines, DecodingOptions(beam=1), on_progress=steps.append))
    assert sum(steps) == len(lines)


def test_a_missing_model_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must be a model folder, but is missing"):
        Translator.load(tmp_path / "nothing")
