"""A seed and an index in, a three-event card story out: the demonstration task that needs no download.

"Ana has 20 cards. Ana gives 3 to Raj. Raj gives Ana 5. Ana finds 9 more. How many cards does Ana have?" A
story comes with two right demonstrations: `worked` shows the running total, `direct` jumps to the answer. A
small model that imitates both is usually wrong when it jumps, so reinforcement on right answers teaches it to
work.

Every story is a pure function of (seed, index), and whether a question is held out is a function of its text
alone: no seed can leak a held-out question into training. No distractors and no names beyond the lists here,
so that a tokenizer of 512 tokens covers the task.
"""

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

NAMES = (
    "Ana", "Raj", "Mia", "Leo", "Zoe", "Sam", "Ivy", "Max",
    "Eva", "Tom", "Lin", "Kai", "Amy", "Ben", "Uma", "Dan",
)  # fmt: skip
THINGS = ("cards", "coins", "books", "shells", "stamps", "apples", "pens", "stones", "beads", "cups")
GAINS = ("{other} gives {name} {k}.", "{name} finds {k} more.", "{name} buys {k} more.")
LOSSES = ("{name} gives {k} to {other}.", "{name} loses {k}.", "{name} sells {k}.")

EVENTS = 3
START = range(4, 21)
CHANGES = tuple(k for k in range(-9, 10) if abs(k) >= 2)
TOTALS = range(2, 31)
"""Where the running total stays: with totals to 45 a 0.9M-parameter model no longer learns to work them
out."""

HELD_OUT_ONE_IN = 10


@dataclass(frozen=True, kw_only=True)
class Story:
    """One question with its answer and both demonstrations."""

    question: str
    answer: str
    worked: str
    """`<think>20-3=17\\n17+5=22\\n22+9=31</think>\\boxed{31}`"""
    direct: str
    """`<think></think>\\boxed{31}`"""

    @property
    def held_out(self) -> bool:
        """Whether the question belongs to the held-out tenth; decided by a hash of its text."""
        return int.from_bytes(hashlib.sha256(self.question.encode()).digest()) % HELD_OUT_ONE_IN == 0

    def row(self) -> dict[str, Any]:
        """The story as a row of data: conversational `prompt`, `answer`, and both demonstrations."""
        prompt = [{"role": "user", "content": self.question}]
        return {"prompt": prompt, "answer": self.answer, "worked": self.worked, "direct": self.direct}


def story(seed: int, index: int) -> Story:
    """Return story `index` of the endless sequence `seed`; the same on every machine and library version."""
    # One hash holds 256 random bits; each choice takes the next digit of it, in the base it needs. A story
    # uses about 45 bits, so the bias of the last digits is below 2^-200.
    bits = int.from_bytes(hashlib.sha256(f"story {seed} {index}".encode()).digest())

    def draw(n: int) -> int:
        nonlocal bits
        bits, digit = divmod(bits, n)
        return digit

    name = NAMES[draw(len(NAMES))]
    other = [n for n in NAMES if n != name][draw(len(NAMES) - 1)]
    thing = THINGS[draw(len(THINGS))]
    total = START[draw(len(START))]
    sentences = [f"{name} has {total} {thing}."]
    lines = []
    for _ in range(EVENTS):
        allowed = [k for k in CHANGES if total + k in TOTALS]
        change = allowed[draw(len(allowed))]
        phrase = (GAINS if change > 0 else LOSSES)[draw(3)]
        sentences.append(phrase.format(name=name, other=other, k=abs(change)))
        lines.append(f"{total}{change:+d}={total + change}")
        total += change
    sentences.append(f"How many {thing} does {name} have?")
    boxed = f"\\boxed{{{total}}}"
    return Story(
        question=" ".join(sentences),
        answer=str(total),
        worked="<think>" + "\n".join(lines) + "</think>" + boxed,
        direct="<think></think>" + boxed,
    )


def stories(n: int, *, split: Literal["train", "heldout"], seed: int) -> list[dict[str, Any]]:
    """Return the first `n` distinct questions of a split, as rows, in the order of the sequence `seed`.

    Train and held-out questions are disjoint for every pair of seeds. Asking for more rows only appends.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"split={split!r}: use 'train' or 'heldout'")
    rows: dict[str, dict[str, Any]] = {}
    index = 0
    while len(rows) < n:
        candidate = story(seed, index)
        index += 1
        if candidate.held_out == (split == "heldout"):
            rows.setdefault(candidate.question, candidate.row())
    return list(rows.values())
