r"""Completions -> 1.0 where the response is laid out as asked, else 0.0: one strict state machine for every layout.

The layouts are `<think>...</think>` then an answer in `\boxed{}` (`format_reward`), and R1's
`<think>...</think><answer>...</answer>` (`think_answer_format`). The whole response must match: text before, between
or after the tags, a tag twice, nested, out of order or not closed scores 0. Where the prompt ends in `<think>`, the
response goes on inside it. Left out: whether the answer is right (rewards/math_answer.py), and a `<think>` that a
chat template adds behind a prompt of messages, which no reward sees: the option `opened` is for that.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rewards.completions import CLOSE, OPEN, boxes, text_of

ANSWER, ANSWERED = "<answer>", "</answer>"
_THINK_TAG = re.compile("</?think>")
_ANY_TAG = re.compile("</?(?:think|answer)>")


def format_reward(
    completions: Sequence[str | Sequence[Mapping[str, str]]],
    prompts: Sequence[Any] | None = None,
    *,
    boxed: bool = True,
    opened: bool = False,
    **_: Any,
) -> list[float | None]:
    r"""Score the layout `<think>...</think>` and an answer, 1.0 or 0.0; TRL's signature, special tokens stripped.

    boxed: the answer must hold a complete, non-empty `\boxed{...}`; else any text will do.
    opened: every response goes on inside a `<think>` that the chat template added.
    differs: the R1 layout wants non-empty reasoning; here `<think></think>` is allowed, so that a model may
    also answer directly.
    """
    return [
        float(has_layout(text_of(completion), boxed=boxed, opened=opened or inside))
        for completion, inside in zip(completions, _opened(prompts, len(completions)), strict=True)
    ]


def think_answer_format(
    completions: Sequence[str | Sequence[Mapping[str, str]]],
    prompts: Sequence[Any] | None = None,
    *,
    boxed: bool = False,
    opened: bool = False,
    **_: Any,
) -> list[float | None]:
    """Score R1's layout (arXiv 2501.12948, table 1), 1.0 or 0.0: reasoning and answer must both say something.

    Only whitespace may stand around the two pairs of tags. The options are those of `format_reward`.
    """
    return [
        float(has_layout(text_of(completion), answer_tags=True, boxed=boxed, opened=opened or inside))
        for completion, inside in zip(completions, _opened(prompts, len(completions)), strict=True)
    ]


def has_layout(text: str, *, answer_tags: bool = False, boxed: bool = True, opened: bool = False) -> bool:
    """Whether one whole response has the layout.

    answer_tags: the answer, and the reasoning, stand in tags and say something. Without, `<answer>` is plain text.
    """
    expected = [*([] if opened else [OPEN]), CLOSE, *([ANSWER, ANSWERED] if answer_tags else [])]
    sections = [""] if opened else []  # what stands before each tag, and after the last
    position = found = 0
    for tag in (_ANY_TAG if answer_tags else _THINK_TAG).finditer(text):
        if found == len(expected) or tag[0] != expected[found]:
            return False
        sections.append(text[position : tag.start()])
        position, found = tag.end(), found + 1
    if found < len(expected):
        return False
    sections.append(text[position:])
    if answer_tags:
        before, reasoning, between, answer, after = sections
        if not reasoning.strip() or (between + after).strip():
            return False
    else:
        before, _, answer = sections
    if before.strip():
        return False
    return any(box is not None and box.strip() for box in boxes(answer)) if boxed else bool(answer.strip())


def _opened(prompts: Sequence[Any] | None, count: int) -> list[bool]:
    """For each prompt, whether it ends in `<think>`: as text, or in an assistant's message to be continued."""
    return [False] * count if prompts is None else [_ends_in_think(prompt) for prompt in prompts]


def _ends_in_think(prompt: Any) -> bool:
    if isinstance(prompt, str):
        return prompt.rstrip().endswith(OPEN)
    last = prompt[-1] if prompt else {}
    content = last.get("content")
    return last.get("role") == "assistant" and isinstance(content, str) and content.rstrip().endswith(OPEN)
