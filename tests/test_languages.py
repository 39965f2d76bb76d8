"""One language by all the codes that name it."""

import pytest

from nmt.data.languages import guess_language, is_named_otherwise, is_written_without_blanks, language_of


@pytest.mark.parametrize(
    ("language", "codes"),
    {
        "zh": "zh zh-CN zh_TW zho chi cmn zho_Hans zho_Hant yue_Hant zh-Hant-HK ZH cmn-Hans-CN zh_CN.UTF-8",
        "ja": "ja jpn jpn_Jpan ja_XX ja-JP JA",
        "ko": "ko kor kor_Hang ko_KR",
        "th": "th tha tha_Thai",
        "my": "my mya bur mya_Mymr",
        "bo": "bo bod tib bod_Tibt",
        "de": "de de-AT de_DE",
        "deu": "deu_Latn deu",
    }.items(),
)
def test_codes_of_a_language(language: str, codes: str) -> None:
    assert {language_of(code) for code in codes.split()} == {language}


def test_script_tells_whether_words_have_blanks() -> None:
    assert all(
        map(
            is_written_without_blanks,
            ["zh", "zho_Hans", "jpn_Jpan", "tha", "lao_Laoo", "khm_Khmr", "dzo_Tibt"],
        )
    )
    # Pinyin and romaji have them, and so have Korean and what is not known.
    assert not any(map(is_written_without_blanks, ["zh-Latn", "ja_Latn", "kor_Hang", "de", "xx", ""]))


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("我喜歡狗。 OK", "zh"),
        ("私は犬が好きです。", "ja"),
        ("東京都立図書館へ行く人。", "ja"),
        ("나는 개를 좋아한다.", "ko"),
        ("กขคงจ", "th"),
        ("ကခဂ", "my"),
        ("A dog runs. 犬", None),
        ("Ein Hund läuft.", None),
        ("собака", None),
        ("12:30 …", None),
        ("", None),
    ],
)
def test_a_language_is_told_by_its_letters(text: str, language: str | None) -> None:
    assert guess_language(text) == language


def test_languages_of_one_script_are_not_taken_for_misnamed() -> None:
    assert not any(
        is_named_otherwise(code, guess)
        for code, guess in (("dzo_Tibt", "bo"), ("shn_Mymr", "my"), ("yue", "zh"), ("jpn", "ja"))
    )
    assert all(
        is_named_otherwise(code, guess)
        for code, guess in (("tgt", "zh"), ("zh", "ja"), ("en", "th"), ("zh_Latn", "th"))
    )


@pytest.mark.parametrize("code", ["__zh__", "<2zh>", " zh ", ">>zh<<"])
def test_what_stands_around_a_code_does_not_matter(code: str) -> None:
    assert language_of(code) == "zh"
