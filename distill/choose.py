"""A problem's answers, graded and read -> which of them are kept to learn from. Rejection sampling's last step.

Only right and readable ones are ever taken. Left out: what right is (verify.py) and what readable is (readability.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from distill.duplicates import ngrams, words
from rewards.verdict import Outcome

Policy: TypeAlias = Literal["shortest", "diverse", "first", "best"]


@dataclass(frozen=True, kw_only=True)
class Graded:
    """What is known of an answer when the choice is made."""

    index: int
    """Its number among the problem's answers of its kind."""
    text: str
    tokens: int
    outcome: Outcome
    complaints: Sequence[str] = ()
    """Why it is hard to read."""
    score: float | None = None
    """A reward model's, for "best"."""


def choose(answers: Sequence[Graded], policy: Policy, *, keep: int) -> list[int]:
    """Indices of at most `keep` answers to keep, in ascending order; ties go to the smaller index.

    "shortest": of the fewest tokens. "diverse": the shortest, then again and again the one that shares least with
    those taken. "first": as they were sampled, an unbiased draw. "best": of the highest score; those without one last.
    An answer is never taken twice.
    """
    left = [a for a in answers if a.outcome == "right" and not a.complaints]
    taken: list[Graded] = []
    shingles = {a.index: frozenset(ngrams(words(a.text), 3)) for a in left}

    def rank(answer: Graded) -> tuple[float, ...]:
        if policy == "shortest" or (policy == "diverse" and not taken):
            return answer.tokens, answer.index
        if policy == "diverse":
            return max(_likeness(shingles[answer.index], shingles[t.index]) for t in taken), answer.tokens, answer.index
        if policy == "best":
            return (1, 0.0, answer.index) if answer.score is None else (0, -answer.score, answer.index)
        return (answer.index,)

    while left and len(taken) < keep:
        best = min(left, key=rank)
        taken.append(best)
        left = [a for a in left if a.text.strip() != best.text.strip()]
    return sorted(answer.index for answer in taken)


def _likeness(a: frozenset[str], b: frozenset[str]) -> float:
    return len(a & b) / len(a | b)
