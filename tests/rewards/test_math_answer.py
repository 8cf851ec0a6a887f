r"""The reward function around the maths grader: boxes only, golds by column, conversations."""

import pytest

from rewards.math_answer import accuracy


def test_only_a_box_counts() -> None:
    completions = [r"<think>20+11</think>\boxed{31}", "<think></think>31", r"\boxed{32}", r"\boxed{\frac{62}{2}}"]
    assert accuracy(completions=completions, answer=["31"] * 4) == [1.0, 0.0, 0.0, 1.0]


def test_an_unusable_gold_is_none() -> None:
    assert accuracy(completions=[r"\boxed{1}"] * 3, answer=["", None, "1"]) == [None, None, 1.0]


def test_conversational_completions_are_graded_like_strings() -> None:
    talk = [
        [{"role": "assistant", "content": r"\boxed{1}"}],
        [{"role": "assistant", "content": r"\boxed{2}"}],
    ]
    assert accuracy(prompts=["a", "b"], completions=talk, answer=["1", "1"]) == [1.0, 0.0]


def test_a_missing_gold_names_the_column() -> None:
    with pytest.raises(ValueError, match="answer: 1 golds for 2 completions"):
        accuracy(prompts=["a", "b"], completions=["", ""], answer=["1"])
