"""Text in, text out, through a small untrained model."""

import dataclasses
import doctest
import itertools
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_translation_model import MAX_POSITIONS, WORDS, write_learned_model

from nmt.errors import UserError
from nmt.generation.generator import Generator
from nmt.generation.options import DecodingKeywords, DecodingOptions
from nmt.models import inference_int8 as int8
from nmt.models.inference import InferenceTransformer
from nmt.translation import translator as translator_module
from nmt.translation.batch_runner import Batching
from nmt.translation.loading import Precision
from nmt.translation.long_sentences import split_ids
from nmt.translation.request import Request
from nmt.translation.translator import Translator

LINES = [" ".join(WORDS[i % 7 : i % 7 + 1 + i % 5]) + f" {WORDS[i % 16]}" for i in range(40)]


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


def test_batches_in_several_threads_give_the_same_translations(translator: Translator) -> None:
    options = DecodingOptions(beam=3, sampling=True, seed=4)
    lines = LINES * 4
    one_by_one = [x.text for x in translator.translate_lines(lines, options)]
    num_threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        together = translator.translate_lines(lines, options, batching=Batching(max_tokens=12))
        assert [x.text for x in together] == one_by_one
    finally:
        torch.set_num_threads(num_threads)


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
    lines = ["the " * 100, "the", "the " * fits]
    translations = list(translator.translate_lines(lines, DecodingOptions(beam=2), too_long="truncate"))
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


def test_a_long_line_is_split_and_its_parts_are_translated_apart(translator: Translator) -> None:
    parts = [
        "the old dog sees the big cat. the tree sings.",
        "a red bird sings, a small cat runs; the tree",
    ]
    assert all(len(ids) < MAX_POSITIONS for ids in translator.task.source_segmenter.encode(parts))
    long, short = " ".join(parts), "the dog"
    together = translator.translate_lines([short, long, "", short], DecodingOptions(beam=3, nbest=2))
    translations = list(together)
    assert [x.num_parts for x in translations] == [1, 2, 1, 1]
    assert [x.num_dropped_pieces for x in translations] == [0] * 4
    apart = translator.translate(parts, beam=3)
    assert translations[1].text == " ".join(text for text in apart if text)
    assert len(translations[1].texts) == len(translations[1].hypotheses) == 2
    for hypothesis in translations[1].hypotheses:
        assert len(hypothesis.token_scores) == len(hypothesis.tokens) + 1
    assert translations[0].text == translations[3].text == translator.translate([short], beam=3)[0]
    encode = translator.task.source_segmenter.encode
    assert list(split_ids(translations[1].source_ids.tolist())) == [ids.tolist() for ids in encode(parts)]


def test_a_forced_beginning_is_that_of_the_first_part(translator: Translator) -> None:
    (start,) = translator.task.target_segmenter.encode(["house"])
    long = "the old dog sees the big cat. " * 4
    (translation,) = translator.translate_lines([Request(long, prefix=start)], DecodingOptions(beam=2))
    assert translation.num_parts > 1
    first, second, *_ = split_ids(translation.hypotheses[0].tokens)
    assert first[: len(start)] == start.tolist()
    assert second[: len(start)] != start.tolist()


class _SmallMemory:
    """Stands before a generator: batches above a size end as if there were no memory for them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, rows: int, error: RuntimeError) -> None:
        self.tried: list[int] = []
        plain = Generator.generate

        def generate(
            generator: Generator, source: torch.Tensor, prefixes: object = None, **options: object
        ) -> Any:
            self.tried.append(source.size(0))
            if source.size(0) > rows:
                raise error
            return plain(generator, source)

        monkeypatch.setattr(Generator, "generate", generate)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["CUDA", "CPU"])
def test_a_batch_without_memory_is_halved_and_nothing_is_lost(
    translator: Translator, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    expected = translator.translate(LINES, beam=2)
    memory = _SmallMemory(monkeypatch, rows=3, error=error)
    done: list[int] = []
    translations = translator.translate_lines(LINES, DecodingOptions(beam=2), on_progress=done.append)
    assert [x.text for x in translations] == expected
    assert sum(done) == len(LINES)
    assert max(memory.tried) > 3  # it was tried
    # What is known not to fit is not tried again: once for each halving, not for each batch.
    assert sum(size > 3 for size in memory.tried) <= 5


def test_a_sentence_without_memory_is_said(translator: Translator, monkeypatch: pytest.MonkeyPatch) -> None:
    _SmallMemory(monkeypatch, rows=0, error=OUT_OF_MEMORY[0])
    with pytest.raises(UserError, match="The memory must suffice for one sentence"):
        translator.translate(["the dog"])


def test_another_error_is_not_taken_for_want_of_memory(
    translator: Translator, monkeypatch: pytest.MonkeyPatch
) -> None:
    _SmallMemory(monkeypatch, rows=0, error=RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        translator.translate(["the dog"])


def test_scores_come_with_each_of_the_nbest(translator: Translator) -> None:
    both, none = translator.translate_with_scores(["the old dog", ""], beam=3, nbest=2)
    assert none == []
    assert both[0].text == translator.translate(["the old dog"], beam=3)[0]
    assert both[0].score >= both[1].score
    for scored in both:
        assert scored.score == pytest.approx(sum(scored.token_scores) / len(scored.token_scores))


def test_one_string_is_not_taken_for_a_list_of_letters(translator: Translator) -> None:
    with pytest.raises(UserError, match="must be a list of lines, but is one string"):
        translator.translate("the dog")


def test_a_line_that_is_no_text_is_refused(translator: Translator) -> None:
    with pytest.raises(UserError, match="`lines` must be lines of text, but one is None"):
        translator.translate(["a", None])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("path", "device", "text"),
    [
        ([], "cpu", "`path` must name a model folder"),
        ("MODEL", "gpu", "`device` must be a device of torch.*but is"),
        ("MODEL", "cuda:100", "`device` cuda:100 must be a GPU of this machine"),
    ],
)
def test_what_cannot_be_loaded_is_refused(path: Any, device: str, text: str) -> None:
    with pytest.raises(UserError, match=text):
        Translator.load(path, device)


def test_keywords_are_the_decoding_options_with_their_types() -> None:
    options = {field.name: field.type for field in dataclasses.fields(DecodingOptions)}
    assert typing.get_type_hints(DecodingKeywords) == options


def test_the_example_of_the_docstring_is_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_learned_model(
        tmp_path / "RUN" / "checkpoints" / "best",
        {"A dog runs.": "Ein Hund läuft.", "Two dogs run.": "Zwei Hunde laufen."},
    )
    monkeypatch.chdir(tmp_path)
    assert doctest.testmod(translator_module) == (0, 5)


def test_what_is_drawn_for_a_line_depends_on_seed_and_number_alone(translator: Translator) -> None:
    lines = ["the dog runs", "", "a cat sleeps the big old bird", "the dog runs", "a tree"] * 4
    options = DecodingOptions(beam=2, nbest=2, sampling=True, seed=3)

    def draw(batching: Batching, options: DecodingOptions = options) -> list[list[str]]:
        return [x.texts for x in translator.translate_lines(lines, options, batching=batching)]

    together = draw(Batching())
    assert draw(Batching(buffer_size=3, batch_size=2)) == together
    assert draw(Batching(), dataclasses.replace(options, seed=4)) != together
    assert together[0] != together[3]  # the same text on another line


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("bf16", torch.bfloat16),
        pytest.param(
            "int8", torch.float32, marks=pytest.mark.skipif(not int8.is_available(), reason="no VNNI")
        ),
    ],
)
def test_low_precision_searches_with_rounded_weights(
    translator: Translator, precision: Precision, dtype: torch.dtype
) -> None:
    rounded = Translator(translator.models, translator.task, device="cpu", precision=precision)
    (model,) = rounded.fast_models
    assert isinstance(model, InferenceTransformer)
    assert (model.dtype, model.product_dtype) == (dtype, torch.bfloat16)
    lines = ["the dog runs", "a cat sleeps the big old bird"]
    options = DecodingOptions(beam=2)
    for exact, other in zip(
        translator.translate_lines(lines, options), rounded.translate_lines(lines, options), strict=True
    ):
        # The search may take another way, but not to a translation that is much less probable.
        assert other.hypotheses[0].score != exact.hypotheses[0].score
        assert other.hypotheses[0].score == pytest.approx(exact.hypotheses[0].score, abs=0.5)


def test_an_unknown_precision_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="`precision` must be fp32, bf16 or int8, but is int4"):
        Translator.load(tmp_path / "nothing", precision="int4")  # type: ignore[arg-type]
