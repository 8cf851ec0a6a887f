"""Layouts of tags: the golden cases, options, prompts that open the reasoning, and texts made to be slow."""

import itertools
import re
import time

import pytest

from rewards.check import GOLDEN, golden_suite, grader_of
from rewards.tag_format import format_reward, has_layout, think_answer_format

R1 = "<think>a</think><answer>31</answer>"
BOXED = r"<think>a</think>\boxed{31}"


@pytest.mark.parametrize(("name", "function"), [("format", "format_reward"), ("think_answer", "think_answer_format")])
def test_golden_cases(name: str, function: str) -> None:
    suite = golden_suite(GOLDEN / f"{name}.jsonl", grader_of(f"rewards.tag_format.{function}"), budget_ms=1000)
    assert suite.misses == []


def test_every_string_of_few_tags_matches_only_as_a_regular_expression_does() -> None:
    # All 9331 sequences of up to five of these pieces, against each layout as one full-match expression.
    pieces = ["<think>", "</think>", "<answer>", "</answer>", "x", " "]
    plain = re.compile(r"\s*<think>((?!</?think>).)*</think>(?!\s*$)((?!</?think>).)*", re.DOTALL)
    tagged = re.compile(r"\s*<think>[x ]*x[x ]*</think>\s*<answer>[x ]*x[x ]*</answer>\s*")
    texts = ["".join(some) for length in range(6) for some in itertools.product(pieces, repeat=length)]
    texts += [f"<think>{a}</think>{b}<answer>{c}</answer>{d}" for a, b, c, d in itertools.product(pieces, repeat=4)]
    assert [t for t in texts if has_layout(t, boxed=False) != bool(plain.fullmatch(t))] == []
    assert [t for t in texts if has_layout(t, answer_tags=True, boxed=False) != bool(tagged.fullmatch(t))] == []


def test_an_opened_response_is_the_rest_of_an_unopened_one() -> None:
    for text in (R1, BOXED, "<think></think>", "<think>a", "<think>a</think><think>", "<think>a</think>b</think>"):
        for tags, boxed in itertools.product([False, True], repeat=2):
            rest = text.removeprefix("<think>")
            assert has_layout(text, answer_tags=tags, boxed=boxed) == has_layout(
                rest, answer_tags=tags, boxed=boxed, opened=True
            )
            assert not has_layout(text, answer_tags=tags, boxed=boxed, opened=True)


def test_a_box_is_asked_for_or_not() -> None:
    no_box = "<think>a</think>31"
    assert format_reward([no_box, BOXED], boxed=False) == [1.0, 1.0]
    assert format_reward([no_box, BOXED, "<think>a</think> "]) == [0.0, 1.0, 0.0]
    boxed = r"<think>a</think><answer>\boxed{31}</answer>"
    assert think_answer_format([R1, boxed], boxed=True) == [0.0, 1.0]
    assert think_answer_format([R1, boxed]) == [1.0, 1.0]
    assert format_reward(["<think>a</think> "], boxed=False) == [0.0]


def test_the_prompt_or_the_option_opens_the_reasoning() -> None:
    texts = [BOXED.removeprefix("<think>")] * 5
    user, assistant = {"role": "user", "content": "<think>"}, {"role": "assistant", "content": "So <think>\n"}
    prompts = ["Q <think>\n", "Q", [user], [user, assistant], []]
    assert format_reward(texts, prompts) == [1.0, 0.0, 0.0, 1.0, 0.0]
    assert format_reward(texts, prompts, opened=True) == [1.0] * 5
    assert think_answer_format([R1.removeprefix("<think>")] * 5, prompts) == [1.0, 0.0, 0.0, 1.0, 0.0]
    assert think_answer_format([R1.removeprefix("<think>")], opened=True) == [1.0]


def test_strings_and_conversations_score_the_same() -> None:
    texts = [BOXED, R1, "", "<think>a</think>"]
    talk = [[{"role": "assistant", "content": text}] for text in texts]
    assert format_reward(completions=texts, prompts=texts) == format_reward(completions=talk) == [1.0, 0.0, 0.0, 0.0]
    assert think_answer_format(completions=talk) == [0.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "text",
    [
        "<think>" * 150_000,
        "<think></think>" + r"\boxed{" * 150_000,
        "<" * 1_000_000,
        " " * 1_000_000,
        "<think>" + "<answer>" * 125_000,
        "<think>a</think>" + " " * 1_000_000 + "<answer>",
        "<think>a</think><answer>" + r"\boxed{" * 150_000 + "</answer>",
    ],
    ids=range(7),
)
def test_a_megabyte_of_tags_is_read_once(text: str) -> None:
    start = time.process_time()
    assert not has_layout(text)
    assert not has_layout(text, answer_tags=True, boxed=True)
    assert time.process_time() - start < 10  # read again from every tag, minutes
