r"""The whole way from a gold and a response to a verdict; peers' mistakes; hostile responses; golds of no use."""

import asyncio
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from rewards import grade_math
from rewards.maths import symbolic
from rewards.maths.grade import equal, read_gold

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
    (r"\text{(C)}", "(C)"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\dfrac{\pi}{2})"),
    ("x^2 + 1", "x^2+1"),
    ("1 1/2", "1  1/2"),
    (r"50\%", "50"),
    (r"50\%", "0.5"),
    (r"\frac{1}{1+\sqrt2}", r"\sqrt2-1"),
    ("2^{n+1}", r"2\cdot 2^n"),
    (r"\sin^2 x", r"1-\cos^2 x"),
    (r"\sqrt{3+2\sqrt2}", r"1+\sqrt2"),
    (r"\sum_{k=1}^{n} k", r"\frac{n(n+1)}{2}"),
    ("(-1,3)", "|x-1|<2"),
    (r"\mathbb{R}\setminus\{2\}", r"x \ne 2"),
    (r"x=\pm 2", r"x=2 \text{ or } x=-2"),
    (r"xy=1", r"y=\frac{1}{x}"),
    (r"72\text{ km/h}", r"20\text{ m/s}"),
    (r"5\text{ million}", "5000000"),
    (r"|AB| = 5", "5"),
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
    (r"\pi+10^{-60}", r"\pi"),
    (r"\sqrt{x^2}", "x"),
    (r"\overline{z}", "z"),
    (r"204_5", "204_6"),
    (r"\{\{1\},1\}", r"\{1\}"),
    ("1, 2, 2", "1, 2, 3"),
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
def test_same_answers_written_differently_are_equal_both_ways(given: str, gold: str) -> None:
    assert equal(gold, given).equal
    assert equal(given, gold).equal


@pytest.mark.parametrize(("given", "gold"), DIFFERENT)
def test_different_answers_are_not_equal_either_way(given: str, gold: str) -> None:
    assert not equal(gold, given).equal
    assert not equal(given, gold).equal


@pytest.mark.parametrize(("response", "score"), [case[1:] for case in RESPONSES], ids=[c[0] for c in RESPONSES])
def test_only_the_last_box_after_the_thinking_is_graded(response: str, score: float) -> None:
    assert grade_math("31", response, boxed_only=True).score == score


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("31", "31"),
        ("The answer is 31.", "The answer is 31."),
        ("<think>30?</think> <answer>31</answer>", "31"),
        (r"<answer>It is \boxed{31}</answer>", "31"),
        ("20 + 11 = 31\n#### 31", "31"),
        ("Long division.\nSo the final answer is: 31", "31"),
        (r"\fbox{31}", "31"),
        (r"\boxed 31", "31"),
    ],
)
def test_an_answer_is_found_where_people_put_it(response: str, answer: str) -> None:
    verdict = grade_math("31", response)
    assert (verdict.outcome, verdict.answer) == ("right", answer)


@pytest.mark.parametrize(
    ("gold", "response", "reason"),
    [
        ("31", r"\boxed{31}", "equal/string"),
        ("31", r"\boxed{62/2}", "equal/rational"),
        ("x^2+2x+1", r"\boxed{(x+1)^2}", "equal/structural"),
        (r"\sin^2 x", r"\boxed{1-\cos^2 x}", "equal/structural"),
        (r"\sqrt2+\sqrt3", r"\boxed{\sqrt{5+2\sqrt6}}", "equal/symbolic"),
        (r"\sqrt{x^2}", r"\boxed{x}", "unequal/numeric"),
        ("31", r"\boxed{31 \text{ or } 32}", "unequal/hedge"),
        ("7", r"\boxed{8=7}", "unequal/inconsistent-chain"),
        ("31", r"\boxed{31", "no-answer/unterminated"),
        ("31", "<think>31", "no-answer/thinking"),
        ("5", r"\boxed{9^{9^{9^9}}}", "unequal/too-costly"),
        ("C", r"\boxed{D}", "unequal/choice"),
        ("C", r"\boxed{c}", "equal/choice"),
        ("e", r"\boxed{E}", "unequal/numeric"),
        (r"\frac{", r"\boxed{31}", "gold-unparsable"),
    ],
)
def test_the_reason_says_which_tier_decided(gold: str, response: str, reason: str) -> None:
    verdict = grade_math(gold, response)
    assert verdict.reason == reason
    assert verdict.ms > 0


@pytest.mark.parametrize(
    "gold", [None, "", "  ", ":", "$", "#### ", r"\boxed{}", r"\text{}", float("nan"), True, "9" * 3000, r"\frac{1}{"]
)
def test_unusable_gold_is_unknown_not_zero(gold: object) -> None:
    assert grade_math(gold, r"\boxed{31}").score is None


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
        r"\boxed{" + "(a+b+c)" * 30 + "}",
        r"\boxed{(1+\sqrt2+\sqrt3+\sqrt5+\sqrt7+\sqrt{11})^{60}}",
        r"\boxed{\sum_{k=1}^{299}\sum_{j=1}^{299} k^j}",
        r"\boxed{\sum_{k=1}^{10^{12}} k^k}",
        r"\boxed{(10^7)!}",
        r"\boxed{\binom{1000000}{500000}}",
        r"\boxed{3" + "!" * 20 + "}",
        r"\boxed{\det\begin{pmatrix}" + r"x+a&x+b&x+c&x+d&x+f\\" * 5 + r"\end{pmatrix}}",
        r"\boxed{" + r"\sin(" * 35 + "x" + ")" * 35 + "}",
        r"\boxed{" + "e^{" * 36 + "9" + "}" * 36 + "}",
    ],
    ids=range(20),
)
def test_hostile_completions_cost_little(hostile: str) -> None:
    start = time.perf_counter()
    assert grade_math("9", hostile).score == 0.0
    assert time.perf_counter() - start < 10  # without limits, minutes


def test_threads_and_event_loops_get_the_same_verdicts() -> None:
    pairs = [(r"\sqrt{3+2\sqrt2}", r"1+\sqrt2"), ("9^{9^{9^9}}", "5"), ("1/2", "0.5"), ("x", "y")] * 5
    alone = [grade_math(*pair).outcome for pair in pairs]
    with ThreadPoolExecutor(8) as pool:
        assert [verdict.outcome for verdict in pool.map(lambda pair: grade_math(*pair), pairs)] == alone

    async def together() -> list[str]:
        return [v.outcome for v in await asyncio.gather(*(asyncio.to_thread(grade_math, *pair) for pair in pairs))]

    assert asyncio.run(together()) == alone


def test_a_grader_that_is_out_is_unknown_not_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = (r"\sqrt7+\sqrt3", r"\sqrt{10+2\sqrt{21}}")
    symbolic.close()
    with monkeypatch.context() as patched:
        patched.setattr(symbolic, "COMMAND", (sys.executable, "-c", "raise SystemExit(1)"))
        patched.setattr(symbolic._Worker, "started_once", False)
        verdict = grade_math(*pair)
    assert (verdict.outcome, verdict.reason) == ("unknown", "grader-fault")
    assert grade_math(*pair).outcome == "right"
