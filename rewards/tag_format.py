r"""Completions -> 1.0 where the response is `<think>...</think>` then an answer in `\boxed{}`, else 0.0.

The whole response must match, read in one pass: a good prefix followed by a second pair of tags scores 0.
Left out: responses whose `<think>` was prefilled in the prompt, and whether the answer is right
(rewards/math_answer.py).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rewards.completions import CLOSE, OPEN, boxes, text_of


def format_reward(completions: Sequence[str | Sequence[Mapping[str, str]]], **_: Any) -> list[float | None]:
    r"""Score the layout of each completion, 1.0 or 0.0; TRL's signature, special tokens already stripped.

    Exactly one `<think>` (first, after optional whitespace) and one `</think>`, then text with at least one
    complete, non-empty `\boxed{...}`.
    differs: the R1 layout wants non-empty reasoning; here `<think></think>` is allowed, so that a model may
    also answer directly.
    """
    return [float(has_layout(text_of(completion))) for completion in completions]


def has_layout(text: str) -> bool:
    """Whether one response is `<think>...</think>` followed by text with a complete, non-empty box."""
    text = text.lstrip()
    if not text.startswith(OPEN) or text.count(OPEN) != 1 or text.count(CLOSE) != 1:
        return False
    answer = text[text.find(CLOSE) + len(CLOSE) :]
    return any(box is not None and box.strip() for box in boxes(answer))
