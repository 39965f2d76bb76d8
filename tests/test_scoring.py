"""BLEU and chrF against values worked out by hand."""

import math
from collections.abc import Sequence

import pytest
import sacrebleu

from nmt.errors import UserError
from nmt.translation import scoring
from nmt.translation.scoring import (
    Comparison,
    RunningScores,
    Score,
    bleu,
    chrf,
    compare,
    sentence_chrf,
    ter,
    verdict,
)


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


@pytest.mark.parametrize(
    "language", ["zh", "zh-Hans", "zh_CN", "zho_Hans", "zho_Hant", "cmn", "yue_Hant", "chi"]
)
def test_the_target_language_chooses_the_tokenisation(language: str) -> None:
    score = bleu(["我喜歡狗。"], ["我喜歡貓。"], target_lang=language)
    # By characters 4 of 5 match, 3 - 1 of 4, 1 of 3, and 0 of 2 smoothed to 1/2; as one word nothing would.
    assert "tok:zh" in score.signature
    assert score.score > 20


@pytest.mark.parametrize("language", ["th", "tha_Thai", "khm", "bod_Tibt", "mya"])
def test_languages_without_blanks_are_scored_by_characters(language: str) -> None:
    score = bleu(["กขคงจ"], ["กขคงฉ"], target_lang=language)
    assert "tok:char" in score.signature
    assert score.score > 20


@pytest.mark.parametrize("language", ["de", "deu_Latn", "zh_Latn", "ja-Latn", "xx", ""])
def test_words_between_blanks_are_scored_as_such(language: str) -> None:
    assert "tok:13a" in bleu(["a"], ["a"], target_lang=language).signature


@pytest.mark.parametrize("language", ["ja", "jpn", "jpn_Jpan", "ja_XX", "ko", "kor_Hang"])
def test_japanese_and_korean_have_their_own_tokenisers(
    language: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def tokenizer(trg_lang: str) -> None:
        asked.append(trg_lang)
        raise ImportError

    monkeypatch.setattr(scoring, "BLEU", tokenizer)
    with pytest.raises(UserError, match="must have its tokeniser"):
        bleu(["a"], ["a"], target_lang=language)
    assert asked == ["ja" if language[0] == "j" else "ko"]


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


def test_ter_by_hand() -> None:
    # One of four words is replaced, and one is missing of the other four.
    assert ter(["a b c x", "e f g"], ["a b c d", "e f g h"], target_lang="de").score == pytest.approx(
        100 * 2 / 8
    )


@pytest.mark.parametrize("language", ["de", "zh"])
def test_running_scores_are_those_of_the_whole_corpus(language: str) -> None:
    translations = ["ein Hund läuft", "", "zwei zwei Katzen .", "我喜歡狗。", "a b c d e f"]
    references = ["ein Hund läuft schnell", "nichts", "zwei Katzen.", "我喜歡貓。", "a b c d f e"]
    running = RunningScores(target_lang=language)
    for start, end in [(0, 2), (2, 2), (2, 5)]:
        running.add(translations[start:end], references[start:end])
    assert running.num_lines == 5
    assert running.scores() == [
        bleu(translations, references, target_lang=language),
        chrf(translations, references),
        ter(translations, references, target_lang=language),
    ]


def test_sentence_chrf_is_that_of_each_line() -> None:
    assert sentence_chrf(["a", "bc"], ["ab", "bc"]) == pytest.approx([100 * 2.5 / 4.5, 100.0])


def corpus(num_lines: int, num_wrong: int) -> list[str]:
    """Lines of eight words, of which the last one is wrong in some lines."""
    return [
        " ".join(f"w{i}x{j}" for j in range(7)) + (" wrong" if i < num_wrong else f" w{i}x7")
        for i in range(num_lines)
    ]


def test_a_clear_difference_is_not_chance_and_has_a_direction() -> None:
    references = corpus(60, 0)
    better, worse = corpus(60, 5), corpus(60, 50)
    comparisons = compare(better, worse, references, target_lang="de")
    assert [x.name for x in comparisons] == ["BLEU", "chrF2", "TER"]
    assert all(x.is_significant and x.is_better for x in comparisons)
    assert [x.score for x in comparisons] == pytest.approx(
        [
            bleu(better, references, target_lang="de").score,
            chrf(better, references).score,
            ter(better, references, target_lang="de").score,
        ]
    )
    assert verdict(comparisons).startswith("Better than the baseline, and not by chance")
    assert verdict(compare(worse, better, references, target_lang="de")).startswith("Worse than the baseline")
    assert "bs:1000|seed:12345" in comparisons[0].signature


def test_equal_systems_do_not_differ() -> None:
    # sacreBLEU gives p = 1/1001 to two equal systems.
    comparisons = compare(corpus(20, 3), corpus(20, 3), corpus(20, 0), target_lang="de")
    assert not any(x.is_significant for x in comparisons)
    assert verdict(comparisons) == "The two are equal."


def test_a_difference_of_one_line_may_be_chance() -> None:
    right, wrong = corpus(20, 0), corpus(20, 20)
    first, second = [wrong[0], *right[1:]], [*right[:18], *wrong[18:]]  # one wrong line against two others
    comparisons = compare(first, second, corpus(20, 0), target_lang="de")
    assert not any(x.is_significant for x in comparisons)
    assert verdict(comparisons).startswith("The difference means nothing")


@pytest.mark.parametrize(
    ("p_values", "text"),
    [
        ([0.01, 0.01, 0.01], "Better than the baseline, and not by chance"),
        (
            [0.01, 0.2, 0.01],
            "Better than the baseline by BLEU, TER (p < 0.05); chrF2 cannot tell them apart.",
        ),
        ([0.2, 0.2, 0.2], "The difference means nothing"),
    ],
)
def test_the_verdict_names_what_tells_two_systems_apart(p_values: list[float], text: str) -> None:
    names_and_scores = [("BLEU", 30.0, 31.0), ("chrF2", 50.0, 51.0), ("TER", 50.0, 49.0)]
    comparisons = [
        Comparison(name, before, after, p, "")
        for (name, before, after), p in zip(names_and_scores, p_values, strict=True)
    ]
    assert verdict(comparisons).startswith(text)


def test_scores_that_contradict_each_other_are_said() -> None:
    comparisons = [Comparison("BLEU", 30.0, 31.0, 0.01, ""), Comparison("chrF2", 50.0, 49.0, 0.01, "")]
    assert verdict(comparisons).startswith("The scores contradict each other (BLEU, chrF2)")
    assert str(comparisons[0]) == "BLEU 30.00 -> 31.00 (+1.00), p = 0.010: better | "


LONG = " ".join(f"w{i}" for i in range(scoring.LONGEST_TER_LINE + 1))
FITS = " ".join(f"w{i}" for i in range(scoring.LONGEST_TER_LINE))


def test_ter_of_long_lines_is_left_out_and_counted() -> None:
    running = RunningScores(target_lang="de")
    running.add([LONG, "a b c d", FITS], ["x", "a b c e", FITS])
    running.add(["x"], [LONG])
    whole, characters, edits = running.scores()
    assert (whole.name, characters.name, edits.name) == ("BLEU", "chrF2", "TER")
    assert edits.score == pytest.approx(100 / (4 + scoring.LONGEST_TER_LINE))
    assert str(edits).endswith("| without 2 lines of more than 150 words")
    assert whole.num_left_out == characters.num_left_out == 0
    # BLEU is of all lines.
    assert (
        whole.score
        == bleu([LONG, "a b c d", FITS, "x"], ["x", "a b c e", FITS, LONG], target_lang="de").score
    )


def test_where_all_lines_are_long_there_is_no_ter() -> None:
    running = RunningScores(target_lang="de")
    running.add([LONG], [LONG])
    assert [score.name for score in running.scores()] == ["BLEU", "chrF2"]
    comparisons = compare([LONG, LONG], ["a", "b"], [LONG, LONG], target_lang="de")
    assert [x.name for x in comparisons] == ["BLEU", "chrF2"]


def test_a_comparison_leaves_lines_out_that_are_long_in_either_system() -> None:
    comparisons = compare(["a b", LONG, "c"], ["a x", "d", LONG], ["a b", "d", "c"], target_lang="de")
    assert [x.num_left_out for x in comparisons] == [0, 0, 2]
    edits = comparisons[2]
    assert (edits.baseline, edits.score) == (50, 0)
    assert str(edits).endswith("| without 2 lines of more than 150 words")


def test_words_of_chinese_are_characters() -> None:
    running = RunningScores(target_lang="zh")
    running.add(["\u6211" * 151, "\u6211" * 150], ["\u6211", "\u6211" * 150])
    assert running.scores()[2].num_left_out == 1
