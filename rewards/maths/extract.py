r"""A response -> its one designated answer, or why it has none.

In order: the last `<answer>`, the last `\boxed{}`, what follows the last `####`, the response itself if it is short
enough to be a bare answer. Only what follows the thinking counts. Several boxes are one answer if nothing but "and",
"or" and commas stands between them; else the last one decides. One that never closes is no answer.
"""

import re
from typing import NamedTuple

from rewards.completions import after_thinking
from rewards.maths.answer import MAX_CHARS, read

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])\s*(?:\{|(?=([0-9]+|[A-Za-z])))")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_JOINER = re.compile(
    r"(?:[\s,;$]|[A-Za-z](?:_\{?\w\}?)?\s*=|\\[,;! ]|\\q?quad|\\text\s*\{|\}|(?:and|or)(?![A-Za-z])|&)*"
)
_ANSWER_OPEN, _ANSWER_CLOSE = "<answer>", "</answer>"
_SENTENCE = re.compile(r"answer\s*(?:is|:|=)+\s*:?\s*(.+?)\s*$", re.IGNORECASE | re.DOTALL)
_MINERVA = re.compile(r"final answer is:?\s*(.+?)\.?\s*I hope it is correct\.?\s*$", re.IGNORECASE | re.DOTALL)
MAX_BARE = 300
"""Characters a response without a box may have to be taken as the answer itself."""


class Extracted(NamedTuple):
    """The answer found, or the reason why there is none."""

    answer: str | None
    reason: str


def extract(response: str, *, boxed_only: bool = False) -> Extracted:
    """The designated answer. `boxed_only`: nothing but a box counts."""
    text = after_thinking(response)
    if text is None:
        return Extracted(None, "no-answer/thinking")
    if not boxed_only and (_ANSWER_OPEN in text or _ANSWER_CLOSE in text):
        start, end = text.rfind(_ANSWER_OPEN), text.rfind(_ANSWER_CLOSE)
        if start < 0 or end < start:
            return Extracted(None, "no-answer/unterminated")
        text = text[start + len(_ANSWER_OPEN) : end]
        if _BOX.search(text) is None:
            return _bounded(text)
    found = boxes(text)
    if found:
        return joined(text, found)
    if boxed_only:
        return Extracted(None, "no-answer/no-box")
    if "####" in text:
        return _bounded(text[text.rfind("####") + 4 :].strip().partition("\n")[0])
    return _bare(text)


def boxes(text: str) -> list[tuple[int, int, str | None]]:
    """Outermost boxes as (start, end, content); a last one that never closes has content None."""
    found: list[tuple[int, int, str | None]] = []
    position = 0
    while box := _BOX.search(text, position):
        if box[1]:  # \boxed 5
            position = box.end() + len(box[1])
            found.append((box.start(), position, box[1]))
            continue
        depth = 1
        for brace in _BRACE.finditer(text, box.end()):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0:
                position = brace.end()
                found.append((box.start(), position, text[box.end() : brace.start()]))
                break
        else:
            return [*found, (box.start(), len(text), None)]
    return found


def joined(text: str, found: list[tuple[int, int, str | None]]) -> Extracted:
    """The content of the last box, and of those before it that are one answer with it."""
    content = found[-1][2]
    if content is None or not content.strip():
        return Extracted(None, f"no-answer/{'unterminated' if content is None else 'empty'}")
    parts, separator = [content], ","
    for (_, end, before), (start, _, _) in zip(found[-2::-1], found[:0:-1], strict=False):
        gap = text[end:start]
        if before is None or not _JOINER.fullmatch(gap):
            break
        parts.insert(0, before)
        separator = r" \text{ or } " if re.search(r"\bor\b", gap) else separator
    if len(parts) > 1 and len({read(part[:MAX_CHARS]).spelling for part in parts}) > 1:
        content = separator.join(parts)
    return _bounded(content)


def _bare(text: str) -> Extracted:
    text = text.strip()
    if match := _MINERVA.search(text[-MAX_BARE:]):
        return _bounded(match[1])
    if len(text) > MAX_BARE and (match := _SENTENCE.search(text[-MAX_BARE:])):
        text = match[1]
    elif "\n" in text and (match := _SENTENCE.search(text)):
        text = match[1]
    return _bounded(text)


def _bounded(answer: str) -> Extracted:
    answer = answer.strip()
    if not answer:
        return Extracted(None, "no-answer/empty")
    if len(answer) > MAX_CHARS:
        return Extracted(None, "no-answer/too-long")
    return Extracted(answer, "")
