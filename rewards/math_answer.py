r"""Completions and gold answers -> 1.0 (equal), 0.0 (wrong or no answer) or None (unusable gold).

The answer is in the last `\boxed{}` after the thinking: a bare number elsewhere is none, so that a model learns to
designate it. What is equal: rewards/maths/compare.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rewards.completions import text_of
from rewards.maths.grade import grade_math


def accuracy(
    prompts: Sequence[Any] | None = None,
    completions: Sequence[str | Sequence[Mapping[str, str]]] = (),
    answer: Sequence[Any] = (),
    **_: Any,
) -> list[float | None]:
    r"""Grade each completion against its gold `answer`; TRL's signature.

    A gold is a string (bare, GSM8K's `... #### 42`, or a solution with a `\boxed{}`) or a number. Returns
    1.0, 0.0, or None where the gold is empty or unusable. Raises ValueError if the lists differ in length.
    """
    if len(completions) != len(answer):
        raise ValueError(f"answer: {len(answer)} golds for {len(completions)} completions; give one for each")
    pairs = zip(completions, answer, strict=True)
    return [grade_math(gold, text_of(completion), boxed_only=True).score for completion, gold in pairs]
