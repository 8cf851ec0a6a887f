r"""Golden cases for exact-answer maths: right, wrong, reworded, truncated, hostile, unusable gold; GSM8K."""

import json
import time
from pathlib import Path

import pytest

from rewards.math_answer import accuracy, equal, grade, read_gold

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "test.jsonl"

SAME = [
    ("31", "31"),
    ("0.50", ".5"),
    (r"\frac{1}{2}", "0.5"),
    (r"\frac12", "1/2"),
    (r"\dfrac{2}{4}", r"\frac{1}{2}"),
    (r"-\frac{1}{2}", r"\frac{1}{-2}"),
    ("- 5", "-5"),
    ("\u22125", "-5"),
    ("\uff15", "5"),
    ("+7", "7"),
    ("5.", "5"),
    ("3.50.", "7/2"),
    ("1,000", "1000"),
    (r"1\,000\,000", "1000000"),
    ("1{,}234.5", "1234.5"),
    (r"1,\!000", "1000"),
    ("$18", "18"),
    (r"\$18", "18"),
    (r"-\$18", "-18"),
    ("$18$", "18"),
    (r"\(18\)", "18"),
    (r"\text{18}", "18"),
    (r"\boxed{18}", "18"),
    (r"10\text{ cm}", "10"),
    ("10", r"10\text{ cm}"),
    (r"10\text{cm}", r"10 \text{ cm}"),
    (r"10\text{ m}^2", "10"),
    (r"90^\circ", "90"),
    ("90°", r"90^{\circ}"),
    (r"50\%", "50%"),
    (r"50\text{ percent}", r"50\%"),
    ("(C)", "C"),
    ("c", "C"),
    (r"\text{(C)}", "(C)"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\dfrac{\pi}{2})"),
    ("x^2 + 1", "x^2+1"),
    ("1 1/2", "1  1/2"),
]

DIFFERENT = [
    ("31", "32"),
    ("0.3333", "1/3"),
    ("0.0000001", "0.0000002"),
    (r"\frac{2}{1}", r"\frac{1}{2}"),
    ("-5", "5"),
    ("1.234", "1,234"),
    ("12,34", "1234"),
    ("1/0", "0"),
    ("1 1/2", "11/2"),
    ("11/2", "1 1/2"),
    (r"1\frac{1}{2}", "1/2"),
    (r"50\%", "50"),
    ("0.5", r"50\%"),
    (r"10\text{ cm}", r"10\text{ m}"),
    (r"5\text{ million}", "5"),
    (r"5\text{ or six}", "5"),
    (r"5\text{ or 6}", "5"),
    (r"5\text{i}", "5"),
    ("5x", "5"),
    ("5 pi", "5"),
    ("5, 6", "5"),
    ("5 or 6", "5"),
    ("8 = 7", "7"),
    ("10²", "102"),
    ("7\u200b8", "7"),
    ("٣", "3"),
    ("1_000", "1000"),
    ("D", "C"),
    ("A, B, C, D", "C"),
    ("X", "x"),
    ("(2,1)", "(1,2)"),
    ("[0,1]", "(0,1)"),
    ("nan", "0"),
    (r"\text{Tuesday}", r"\text{Monday}"),
    (r"\boxed{3}+{1}", "3"),
    ("__import__('os').system('true')", "0"),
]

RESPONSES = [
    ("right", r"<think>20+11</think>\boxed{31}", 1.0),
    ("right without tags", r"So \boxed{31}.", 1.0),
    ("right with a prefilled <think>", r"20+11</think>\boxed{31}", 1.0),
    ("space before the brace", r"\boxed {31}", 1.0),
    ("wrong", r"<think></think>\boxed{32}", 0.0),
    ("not boxed", "<think></think>31", 0.0),
    ("box only in the thinking", r"<think>\boxed{31}</think>It is 31.", 0.0),
    ("thinking never closes", r"<think>20+11=31, so \boxed{31}", 0.0),
    ("thinking opens again", r"<think></think>\boxed{31}<think>", 0.0),
    ("last of two boxes is wrong", r"</think>\boxed{31} or \boxed{32}", 0.0),
    ("last of two boxes is right", r"</think>\boxed{32}, no: \boxed{31}", 1.0),
    ("two answers in one box", r"</think>\boxed{31, 32}", 0.0),
    ("truncated in the box", r"</think>\boxed{31", 0.0),
    ("a right box, then a truncated one", r"</think>\boxed{31} \boxed{3", 0.0),
    ("a right box, then an empty one", r"</think>\boxed{31} \boxed{ }", 0.0),
    ("unbalanced escaped brace", r"</think>\boxed{31\}", 0.0),
    ("empty", "", 0.0),
]


@pytest.mark.parametrize(("given", "gold"), SAME)
def test_same_answers_written_differently_are_equal(given: str, gold: str) -> None:
    assert equal(given, gold)


@pytest.mark.parametrize(("given", "gold"), DIFFERENT)
def test_different_answers_are_not_equal(given: str, gold: str) -> None:
    assert not equal(given, gold)


@pytest.mark.parametrize(("response", "score"), [case[1:] for case in RESPONSES], ids=[c[0] for c in RESPONSES])
def test_only_the_last_box_after_the_thinking_is_graded(response: str, score: float) -> None:
    assert grade(response, "31") == score


@pytest.mark.parametrize(
    "gold", [None, "", "  ", ":", "$", "#### ", r"\boxed{}", r"\text{}", float("nan"), True, "9" * 2000]
)
def test_unusable_gold_is_unknown_not_zero(gold: object) -> None:
    assert grade(r"\boxed{31}", gold) is None


@pytest.mark.parametrize(
    ("gold", "bare"),
    [
        ("20+11=<<20+11=31>>31\n#### 31", "31"),
        (r"so the answer is $\boxed{31}$.", "31"),
        (31, "31"),
        (0.5, "0.5"),
        (1e-7, "0.0000001"),
        ("∅", "∅"),
    ],
)
def test_gold_is_read_from_solutions_and_numbers(gold: object, bare: str) -> None:
    assert read_gold(gold) == bare


def test_conversational_completions_are_graded_like_strings() -> None:
    talk = [
        [{"role": "assistant", "content": r"\boxed{1}"}],
        [{"role": "assistant", "content": r"\boxed{2}"}],
    ]
    assert accuracy(prompts=["a", "b"], completions=talk, answer=["1", "1"]) == [1.0, 0.0]


def test_a_missing_gold_names_the_column() -> None:
    with pytest.raises(ValueError, match="answer: 1 golds for 2 completions"):
        accuracy(prompts=["a", "b"], completions=["", ""], answer=["1"])


@pytest.mark.parametrize(
    "hostile",
    [
        r"\boxed{" + "9" * 1_000_000 + "}",
        r"\boxed{" * 100_000,
        r"\boxed{" * 50_000 + "}" * 50_000,
        r"\boxed{" + "{" * 500_000,
        r"\boxed" + " " * 1_000_000,
        r"\boxed{9^{9^{9^{9}}}}",
        r"\boxed{" + "1," * 490 + "}",
        r"\boxed{" + " " * 490 + "$" * 490 + "}",
        r"\boxed{" + r"\text{" * 150 + "}" * 150 + "}",
        "<think>" * 100_000,
    ],
    ids=range(10),
)
def test_hostile_completions_cost_under_half_a_second(hostile: str) -> None:
    start = time.perf_counter()
    assert grade(hostile, "9") == 0.0
    assert time.perf_counter() - start < 0.5


def test_every_gsm8k_gold_equals_itself_and_not_its_successor() -> None:
    if not GSM8K.exists():
        pytest.skip("GSM8K is not at ../shared/data/gsm8k/test.jsonl")
    golds = [json.loads(line)["answer"] for line in GSM8K.read_text().splitlines()]
    answers = [read_gold(gold) for gold in golds]
    own = [rf"<think>{gold}</think>\boxed{{{answer}}}" for gold, answer in zip(golds, answers, strict=True)]
    next_one = [rf"\boxed{{{int(str(answer).replace(',', '')) + 1}}}" for answer in answers]
    assert len(golds) == 1319
    assert accuracy(completions=own, answer=golds) == [1.0] * 1319
    assert accuracy(completions=next_one, answer=golds) == [0.0] * 1319
