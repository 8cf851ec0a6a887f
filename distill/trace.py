"""A row's name in; its life, in lines for people, out: problem, teacher, sampling, verdict, filters, choice, review.

Everything in it may come from data or a model: it is escaped, and never evaluated.
"""

import json
from collections.abc import Iterator, Mapping

from distill.ledger import Ledger, Row
from distill.shards import needs_review
from distill.teacher import conversation
from distill.types import Decision, row_name
from runtime.errors import UserError
from runtime.progress import visible

WIDTH = 14


def trace(ledger: Ledger, name: str, *, decisions: Mapping[str, Decision] | None = None) -> Iterator[str]:
    """Lines about a row (PROBLEM/KIND/INDEX, as in a shard's `id`), or about all of a problem's by the problem's id.

    Raises UserError where there is neither.
    """
    problem, _, rest = name.rpartition("/")
    problem, _, kind = problem.rpartition("/")
    row = ledger.find(problem, kind, int(rest)) if rest.isascii() and rest.isdecimal() and len(rest) < 10 else None
    rows = [row] if row else list(ledger.rows("p.id = ?", (name,)))
    if not rows:
        raise UserError(
            f"{visible(name, keep='')!r} is no answer in {ledger.path}; give a shard's `id`, or a problem's"
        )
    review = needs_review(ledger.settings(), rows[0].problem.domain)
    yield from _problem(rows[0])
    for row in rows:
        own = row_name(row.problem.id, row.sample.kind, row.sample.index)
        yield ""
        yield from _answer(row, own, ledger.retried(row.sample.key))
        yield from _fate(row, (decisions or {}).get(own), review=review)


def _problem(row: Row) -> Iterator[str]:
    problem = row.problem
    yield from _field("problem", f"{problem.id}  (number {problem.position} of the run, domain {problem.domain})")
    for message in problem.prompt:
        yield from _field(f"  {message['role']}", message["content"])
    yield from _field("  gold", problem.answer or "none")
    if problem.columns:
        yield from _field("  columns", json.dumps(problem.columns, ensure_ascii=False))


def _answer(row: Row, name: str, retried: list[str]) -> Iterator[str]:
    sample, teacher = row.sample, row.teacher
    yield from _field("row", name)
    yield from _field("teacher", f"{teacher.model}  (id {teacher.id}, weights {teacher.weights_hash or 'unknown'})")
    settings = {key: value for key, value in teacher.settings.items() if key != "system"}
    yield from _field("parameters", json.dumps(settings, ensure_ascii=False))
    asked = conversation(row.problem, sample.kind, teacher.settings.get("system", ""))
    if asked != row.problem.prompt:
        yield from _field("system prompt", asked[0]["content"])
    yield from _field("seed", f"{sample.seed}, answer {sample.index} of its kind")
    for error in retried:
        yield from _field("failed before", error)
    yield from _field(
        "ended by", f"{sample.finish_reason}, {sample.tokens} tokens{sample.error and f': {sample.error}'}"
    )
    yield from _field("answer", sample.text)


def _fate(row: Row, decision: Decision | None, *, review: bool) -> Iterator[str]:
    finding, choice = row.finding, row.choice
    if finding is None:
        yield from _field("verdict", "not graded yet")
        return
    detail = "".join(f", {part}" for part in (finding.detail, finding.answer and f"read as {finding.answer}") if part)
    yield from _field("verdict", f"{finding.outcome} ({finding.reason}{detail})")
    yield from _field("filters", ", ".join(finding.complaints) or "readable")
    if finding.score is not None:
        yield from _field("score", f"{finding.score:g}")
    yield from _field("choice", "not made yet" if choice is None else choice.reason)
    if decision is not None:
        edited = ", edited" if decision.text is not None else ""
        yield from _field("review", f"{'accepted' if decision.accepted else 'rejected'} by {decision.reviewer}{edited}")
        if decision.text is not None:
            yield from _field("  as edited", decision.text)
    else:
        yield from _field("review", "waiting for people" if review else "not needed")


def _field(name: str, text: str) -> Iterator[str]:
    """A name and a text, whose further lines are indented so that none can pass for a field."""
    first, *rest = visible(text).split("\n")
    yield f"{visible(name, keep=''):{WIDTH}}{first}".rstrip()
    yield from (f"{'':{WIDTH}}{line}".rstrip() for line in rest)
