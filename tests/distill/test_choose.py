"""Which answers are kept: only right and readable ones, by each policy, whatever the order they come in."""

import random

import pytest

from distill.choose import Graded, choose

TEXTS = ["the answer is six", "the answer is six indeed", "count the hens and double them", "six", "the answer is six"]


def graded(**changes: dict[int, object]) -> list[Graded]:
    rows = [dict(index=i, text=text, tokens=len(text), outcome="right") for i, text in enumerate(TEXTS)]
    for name, values in changes.items():
        for index, value in values.items():
            rows[index][name] = value
    return [Graded(**row) for row in rows]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("policy", "keep", "expected"),
    [
        ("shortest", 1, [3]),
        ("shortest", 2, [0, 3]),
        ("shortest", 3, [0, 1, 3]),
        ("first", 3, [0, 1, 2]),
        ("diverse", 1, [3]),
        ("diverse", 3, [0, 2, 3]),
        ("best", 2, [0, 2]),
        ("best", 9, [0, 1, 2, 3]),
    ],
)
def test_policies(policy: str, keep: int, expected: list[int]) -> None:
    answers = graded(score={0: 0.5, 2: 2.0, 4: -1.0})
    for seed in range(5):
        random.Random(seed).shuffle(answers)
        assert choose(answers, policy, keep=keep) == expected  # type: ignore[arg-type]


def test_wrong_unknown_and_unreadable_ones_are_never_kept() -> None:
    answers = graded(outcome={0: "wrong", 1: "unknown"}, complaints={2: ["repetition"]})
    assert choose(answers, "first", keep=9) == [3, 4]
    assert choose(graded(outcome=dict.fromkeys(range(5), "unknown")), "shortest", keep=9) == []


def test_the_same_answer_is_kept_once() -> None:
    assert choose(graded(text={4: "six\n"}), "first", keep=9) == [0, 1, 2, 3]


def test_diverse_takes_what_shares_least_with_all_that_is_taken() -> None:
    answers = graded(text={3: "the answer is six now"}, tokens={0: 1})
    assert choose(answers, "diverse", keep=2) == [0, 2]
