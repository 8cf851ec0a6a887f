"""Every GSM8K gold equals itself however it is written, and nothing near it."""

import json
import os
from pathlib import Path

import pytest

from rewards import grade_math

GSM8K = Path(os.environ.get("DATA", Path(__file__).parents[4] / "shared/data")) / "gsm8k"

REWRITTEN = [
    r"\boxed{@}",
    r"<think>Is it 7919? No.</think>She makes \boxed{@} in all.",
    r"**Answer:** $\boxed{@}$",
    r"<answer>@</answer>",
    "$@$",
    "**@**",
    "+@",
    "@.",
    r"\$@",
    r"@ \text{ dollars}",
    "@ apples",
    r"\boxed{@\text{ miles}}",
    r"x = @",
    r"\frac{@}{1}",
    r"2 \cdot @ - @",
]
"""`@` stands for the number."""


@pytest.fixture(scope="module")
def solutions() -> list[str]:
    paths = [GSM8K / "train.jsonl", GSM8K / "test.jsonl"]
    if not all(path.exists() for path in paths):
        pytest.skip("GSM8K is not in ../shared/data/gsm8k (DATA=folder to say where the data are)")
    return [json.loads(line)["answer"] for path in paths for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def numbers(solutions: list[str]) -> list[int]:
    """The distinct final numbers; all are integers."""
    return sorted({int(solution.rpartition("####")[2].replace(",", "")) for solution in solutions})


def test_every_solution_is_a_gold_and_its_own_number_is_right(solutions: list[str]) -> None:
    finals = [solution.rpartition("####")[2].strip() for solution in solutions]
    assert len(solutions) == 8792
    missed = [
        final
        for solution, final in zip(solutions, finals, strict=True)
        if grade_math(solution, rf"So it is \boxed{{{final}}}.").outcome != "right"
        or grade_math(final, final).outcome != "right"
    ]
    assert not missed


def test_every_number_rewritten_is_right(numbers: list[int]) -> None:
    missed = []
    for number in numbers:
        texts = [
            text.replace("@", str(number)) for text in REWRITTEN if number >= 0 or not text.startswith(("+", r"\$"))
        ]
        texts += [f"{number:,}", f"{number:,}".replace(",", "{,}"), f"{number:,}".replace(",", r"\,")]
        texts += [f"{number}.00", f"{2 * number}/2", str(number).replace("-", "−")]
        texts.append(str(number).translate({0x30 + digit: 0xFF10 + digit for digit in range(10)}))
        missed += [(number, text) for text in texts if grade_math(str(number), text).outcome != "right"]
    assert not missed


def test_every_number_differs_from_its_neighbours_its_tenfold_and_its_opposite(numbers: list[int]) -> None:
    missed = []
    for number in numbers:
        for other in {number + 1, number - 1, 10 * number, -number} - {number}:
            texts = (str(other), f"{other:,}", rf"So it is \boxed{{{other}}}.")
            missed += [(number, text) for text in texts if grade_math(str(number), text).outcome != "wrong"]
    assert not missed
