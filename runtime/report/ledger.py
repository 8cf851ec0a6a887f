"""A distillation's ledger.sqlite -> counts, pass rates, and answers for people, of each kind of verdict.

Only read, also while the run goes on. Its tables are distill/ledger.py's; another format is a note.
"""

import contextlib
import json
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from runtime.report.read import Run, brief, cut, is_number
from runtime.report.rollouts import LONGEST_TEXT, Browser, spread

T = TypeVar("T")

LEDGER, FORMAT = "ledger.sqlite", 1
MOST_PROBLEMS = 60
"""Problems whose answers are all shown."""
MOST_RARE = 60
"""Answers of each verdict besides."""
MOST_BYTES = 2_500_000
MOST_REASONS = 30
COLUMNS = (*("domain", "kind", "problems", "answers", "right", "wrong", "unknown", "kept", "tokens"),)
"""Of the table of what became of the answers."""

TABLE = """
SELECT p.domain, s.kind, count(DISTINCT s.problem), count(*), sum(f.outcome = 'right'), sum(f.outcome = 'wrong'),
    sum(f.outcome = 'unknown'), sum(c.kept), sum(CASE WHEN c.kept THEN s.tokens END)
FROM samples s JOIN problems p ON p.position = s.problem LEFT JOIN findings f USING (problem, kind, number)
LEFT JOIN choices c USING (problem, kind, number) GROUP BY p.domain, s.kind ORDER BY p.domain, s.kind LIMIT 200"""
VERDICTS = """
SELECT outcome || ': ' || reason, count(*) FROM findings GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT ?"""
CHOICES = "SELECT reason, count(*) FROM choices GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT ?"
ASIDE = "SELECT reason, count(*) FROM aside GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT ?"
SAMPLED = """
SELECT count(*), sum(f.outcome = 'right'), sum(f.outcome = 'unknown') FROM samples s
JOIN findings f USING (problem, kind, number) WHERE s.teacher <> 'source'"""
# As distill/shards.py has it: of the reasoning answers where there are any, without the unknown ones. The other
# columns are those of the row with the maximum.
RATES = """
SELECT max(kind), right, known FROM (
    SELECT s.problem, s.kind, sum(f.outcome = 'right') AS right, sum(f.outcome <> 'unknown') AS known
    FROM samples s JOIN findings f USING (problem, kind, number) WHERE s.teacher <> 'source' GROUP BY s.problem, s.kind
) GROUP BY problem"""
ANSWER = """
SELECT p.position, p.id, p.domain, p.prompt, p.answer, s.kind, s.number, s.text, s.tokens, s.finish_reason, s.teacher,
    s.error, f.outcome, f.reason, f.complaints, c.kept, c.reason
FROM samples s JOIN problems p ON p.position = s.problem LEFT JOIN findings f USING (problem, kind, number)
LEFT JOIN choices c USING (problem, kind, number)"""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What became of the answers."""

    table: Sequence[Sequence[Any]]
    """Rows of COLUMNS."""
    verdicts: Sequence[tuple[str, int]]
    choices: Sequence[tuple[str, int]]
    aside: Sequence[tuple[str, int]]
    sampled: int
    """Answers that a teacher gave here and somebody graded."""
    right: int
    unknown: int
    pass_rates: list[float] = field(default_factory=list)


def read_answers(run: Run) -> Answers | None:
    """The counts; None without a ledger, or one that can't be read, of which there is a note."""
    return _ask(run, _answers)


def _answers(db: sqlite3.Connection) -> Answers:
    verdicts, choices, aside = (
        [(brief(reason, 120), n) for reason, n in db.execute(query, (MOST_REASONS,))]
        for query in (VERDICTS, CHOICES, ASIDE)
    )
    sampled, right, unknown = (n or 0 for n in db.execute(SAMPLED).fetchone())
    return Answers(
        table=[[brief(v, 60) if isinstance(v, str) else v or 0 for v in row] for row in db.execute(TABLE)],
        verdicts=verdicts,
        choices=choices,
        aside=aside,
        sampled=sampled,
        right=right,
        unknown=unknown,
        pass_rates=[right / known for _, right, known in db.execute(RATES) if known],
    )


def browse_answers(run: Run) -> Browser | None:
    """All answers to some problems, spread evenly, and besides some that are unknown or hard to read."""
    return _ask(run, _browse)


def _browse(db: sqlite3.Connection) -> Browser:
    (total,) = db.execute("SELECT count(*) FROM samples").fetchone()
    positions = [position for (position,) in db.execute("SELECT DISTINCT problem FROM samples ORDER BY problem")]
    chosen = json.dumps(spread(positions, MOST_PROBLEMS))
    queries: list[tuple[str, tuple[Any, ...]]] = [
        ("WHERE f.outcome IS NULL OR f.outcome = 'unknown' LIMIT ?", (MOST_RARE,)),
        ("WHERE f.complaints NOT IN ('[]', 'null', '') LIMIT ?", (MOST_RARE,)),
        ("WHERE s.problem IN (SELECT value FROM json_each(?)) ORDER BY s.problem, s.kind, s.number", (chosen,)),
    ]
    found = {row[0:1] + row[5:7]: row for where, bound in queries for row in db.execute(f"{ANSWER} {where}", bound)}
    prompts: dict[str, int] = {}
    samples: list[dict[str, Any]] = []
    left = MOST_BYTES
    for row in found.values():
        before = len(prompts)
        sample = _sample(row, prompts)
        left -= len(sample["text"].encode()) + 400
        left -= len(next(reversed(prompts)).encode()) if len(prompts) > before else 0
        if left < 0:
            break
        samples.append(sample)
    samples.sort(key=lambda sample: (sample["s"], sample["n"] or 0))
    note = f"{len(samples):,} of {total:,} answers: all to some problems, and some that are unknown or hard to read."
    return Browser(prompts=list(prompts), samples=samples, steps=[], note=note, tokens=False, trainer=False)


def _sample(row: Sequence[Any], prompts: dict[str, int]) -> dict[str, Any]:
    position, name, domain, prompt, answer, kind, number, text, tokens, finish, teacher, error, *found = row
    outcome, reason, complaints, kept, why = found
    shown = cut(_words(prompt), LONGEST_TEXT)
    chips = [brief(f"{name}/{kind}/{number}", 100), f"domain {brief(domain, 60)}", f"teacher {brief(teacher, 60)}"]
    chips += [brief(reason, 120)] if reason else []
    chips += [brief(f"hard to read: {complaints}", 120)] if complaints not in (None, "", "[]", "null") else []
    return {
        "s": position if is_number(position) else 0,
        "p": prompts.setdefault(shown, len(prompts)),
        "g": None,
        "n": number if is_number(number) else None,
        "v": outcome if outcome in ("right", "wrong") else "unknown",
        "cut": finish == "length",
        "eq": False,
        "mask": "" if kept else brief(f"not kept: {why or error or 'not decided'}", 200),
        "len": tokens if is_number(tokens) else 0,
        "gold": brief(answer or "", 200),
        "chips": chips,
        "text": cut(str(text), LONGEST_TEXT),
    }


def _words(prompt: Any) -> str:
    """The messages of a prompt, each after who says it."""
    try:
        messages = json.loads(prompt)
        return "\n\n".join(f"{m['role']}: {m['content']}" for m in messages)
    except (ValueError, TypeError, KeyError, RecursionError):
        return str(prompt)


def _ask(run: Run, question: Callable[[sqlite3.Connection], T]) -> T | None:
    path = run.path / LEDGER
    if not path.is_file():
        return None
    try:
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
            db.execute("PRAGMA trusted_schema = OFF")
            db.text_factory = lambda raw: raw.decode(errors="backslashreplace")
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version != FORMAT:
                raise sqlite3.DatabaseError(f"format {version}, not {FORMAT}")
            return question(db)
    except (sqlite3.Error, TypeError, ValueError) as error:
        note = f"{LEDGER} can't be read: {brief(str(error), 200)}"
        if note not in run.notes:
            run.notes.append(note)
        return None
