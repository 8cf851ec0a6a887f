"""Sources in; problems to answer, and those that are set aside with the reason, out.

Set aside, in this order: rows that hold no problem, problems and ids that came before, near duplicates, and problems
that stand in a benchmark. Layouts are those of runtime/rows.py, and `messages`, whose last assistant turn is the
original response. Left out: who answers them (teacher.py).
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import xxhash

from distill.contamination import Benchmarks, text_of
from distill.duplicates import near_duplicates, words
from distill.types import Message, Problem
from runtime.errors import UserError
from runtime.rows import BadRow, excerpt, kind, normalise, parse, read_raw
from runtime.settings import require

SAME_ID, SAME, NEAR, CONTAMINATED = "id came before", "duplicate", "near duplicate", "in a benchmark"
RESPONSES = ("response", "solution")
"""Columns of the original response, the first of them that a row has."""


@dataclass(frozen=True, kw_only=True)
class ProblemsConfig:
    """One source of problems."""

    path: str
    """A file (.jsonl, .json, either with .gz, or .parquet), a `datasets` name or folder ("name", "name:split" or
    "name:config:split"), "stories" or "stories:heldout"."""
    domain: str | None = None
    """Of all its rows; unset: what their column `domain` says."""
    response: str | None = None
    """Column of the original response; unset: `response` or `solution`, where a row has one."""
    max_rows: int | None = None
    """Read at most so many rows, from its beginning; unset: all."""

    def __post_init__(self) -> None:
        require(bool(self.path), "problems.path: give a file, a `datasets` name or folder, or stories")
        require(
            self.max_rows is None or self.max_rows >= 1,
            f"problems ({self.path}).max_rows={self.max_rows}: read at least one, or leave it out",
        )


@dataclass(frozen=True, kw_only=True)
class Aside:
    """A row that nobody is asked to answer."""

    source: str
    line: int
    """1-based line or row of its source."""
    reason: str
    """From a small set, so that it can be counted."""
    detail: str = ""
    """What it repeats, or how the row begins."""


@dataclass(kw_only=True)
class Problems:
    """What sources hold."""

    kept: list[Problem] = field(default_factory=list)
    aside: list[Aside] = field(default_factory=list)

    @property
    def reasons(self) -> Counter[str]:
        """How many rows were set aside, by reason."""
        return Counter(aside.reason for aside in self.aside)


def load_problems(
    sources: Sequence[ProblemsConfig], *, likeness: float | None = None, benchmarks: Benchmarks | None = None
) -> Problems:
    """Read every source and set aside what should not be answered.

    likeness: Jaccard similarity from which a problem repeats an earlier one; None: only the same words do.
    Raises UserError if nothing is left.
    """
    problems = Problems()
    rows = list(_distinct(_read(sources, problems), problems))
    repeats = near_duplicates([text_of(row["prompt"]) for *_, row in rows], threshold=likeness) if likeness else None
    for source, line, row in rows:
        repeated = next(repeats) if repeats else None
        if repeated is not None:
            earlier = f"{rows[repeated[0]][2]['id']}, likeness {repeated[1]:.2f}"
            problems.aside.append(Aside(source=source.path, line=line, reason=NEAR, detail=earlier))
        elif benchmarks and (hit := benchmarks.hit(text_of(row["prompt"]))):
            problems.aside.append(Aside(source=source.path, line=line, reason=CONTAMINATED, detail=str(hit)))
        else:
            problems.kept.append(_problem(row, source, position=len(problems.kept)))
    if not problems.kept:
        reasons = ", ".join(f"{n} × {reason}" for reason, n in problems.reasons.most_common()) or "there are no rows"
        raise UserError(f"problems: {', '.join(s.path for s in sources)}: nothing is left to answer: {reasons}")
    return problems


Located = tuple[ProblemsConfig, int, dict[str, Any]]
"""A row, its source and its line."""


def _read(sources: Sequence[ProblemsConfig], problems: Problems) -> Iterator[Located]:
    for source in sources:
        for number, (line, found) in enumerate(read_raw(source.path, source.max_rows)):
            if number == source.max_rows:
                break
            try:
                yield source, line, _row(parse(found) if isinstance(found, bytes) else found, source)
            except BadRow as bad:
                problems.aside.append(Aside(source=source.path, line=line, reason=bad.reason, detail=excerpt(found)))


def _distinct(rows: Iterator[Located], problems: Problems) -> Iterator[Located]:
    """The rows whose id and words are new."""
    ids: set[str] = set()
    texts: dict[str, str] = {}
    for source, line, row in rows:
        text = " ".join(words(text_of(row["prompt"])))
        if text in texts or row["id"] in ids:
            reason, detail = (SAME, texts[text]) if text in texts else (SAME_ID, row["id"])
            problems.aside.append(Aside(source=source.path, line=line, reason=reason, detail=detail))
            continue
        ids.add(row["id"])
        texts[text] = row["id"]
        yield source, line, row


def _row(found: object, source: ProblemsConfig) -> dict[str, Any]:
    """A row with `prompt` as messages, `id`, `domain`, `answer` and `response`; BadRow if it holds no problem."""
    if isinstance(found, dict) and found.get("messages") is not None and found.get("prompt") is None:
        found = _from_messages(found)
    if isinstance(found, dict) and found.get("answer") is None and found.get("gold") is not None:
        found = {**found, "answer": found["gold"]}
    row = normalise(found)
    if isinstance(row["prompt"], str):
        row["prompt"] = [{"role": "user", "content": row["prompt"]}]
    if row["prompt"][-1]["role"] != "user":
        raise BadRow("the prompt doesn't end with the user's turn")
    domain = source.domain or row.get("domain")
    if not isinstance(domain, str) or not domain:
        raise BadRow("no domain: set the source's, or give the row one")
    columns = (source.response,) if source.response else RESPONSES
    response = next((row[column] for column in columns if row.get(column) is not None), None)
    if response is not None and not isinstance(response, str):
        raise BadRow(f"the original response is {kind(response)}, not a string")
    row_id = row.get("id")
    if row_id is None:
        row_id = xxhash.xxh3_64_hexdigest("\0".join(m["role"] + "\0" + m["content"] for m in row["prompt"]).encode())
    elif not isinstance(row_id, str | int) or isinstance(row_id, bool):
        raise BadRow(f"id is {kind(row_id)}, not a string or a number")
    return {**row, "id": str(row_id), "domain": domain, "response": response}


def _from_messages(row: dict[str, Any]) -> dict[str, Any]:
    """Messages with or without a last assistant turn -> a prompt and the original response."""
    messages = row["messages"]
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BadRow("messages is not a list of messages")
    out = {name: value for name, value in row.items() if name != "messages"}
    if messages and messages[-1].get("role") == "assistant":
        return {**out, "prompt": messages[:-1], "response": messages[-1].get("content")}
    return {**out, "prompt": messages}


def _problem(row: dict[str, Any], source: ProblemsConfig, *, position: int) -> Problem:
    named = ("id", "domain", "prompt", "answer", "response")
    prompt: list[Message] = [{"role": m["role"], "content": m["content"]} for m in row["prompt"]]
    return Problem(
        id=row["id"],
        position=position,
        domain=row["domain"],
        prompt=prompt,
        answer=row["answer"],
        response=row["response"],
        columns={name: value for name, value in row.items() if name not in named},
    )
