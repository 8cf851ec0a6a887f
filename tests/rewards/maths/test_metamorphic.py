"""Golds reworded stay right, golds spoilt are wrong, and right is right both ways round."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rewards import grade_math
from rewards.maths.metamorphic import PARAPHRASES, PERTURBATIONS, cases, is_bare

GOLDEN = Path(__file__).parents[3] / "rewards/golden/math.jsonl"


@pytest.fixture(scope="module")
def golden() -> list[dict[str, Any]]:
    return [json.loads(line) for line in GOLDEN.read_text(encoding="utf-8").splitlines()]


def _misses(rows: list[dict[str, Any]]) -> list[str]:
    graded = [(row, grade_math(row["gold"], row["response"])) for row in rows]
    return [
        f"{row['want']} but {verdict.outcome} ({verdict.reason}), {row['why']}: {row['gold']} | {row['response']}"
        for row, verdict in graded
        if verdict.outcome != row["want"]
    ]


def test_a_few_cases_of_each_gold_get_their_verdicts(golden: list[dict[str, Any]]) -> None:
    assert not _misses(list(cases(golden, 2)))


@pytest.mark.nightly
def test_all_cases_of_each_gold_get_their_verdicts(golden: list[dict[str, Any]]) -> None:
    assert not _misses(list(cases(golden)))


def test_a_wrong_case_is_not_right_the_other_way_round(golden: list[dict[str, Any]]) -> None:
    rows = [row for row in golden if row["want"] == "wrong" and is_bare(row["gold"]) and is_bare(row["response"])]
    assert [row for row in rows if grade_math(row["response"], row["gold"]).outcome == "right"] == []


def test_every_rule_finds_golds_to_change(golden: list[dict[str, Any]]) -> None:
    found = Counter(row["why"] for row in cases(golden))
    assert {why for why in (*PARAPHRASES, *PERTURBATIONS) if found[why] < 5} == set()


@pytest.mark.parametrize(
    ("gold", "why", "response"),
    [
        (r"[0,1)", "sized brackets", r"\left[0,1\right)"),
        (r"(x+1)(x-1)", "sized brackets", None),
        (r"(-\infty,3]", "other bracket", r"(-\infty,3)"),
        (r"[2,\infty)", "other bracket", r"(2,\infty)"),
        (r"(1,1)", "items swapped", None),
        (r"-\frac{1}{2}", "fraction not reduced", r"-\frac{3}{6}"),
        (r"-\frac{1}{2}", "sign", r"\frac{1}{2}"),
        (r"0", "sign", None),
        (r"-12345", "thin spaces", r"-12\,345"),
        (r"x \le 3", "other relation signs", r"x \leq 3"),
        (r"\left(1\right)", "other relation signs", None),
        (r"19", "last digit", "10"),
        (r"\binom{5}{2}", "last digit", None),
        (r"\textbf{(B)}\ 30", "last digit", None),
        (r"(A)", "an item more", None),
        (r"12 \text{ cm}", "Unicode minus", None),
    ],
)
def test_a_rule_changes_what_it_says(gold: str, why: str, response: str | None) -> None:
    row = {"gold": gold, "response": gold, "want": "right", "why": "", "kind": "right"}
    made = {case["why"]: case["response"] for case in cases([row])}
    assert made.get(why) == response
