"""What passes between the stages: a problem, an answer somebody gave to it, and what becomes of the answer."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from rewards.verdict import Outcome

Message: TypeAlias = dict[str, str]
"""role and content."""
Kind: TypeAlias = Literal["original", "reasoning"]
"""DeepSeek-V3's two samples of a problem (arXiv 2412.19437, 5.1): <problem, original response>, and <system prompt,
problem, R1 response>."""
Key: TypeAlias = tuple[int, Kind, int]
"""An answer: its problem's position, its kind, its index."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One problem of a source."""

    id: str
    """The row's own, or a hash of its prompt."""
    position: int
    """Its number among the usable rows of its run, from 0."""
    domain: str
    """Who answers and who grades it."""
    prompt: list[Message]
    """Up to where the assistant speaks."""
    answer: str = ""
    """The gold answer; "" where there is none."""
    response: str | None = None
    """The answer that came with it: the original response."""
    columns: dict[str, Any] = field(default_factory=dict)
    """The rest of its row, for graders: the tests of a programming problem, for instance."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One answer to a problem."""

    problem: int
    """Its position."""
    kind: Kind
    index: int
    """0 .. n−1 among the problem's answers of this kind."""
    text: str
    tokens: int
    """Of its teacher; words, where nobody here knows the teacher's tokens."""
    finish_reason: Literal["stop", "length", "error"]
    """"error": the teacher gave none, for the reason in `error`."""
    seed: int
    teacher: str
    """Its id in the ledger."""
    error: str = ""

    @property
    def key(self) -> Key:
        """What it is an answer to, and which."""
        return self.problem, self.kind, self.index


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """Who answered, as far as it can be known."""

    id: str
    """A hash of all that decides its answers, with the weights where they are known; "source": came with the data."""
    model: str
    weights_hash: str | None
    """Of the tensors it answered with, by checkpoint name; None: nobody here has seen them."""
    settings: dict[str, Any]
    """Sampling parameters and system prompt."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What there is to say about an answer."""

    outcome: Outcome
    reason: str
    """Short and machine-readable (rewards/verdict.py); "not-graded": that is left to people."""
    answer: str | None
    """What was taken for the answer."""
    complaints: Sequence[str] = ()
    """Why it is hard to read."""
    score: float | None = None
    """A reward model's."""
    detail: str = ""
    """For people: what failed."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Whether an answer is learnt from."""

    kept: bool
    reason: str
    """From a small set, so that it can be counted."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What a person said about an answer."""

    accepted: bool
    reviewer: str
    text: str | None = None
    """The answer as the reviewer wants it; None: as it was."""


def row_name(problem: str, kind: str, index: int) -> str:
    """What people and shards call an answer."""
    return f"{problem}/{kind}/{index}"
