r"""Golden cases for the `<think>...</think>` + `\boxed{}` layout."""

import time

import pytest

from rewards.tag_format import format_reward, has_layout

GOOD = {
    "worked": "<think>20+11\n=31</think>\\boxed{31}",
    "direct": r"<think></think>\boxed{31}",
    "prose around the box": "<think>a</think>\nThe answer is $\\boxed{31}$.\n",
    "leading whitespace": "\n<think>a</think>\\boxed{31}",
    "nested braces": r"<think>a</think>\boxed{\frac{1}{2}}",
    "box in the thinking too": r"<think>\boxed{1}</think>\boxed{31}",
    "two boxes": r"<think>a</think>\boxed{30} \boxed{31}",
    "one of two boxes complete": r"<think>a</think>\boxed{31} \boxed{",
}
BAD = {
    "empty": "",
    "no tags": r"\boxed{31}",
    "text before": r"So <think>a</think>\boxed{31}",
    "never closed": r"<think>a\boxed{31}",
    "never opened": r"a</think>\boxed{31}",
    "wrong order": r"</think><think>\boxed{31}",
    "two pairs": r"<think>a</think><think>b</think>\boxed{31}",
    "nested pair": r"<think><think>a</think></think>\boxed{31}",
    "closed twice": r"<think>a</think>\boxed{31}</think>",
    "opened again at the end": r"<think>a</think>\boxed{31}<think>",
    "no box": "<think>a</think>31",
    "box only in the thinking": r"<think>\boxed{31}</think>31",
    "empty box": r"<think>a</think>\boxed{ }",
    "truncated box": r"<think>a</think>\boxed{31",
    "upper case": r"<THINK>a</THINK>\boxed{31}",
}


@pytest.mark.parametrize("text", GOOD.values(), ids=GOOD.keys())
def test_layout_is_accepted(text: str) -> None:
    assert has_layout(text)


@pytest.mark.parametrize("text", BAD.values(), ids=BAD.keys())
def test_any_other_layout_is_refused(text: str) -> None:
    assert not has_layout(text)


def test_strings_and_conversations_score_the_same() -> None:
    texts = [*GOOD.values(), *BAD.values()]
    talk = [[{"role": "assistant", "content": text}] for text in texts]
    assert format_reward(completions=texts, prompts=texts) == format_reward(completions=talk)
    assert format_reward(completions=texts) == [1.0] * len(GOOD) + [0.0] * len(BAD)


@pytest.mark.parametrize("text", ["<think>" * 150_000, "<think></think>" + r"\boxed{" * 150_000, "<" * 1_000_000])
def test_a_megabyte_of_tags_costs_under_half_a_second(text: str) -> None:
    start = time.perf_counter()
    assert not has_layout(text)
    assert time.perf_counter() - start < 0.5
