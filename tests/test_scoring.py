"""BLEU and chrF against values worked out by hand."""

import math
from collections.abc import Sequence

import pytest
import sacrebleu

from nmt.errors import UserError
from nmt.translation import scoring
from nmt.translation.scoring import Score, bleu, chrf


def test_bleu_by_hand() -> None:
    # 4 of 5 words match, 3 of 4 bigrams, 2 of 3 trigrams, 1 of 2 fourgrams; equal lengths.
    score = bleu(["a b c d x"], ["a b c d e"], target_lang="de")
    assert score.score == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)


def test_bleu_is_of_the_corpus_and_penalises_brevity() -> None:
    # All 4 + 4 words and all n-grams match; the references have 4 + 8 words.
    score = bleu(["a b c d", "e f g h"], ["a b c d", "e f g h i j k l"], target_lang="de")
    assert score.score == pytest.approx(100 * math.exp(1 - 12 / 8))


def test_signature_names_what_the_score_depends_on() -> None:
    signature = bleu(["a"], ["a"], target_lang="de").signature
    assert signature == f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}"
    assert chrf(["a"], ["a"]).signature.startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:")


@pytest.mark.parametrize("language", ["zh", "zh-Hans", "zh_CN"])
def test_the_target_language_chooses_the_tokenisation(language: str) -> None:
    score = bleu(["我喜歡狗。"], ["我喜歡貓。"], target_lang=language)
    # By characters 4 of 5 match, 3 - 1 of 4, 1 of 3, and 0 of 2 smoothed to 1/2; as one word nothing would.
    assert "tok:zh" in score.signature
    assert score.score > 20


def test_chrf_of_equal_texts_is_100() -> None:
    assert chrf(["ein Hund", "eine Katze"], ["ein Hund", "eine Katze"]).score == pytest.approx(100)


def test_chrf_by_hand() -> None:
    # "a" against "ab" has precision 1 and recall 1/2 for single characters, and no longer n-grams of its own;
    # F2 = 5 * 1 * .5 / (4 * 1 + .5).
    assert chrf(["a"], ["ab"]).score == pytest.approx(100 * 2.5 / 4.5)


def test_score_is_printed_with_its_signature() -> None:
    assert str(Score("BLEU", 34.5678, "nrefs:1")) == "BLEU 34.57 | nrefs:1"


@pytest.mark.parametrize(
    ("translations", "references", "text"),
    [(["a", "b"], ["a"], "has 1 for 2"), ([], [], "is empty")],
)
def test_numbers_of_lines_must_match(
    translations: Sequence[str], references: Sequence[str], text: str
) -> None:
    with pytest.raises(UserError, match=text):
        bleu(translations, references, target_lang="de")
    with pytest.raises(UserError, match=text):
        chrf(translations, references)


def test_a_missing_tokeniser_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(**_: str) -> None:
        raise RuntimeError("no mecab")

    monkeypatch.setattr(scoring, "BLEU", missing)
    with pytest.raises(UserError, match=r"pip install \"sacrebleu\[ja\]\""):
        bleu(["a"], ["a"], target_lang="ja")
