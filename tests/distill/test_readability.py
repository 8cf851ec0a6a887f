"""What is too hard to read, one complaint at a time."""

import dataclasses
import json
import random
from pathlib import Path

import pytest

from distill.readability import ReadabilityConfig, complaints
from runtime.errors import UserError

GSM8K = Path(__file__).parents[3] / "shared/data/gsm8k"
PLAIN = "<think>Three hens lay two eggs each, so there are six eggs in all.</think>\n\nSix eggs: \\boxed{6}"
_DRAW = random.Random(0)
MANY = " ".join("".join(_DRAW.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(450))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (PLAIN, []),
        ("No reasoning at all, only an answer: 6", []),
        (PLAIN[:40], ["unclosed think"]),
        (PLAIN.replace("</think>", ""), ["unclosed think"]),
        (PLAIN.replace("<think>", ""), ["unclosed think"]),
        (f"{PLAIN}<think>", ["unclosed think"]),
        (f"</think>{PLAIN[:40]}", ["unclosed think"]),
        ("<think>Hens lay eggs.</think> Six. <think>Ducks do too.</think> Eight.", ["unclosed think"]),
        (PLAIN.replace("Six eggs", "</think>"), ["unclosed think"]),
        (PLAIN.split("</think>")[0] + "</think> \n", ["no answer after the reasoning"]),
        ("  ", ["no answer after the reasoning"]),
        (PLAIN.replace("so there are", "所以一共有六个鸡蛋"), ["mixed languages"]),
        (PLAIN.replace("</think>", "\n```python\n6\n```</think>"), ["code in the reasoning"]),
        (PLAIN + "\n```python\n6\n```", []),
        (PLAIN.replace("</think>", " " + MANY + "</think>"), ["long paragraph"]),
        (PLAIN.replace("</think>", f"{MANY[:2000]}\n\n{MANY[2000:]}</think>"), []),
        (PLAIN + " " + MANY, []),
        (PLAIN.replace("</think>", "So it is six. " * 40 + "</think>"), ["repetition"]),
        ("<think>三只母鸡各下两个蛋</think>所以是六个", []),
        ("<think>鶏が三羽いて、それぞれ卵を二つ産みます</think>答えは六つです", []),
        (
            "<think>" + MANY + " 所以一共有六个鸡蛋" * 9 + "\n```",
            ["unclosed think", "mixed languages", "long paragraph", "code in the reasoning"],
        ),
    ],
)
def test_complaints(text: str, expected: list[str]) -> None:
    assert complaints(text, ReadabilityConfig()) == expected


def test_one_that_was_cut_off_is_one_complaint() -> None:
    assert complaints(PLAIN, ReadabilityConfig(), finished=False) == ["cut off"]


@pytest.mark.parametrize(
    ("setting", "value", "text"),
    [
        ("other_scripts", 1, PLAIN.replace("so there are", "所以一共有六个鸡蛋")),
        ("repetition", 1, PLAIN.replace("</think>", "So it is six. " * 40 + "</think>")),
        ("paragraph_words", 0, PLAIN.replace("</think>", " " + MANY + "</think>")),
        ("code_in_reasoning", True, PLAIN.replace("</think>", "\n```python\n6\n```</think>")),
    ],
)
def test_every_limit_can_be_lifted(setting: str, value: float, text: str) -> None:
    config = ReadabilityConfig()
    assert complaints(text, config)
    assert not complaints(text, dataclasses.replace(config, **{setting: value}))


def test_at_the_limit_is_within_it() -> None:
    half = "one word and another 所以一共有六"
    assert complaints(half, ReadabilityConfig(other_scripts=0.5)) == []


def test_a_limit_that_is_no_share_is_refused() -> None:
    with pytest.raises(UserError, match=r"readability\.repetition=30"):
        ReadabilityConfig(repetition=30)


@pytest.mark.skipif(not GSM8K.is_dir(), reason=f"needs GSM8K's files in {GSM8K}")
def test_gsm8ks_own_solutions_are_readable() -> None:
    solutions = [json.loads(line)["answer"] for line in (GSM8K / "test.jsonl").open()]
    refused = [found for text in solutions if (found := complaints(text, ReadabilityConfig()))]
    assert len(refused) <= 5, refused
