"""What the translation task shows besides numbers: sentences, references and translations in a table."""

import html
import re
from html.parser import HTMLParser

import markdown
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.in_memory import Side
from support.tiny_translation_model import WORDS

from nmt.data.parallel_dataset import ParallelDataset
from nmt.data.vocabulary import EOS_ID
from nmt.distributed import World, single
from nmt.task import Illustrations
from nmt.translation.illustration import Row, markdown_table
from nmt.translation.translator import Translator

CPU = torch.device("cpu")


class Cells(HTMLParser):
    """Collects the texts of table cells; any mark within one is a fault."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def rendered(table: str) -> list[list[str]]:
    """Render Markdown as TensorBoard does, and return the cells of its only table."""
    cells = Cells()
    cells.feed(markdown.markdown(table, extensions=["markdown.extensions.tables"]))
    assert cells.tags <= {"table", "thead", "tbody", "tr", "th", "td"}, cells.tags
    return [[cell.strip() for cell in row] for row in cells.rows]


# "Cs" are halves of characters; a control character is no text that a segmenter gives.
SENTENCES = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20)


@given(st.lists(st.builds(Row, SENTENCES, SENTENCES, SENTENCES), min_size=1, max_size=4))
def test_whatever_the_sentences_hold_is_shown_as_it_is(rows: list[Row]) -> None:
    shown = rendered(markdown_table(rows))
    assert shown[0] == ["source", "reference", "translation"]
    assert [[" ".join(cell.split()) for cell in row] for row in shown[1:]] == [
        [" ".join(text.split()) for text in row] for row in rows
    ]


def test_marks_stay_readable_text() -> None:
    table = markdown_table([Row("a | b <b>*c*</b>\n&amp;", "_x_ `y` [z](q)", "1. # ~~no~~ \\|")])
    assert rendered(table)[1] == ["a | b <b>*c*</b> &amp;", "_x_ `y` [z](q)", "1. # ~~no~~ \\|"]
    assert html.unescape(table.splitlines()[2]).count("\n") == 0


def pairs(translator: Translator, texts: list[str]) -> ParallelDataset:
    encoded = [np.append(ids, EOS_ID) for ids in translator.task.source_segmenter.encode(texts)]
    return ParallelDataset(Side(encoded), Side(encoded[::-1]))


def table_of(illustrations: Illustrations) -> list[list[str]]:
    return rendered(illustrations.texts["translations"])


@pytest.mark.parametrize(("number", "shown"), [(1, [0]), (3, [0, 1, 2]), (29, [0, 4, 8, 12, 16, 20, 24, 28])])
def test_a_few_sentences_from_all_over_the_split_are_shown_with_their_translations(
    translator: Translator, number: int, shown: list[int]
) -> None:
    texts = [" ".join(WORDS[i % 7 : i % 7 + 1 + i % 5]) for i in range(number)]
    examples = pairs(translator, texts)
    illustrations = translator.task.illustrate(translator.models[0], examples, single(CPU))
    assert table_of(illustrations)[1:] == [
        [texts[i], texts[::-1][i], re.sub(r"\s+", " ", translator.translate([texts[i]])[0]).strip()]
        for i in shown
    ]
    assert illustrations.images == {}


def test_other_ranks_and_empty_splits_show_nothing(translator: Translator) -> None:
    model = translator.models[0]
    examples = pairs(translator, ["a dog"])
    assert translator.task.illustrate(model, examples, World(rank=1, size=2, device=CPU)) == Illustrations()
    assert translator.task.illustrate(model, pairs(translator, []), single(CPU)) == Illustrations()
