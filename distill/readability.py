"""A response -> why nobody would want to read it, however right it is.

What DeepSeek-R1 filtered from its 800k samples: mixed languages, long paragraphs and code blocks in the reasoning
(arXiv 2501.12948, B.3.3), and repetition (B.3.2); and what can't be trained on at all: reasoning that never closes or
has no answer after it. Left out: whether the answer is right (verify.py).
"""

from dataclasses import dataclass

from rewards.completions import CLOSE, OPEN
from rewards.language import count_words
from rewards.repetition import repetition
from runtime.settings import require

CUT, UNCLOSED, NO_ANSWER = "cut off", "unclosed think", "no answer after the reasoning"
MIXED, LOOPS, PARAGRAPH, CODE = "mixed languages", "repetition", "long paragraph", "code in the reasoning"


@dataclass(frozen=True, kw_only=True)
class ReadabilityConfig:
    """What is too hard to read. R1's limits are not published."""

    other_scripts: float = 0.05
    """Most of a response's words in another script than most of its words; 1: any mixture passes."""
    repetition: float = 0.3
    """Most repetition (rewards/repetition.py), from 0, none, to 1; 1: any passes."""
    paragraph_words: int = 400
    """Most words of a paragraph of the reasoning; 0: no limit."""
    code_in_reasoning: bool = False
    """Let fenced code pass in the reasoning; in the answer it always does."""

    def __post_init__(self) -> None:
        for name in ("other_scripts", "repetition"):
            require(0 <= getattr(self, name) <= 1, f"readability.{name}={getattr(self, name)}: give a share, 0 to 1")
        require(self.paragraph_words >= 0, f"readability.paragraph_words={self.paragraph_words}: use 0 for no limit")


def complaints(text: str, config: ReadabilityConfig, *, finished: bool = True) -> list[str]:
    """Everything that is wrong with a response, each in words from a small set, in a fixed order.

    finished: whether it ended by itself. A response need not reason: without the tags, all of it is the answer.
    """
    found = []
    if not finished:
        found.append(CUT)
    before, closed, answer = text.rpartition(CLOSE)
    reasoning = before if closed else (text if OPEN in text else "")
    if text.count(OPEN) != text.count(CLOSE) or text.count(OPEN) > 1 or OPEN in answer:
        found.append(UNCLOSED)
    elif not answer.strip():
        found.append(NO_ANSWER)
    words = count_words(text.replace(OPEN, " ").replace(CLOSE, " "))
    # Japanese is written in two scripts at once, and a text in Han alone is none of it.
    if words["kana"]:
        words["kana"] += words.pop("han")
    if (total := sum(words.values())) and 1 - max(words.values()) / total > config.other_scripts:
        found.append(MIXED)
    if repetition(text) > config.repetition:
        found.append(LOOPS)
    if config.paragraph_words and any(
        sum(count_words(paragraph).values()) > config.paragraph_words for paragraph in reasoning.split("\n\n")
    ):
        found.append(PARAGRAPH)
    if not config.code_in_reasoning and "```" in reasoning:
        found.append(CODE)
    return found
