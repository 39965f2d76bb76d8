"""Requests: a line with what concerns it alone, and the translation that knows it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

import nmt
from nmt.data.vocabulary import EOS_ID, PAD_ID
from nmt.generation.options import DecodingOptions
from nmt.translation.batch_runner import Batching
from nmt.translation.batch_search import Search
from nmt.translation.request import Request
from nmt.translation.sentences import Lines, Sentence
from nmt.translation.translator import Translator

LINES = ["the old dog", "", "a cat sees the red bird", "the tree", "a small house runs", "the dog"]


def test_a_request_of_a_text_alone_is_the_text(translator: Translator) -> None:
    assert translator.translate([Request(line) for line in LINES]) == translator.translate(LINES)
    assert translator.translate([LINES[0], nmt.Request(LINES[2])]) == translator.translate(LINES[::2][:2])
    scored = translator.translate_with_scores([Request(LINES[0])], nbest=2)
    assert scored == translator.translate_with_scores(LINES[:1], nbest=2)


def test_a_translation_knows_its_request_in_any_batching(translator: Translator) -> None:
    requests = [Request(line, reference=f"reference {i}") for i, line in enumerate(LINES * 3)]
    for batching in (Batching(), Batching(buffer_size=4), Batching(batch_size=1)):
        found = translator.translate_lines(requests, DecodingOptions(beam=2), batching=batching)
        assert all(x.request is request for x, request in zip(found, requests, strict=True))


def test_each_request_begins_with_its_own_prefix(translator: Translator) -> None:
    starts = translator.task.target_segmenter.encode(["house", "a red bird"])
    prefixes = [(), starts[0], starts[1].tolist(), (), (*starts[0], EOS_ID), ()]
    requests = [Request(line, prefix) for line, prefix in zip(LINES, prefixes, strict=True)]
    options = DecodingOptions(beam=3, nbest=2)
    together = list(translator.translate_lines(requests, options))
    free = list(translator.translate_lines(LINES, options))
    for request, found, without in zip(requests, together, free, strict=True):
        if not len(request.prefix) or not request.text:
            assert found.texts == without.texts
            continue
        wanted = [int(token) for token in request.prefix if token != EOS_ID]
        assert all(x.tokens[: len(wanted)] == wanted for x in found.hypotheses)
        (alone,) = translator.translate_lines([request], options)
        assert alone.texts == found.texts
    assert together[4].hypotheses[0].tokens == starts[0].tolist()  # the whole translation was given


def test_references_are_scored_and_come_back(translator: Translator) -> None:
    requests = [Request(line, reference=text) for line, text in zip(LINES, LINES[::-1], strict=True)]
    for found, request in zip(translator.score_lines(requests), requests, strict=True):
        assert found.request is request
        if request.text:
            assert found.text == request.reference
    (missing,) = translator.score_lines([Request(LINES[0])])
    assert missing.hypotheses[0].tokens == [] and len(missing.hypotheses[0].token_scores) == 1


def test_sentences_are_numbered_by_line_and_part(translator: Translator) -> None:
    long = "the old dog sees the big cat. " * 4
    reader = Lines(translator.source_segmenter, longest=20, too_long="split")
    first, second = reader.read([Request("the dog"), Request("")])
    (third,) = reader.read([Request(long, prefix=[5, 6])])
    assert [x.number for x in first.sentences] == [1] and not second.sentences
    numbers = [x.number for x in third.sentences]
    assert numbers == [3 + part * 2**40 for part in range(len(numbers))] and len(numbers) > 1
    assert [x.target.tolist() for x in third.sentences[:2]] == [[5, 6], []]
    joined = np.concatenate([x.source for x in third.sentences])[:-1]
    assert third.ids.tolist() == joined.tolist()
    assert PAD_ID not in joined


def test_a_search_sees_the_request_of_each_sentence(
    translator: Translator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rules for single sentences are made from it, as CONTRIBUTING.md says; parts of a long line share theirs."""
    seen: list[tuple[int, Request]] = []
    run = Search.run

    def watched(self: Search, sentences: Sequence[Sentence], may_drop: bool) -> Any:
        seen.extend((x.number, x.request) for x in sentences)
        return run(self, sentences, may_drop)

    monkeypatch.setattr(Search, "run", watched)
    requests = [Request("the dog"), Request("the old dog sees the big cat. " * 4), Request("a cat")]
    list(translator.translate_lines(requests, DecodingOptions(beam=2)))
    assert len(seen) > 3
    assert all(request is requests[number % 2**40 - 1] for number, request in seen)


@pytest.mark.parametrize("stranger", [None, 3, b"the dog"])
def test_what_is_neither_text_nor_request_is_refused(translator: Translator, stranger: object) -> None:
    with pytest.raises(nmt.UserError, match="`lines` must be lines of text, but one is"):
        translator.translate([Request("a"), stranger])  # type: ignore[list-item]
