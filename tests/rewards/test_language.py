"""Language of the reasoning: the golden cases, GSM8K, what is refused, and texts made to be slow."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.check import GOLDEN, golden_suite, grader_of
from rewards.language import LANGUAGES, count_words, language_reward

GSM8K = Path(__file__).parents[3] / "shared/data/gsm8k/test.jsonl"


def test_golden_cases() -> None:
    grader = grader_of("rewards.language.language_reward")
    assert golden_suite(GOLDEN / "language.jsonl", grader, budget_ms=1000).misses == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("two words", {"latin": 2}),
        ("a, I and x", {"latin": 1}),  # a single letter may be a variable
        ("well-known don't", {"latin": 3}),
        ("GCD of ABCD, ANSWER", {"latin": 2}),
        ("三个字", {"han": 2}),
        ("かな漢字", {"kana": 1, "han": 4 / 3}),
        ("สวัสดี", {"thai": 1.5}),
        ("한국어 말", {"hangul": 2}),
        ("Слово ещё", {"cyrillic": 2}),
        ("λόγος π", {"greek": 1}),
        ("שלום", {"hebrew": 1}),
        ("سلام عليكم", {"arabic": 2}),
        ("नमस्ते दुनिया", {"devanagari": 2}),
        ("გამარჯობა და", {"other": 2}),
        ("因为so我们then", {"han": 4 / 1.5, "latin": 2}),
        ("**bold** (word)", {"latin": 2}),
        ("$5 and $6, $x$ and $y + total$", {"latin": 2}),
        ("($5 each) or ($6 each), $five or $six", {"latin": 6}),  # no pair of these is maths
        ("$$ab cd$$ ef", {"latin": 1}),
        (r"\(ab\) \[cd\] ef \frac gh", {"latin": 2}),
        (r"\( ab \( cd \) ef", {"latin": 2}),  # only the inner one closes
        ("`ab` ```cd``` ef", {"latin": 1}),
        ("`ab\ncd` ef", {"latin": 3}),  # a backtick alone on its line is none
        ("½ ② 7 … !", {}),
    ],
)
def test_words_are_counted_by_script(text: str, words: dict[str, float]) -> None:
    assert {script: count for script, count in count_words(text).items() if count} == pytest.approx(words)


def test_every_language_scores_its_own_letters_in_full() -> None:
    hello = {
        "en": "hello", "zh": "你好", "ja": "こんにちは", "ko": "안녕하세요", "ru": "привет", "ar": "مرحبا",
        "he": "שלום", "hi": "नमस्ते", "el": "γεια", "th": "สวัสดี",
    }  # fmt: skip
    scripts = {LANGUAGES[code] for code in hello}
    assert scripts == set(LANGUAGES.values())
    for code, text in hello.items():
        full = {other for other in hello if language_reward([text], language=other) == [1.0]}
        none = {other for other in hello if language_reward([text], language=other) == [0.0]}
        assert full == ({"zh", "ja"} if code == "zh" else {code})  # Japanese is written in Han, too
        assert none == set(hello) - full


def test_a_column_gives_each_row_its_language() -> None:
    talk = [[{"role": "assistant", "content": "<think>你好</think>hello"}]] * 4
    assert language_reward(talk, language=["zh", "ZH-Hant", "en", None]) == [1.0, 1.0, 0.0, None]


def test_all_reasoning_counts_however_often_it_is_closed() -> None:
    assert language_reward(["<think>add them</think><think>两数加</think>thirty-one"]) == [0.5]


def test_an_unknown_language_is_told_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"language='zhh' is unknown \(did you mean 'zh'\?\): give one of en, fr"):
        language_reward(["a"], language="zhh")


def test_gsm8k_solutions_are_english() -> None:
    if not GSM8K.exists():
        pytest.skip("GSM8K is not at ../shared/data/gsm8k/test.jsonl")
    rows = [json.loads(line) for line in GSM8K.read_text().splitlines()]
    assert language_reward([row["question"] for row in rows]) == [1.0] * 1319
    scores = language_reward([row["answer"] for row in rows])
    assert (
        scores.count(1.0) >= 1318 and language_reward([row["answer"] for row in rows], language="zh").count(0.0) == 1319
    )


@given(st.text(max_size=300), st.sampled_from(sorted(LANGUAGES)))
def test_any_text_scores_between_0_and_1(text: str, language: str) -> None:
    (score,) = language_reward([text], language=language)
    assert score is not None and 0 <= score <= 1


@pytest.mark.parametrize("piece", "我|word |`|```a|$a|$ |$$|\\[|\\(|\\|a|1|=|a我|<think>|ა|`a\n| ".split("|"))
def test_half_a_megabyte_is_read_once(piece: str) -> None:
    start = time.process_time()
    language_reward([piece * (500_000 // len(piece))])
    assert time.process_time() - start < 10  # read again from every place, minutes
