"""Repetition: the golden cases, honest text, loops of every kind, and texts made to be slow."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.check import GOLDEN, golden_suite, grader_of
from rewards.repetition import MAX_CHARS, repeated_ngrams, repetition, repetition_reward, squeeze

GSM8K = Path(__file__).parents[3] / "shared/data/gsm8k/test.jsonl"


def test_golden_cases() -> None:
    grader = grader_of("rewards.repetition.repetition_reward")
    assert golden_suite(GOLDEN / "repetition.jsonl", grader, budget_ms=1000).misses == []


@pytest.mark.parametrize(
    ("text", "ngram", "share"),
    [
        ("a b a b", 2, 1 / 3),  # ab, ba, ab
        ("a b c d", 2, 0.0),
        ("A b a B", 2, 1 / 3),
        ("a b", 3, 0.0),
        ("", 1, 0.0),
        ("a a", 1, 0.5),
        ("我们我们", 2, 1 / 3),
        ("ab ab", 1, 0.5),
        ("! ! !!", 1, 0.75),
    ],
)
def test_ngrams_of_words_characters_and_symbols(text: str, ngram: int, share: float) -> None:
    assert repeated_ngrams(text, ngram=ngram) == pytest.approx(share)


def test_the_size_is_an_option_and_must_be_one_at_least() -> None:
    assert repetition_reward(["a b a b"], ngram=2) == [pytest.approx(-1 / 3)]
    assert repetition_reward(["a b a b"] * 2, ngram=[2, 3]) == pytest.approx([-1 / 3, 0])
    with pytest.raises(ValueError, match="ngram=0: give the units of an n-gram"):
        repetition_reward(["a"], ngram=0)


def test_loops_that_ngrams_miss_are_squeezed() -> None:
    inside_a_word = "a" * 2000
    with_a_counter = " ".join(f"Wait, let me check {i}." for i in range(200))  # every eight units hold a new number
    assert repeated_ngrams(inside_a_word, ngram=8) == repeated_ngrams(with_a_counter, ngram=8) == 0
    assert repetition(inside_a_word) > 0.9 and repetition(with_a_counter) > 0.4
    assert squeeze("") == 0


def test_a_loop_costs_more_the_longer_it_goes_on() -> None:
    start = "Natalia sold 48/2 = 24 clips in May, and 48+24 = 72 in both months together. "
    scores = repetition_reward([start + "So the answer is 72. " * times for times in (0, 1, 3, 9, 27, 81)])
    assert scores[0] == scores[1] == 0 and sorted(scores, reverse=True) == scores and len(set(scores)) == 5


def test_gsm8k_solutions_hardly_pay() -> None:
    if not GSM8K.exists():
        pytest.skip("GSM8K is not at ../shared/data/gsm8k/test.jsonl")
    answers = [json.loads(line)["answer"] for line in GSM8K.read_text().splitlines()]
    scores = sorted(map(repetition, answers))
    assert scores[len(scores) // 2] == 0 and scores[int(len(scores) * 0.99)] < 0.1
    assert repetition("\n".join(answers[:200])) < 0.05  # length alone costs nothing


def test_strings_and_conversations_score_the_same() -> None:
    loop = "one two three " * 7
    assert repetition_reward([[{"role": "assistant", "content": loop}]]) == repetition_reward([loop])


@given(st.text(max_size=300) | st.text(alphabet="ab 我!\ud800", max_size=300))
def test_any_text_costs_between_0_and_1(text: str) -> None:
    (score,) = repetition_reward([text])
    assert score is not None and -1 <= score <= 0


@pytest.mark.parametrize("piece", ["我", "word ", "a", "! ", " ", "\ud800", "a我"])
def test_a_megabyte_costs_little_and_its_end_is_read(piece: str) -> None:
    start = time.process_time()
    assert repetition(piece * (1_000_000 // len(piece))) > 0.9
    assert time.process_time() - start < 10
    assert repetition("word " * MAX_CHARS + " ".join(map(str, range(MAX_CHARS)))) < 0.1
