r"""A completion, as a reward function receives it -> its text, its answer part, its `\boxed{}` contents.

Every scan is one pass over the text: a hostile completion of a megabyte costs milliseconds. Left out:
`\fbox`, `\boxed 5` without braces, and responses whose `<think>` was prefilled in the prompt.
"""

import re
from collections.abc import Iterator, Mapping, Sequence

OPEN, CLOSE = "<think>", "</think>"
_BOX = re.compile(r"\\boxed\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped character, so that \{ and \} don't count, or a brace


def text_of(completion: str | Sequence[Mapping[str, str]]) -> str:
    """Text of one completion: the string itself, or the content of the last assistant message.

    Raises ValueError for a conversation without an assistant message.
    """
    if isinstance(completion, str):
        return completion
    for message in reversed(completion):
        if message.get("role", "assistant") == "assistant":
            return message.get("content") or ""
    raise ValueError(f"completion={str(completion)[:100]!r}: it has no assistant message to read")


def after_thinking(text: str) -> str | None:
    """What follows the last `</think>`, or the text if it has no tags; None if a `<think>` never closes."""
    answer = text[text.rfind(CLOSE) + len(CLOSE) :] if CLOSE in text else text
    return None if OPEN in answer else answer


def boxes(text: str) -> Iterator[str | None]:
    r"""Contents of the outermost `\boxed{...}` in order; a last one that never closes yields None."""
    position = 0
    while box := _BOX.search(text, position):
        depth = 1
        for token in _BRACE.finditer(text, box.end()):
            depth += {"{": 1, "}": -1}.get(token[0], 0)
            if depth == 0:
                position = token.end()
                yield text[box.end() : token.start()]
                break
        else:
            yield None
            return


def last_boxed(text: str) -> str | None:
    """Content of the last box, stripped; None if there is no box, or the last is empty or never closes."""
    found = list(boxes(text))
    return (found[-1] or "").strip() or None if found else None
