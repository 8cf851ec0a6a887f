"""What a grader found: right, wrong or unknown, and why."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

Outcome = Literal["right", "wrong", "unknown"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One graded response."""

    outcome: Outcome
    """Unknown means that nobody can say: bad gold, a fault of the grader, a sandbox that is out. Never a 0."""
    reason: str
    """Short and machine-readable: `equal/rational`, `no-answer`, `gold-unparsable`, `time-limit`, ..."""
    answer: str | None = None
    """What was taken for the answer; None if nothing was."""
    ms: float = 0.0
    """Milliseconds it took."""
    passed: int | None = None
    """Tests passed, of code."""
    total: int | None = None
    """Tests there are, of code."""

    @property
    def score(self) -> float | None:
        """1.0, 0.0, or None for unknown: what a reward function returns."""
        return {"right": 1.0, "wrong": 0.0, "unknown": None}[self.outcome]

    def as_json(self) -> dict[str, Any]:
        """Its fields for `json.dumps`, without those that are None; `answer` always."""
        fields = {**asdict(self), "ms": round(self.ms, 3)}
        return {name: value for name, value in fields.items() if value is not None or name == "answer"}
