"""Every golden and shared maths case gets the verdict a mathematician gives, and none takes a second."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from rewards import Verdict, grade_math

ROOT = Path(__file__).parents[3]
SHARED = Path(os.environ.get("DATA", ROOT.parent / "shared/data")) / "math_cases.jsonl"


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


GOLDEN = _rows(ROOT / "rewards/golden/math.jsonl")


def _named(rows: list[dict[str, Any]]) -> list[Any]:
    return [pytest.param(row, id=f"{number}-{row['category']}") for number, row in enumerate(rows, 1)]


def _grade(gold: object, response: str) -> Verdict:
    """A verdict within a second; a slow one has a second try with other text, for the machine may be busy."""
    for attempt in range(2):
        began = time.perf_counter()
        verdict = grade_math(gold, response + " " * attempt)
        if time.perf_counter() - began < 1:
            break
    else:
        pytest.fail(f"more than a second, twice: {verdict}")
    return verdict


@pytest.mark.parametrize("row", _named(GOLDEN))
def test_a_golden_case_gets_its_verdict(row: dict[str, Any]) -> None:
    verdict = _grade(row["gold"], row["response"])
    assert verdict.outcome == row["want"], f"{row['why']}: {verdict.reason}, answer {verdict.answer!r}"


@pytest.mark.skipif(not SHARED.exists(), reason="math_cases.jsonl is not in ../shared/data (DATA=folder to say where)")
@pytest.mark.parametrize("row", _named(_rows(SHARED)))
def test_a_shared_case_gets_its_verdict(row: dict[str, Any]) -> None:
    verdict = _grade(row["gold"], row["pred"])
    assert verdict.outcome == ("right" if row["equal"] else "wrong"), f"{row['why']}: {verdict.reason}"


@pytest.mark.parametrize("row", _named([row for row in GOLDEN if row["category"] == "adversarial"]))
def test_the_case_after_a_hostile_one_is_graded_as_if_alone(row: dict[str, Any]) -> None:
    grade_math(row["gold"], row["response"])
    # New to the caches every time, and not decided before the symbolic tier.
    factor = GOLDEN.index(row) + 2
    after = _grade(rf"{factor}\cos 2x", rf"{factor}-{2 * factor}\sin^2 x")
    assert after.outcome == "right", after.reason


def test_the_golden_file_has_every_kind_and_no_case_twice() -> None:
    assert {row["kind"] for row in GOLDEN} == {"right", "wrong", "reworded", "truncated", "adversarial", "bad-gold"}
    pairs = [(row["gold"], row["response"]) for row in GOLDEN]
    assert len(pairs) == len(set(pairs)) >= 400
    assert all(row["why"] and row["want"] in ("right", "wrong", "unknown") for row in GOLDEN)


def test_a_verdict_names_its_reason_and_the_answer_it_read() -> None:
    right = grade_math("5", r"<think>4?</think>So \boxed{5}.")
    none = grade_math("5", r"So \boxed{5")
    assert right.answer == "5" and right.score == 1.0 and right.ms > 0 and right.reason
    assert none.answer is None and none.score == 0.0 and none.reason.startswith("no-answer")
    bad = grade_math(r"\frac{", "5")
    assert bad.score is None and bad.reason == "gold-unparsable"
