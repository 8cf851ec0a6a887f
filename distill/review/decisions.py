"""A queue and its log -> what each reviewer says of each answer now, what all of them say, and what is left to do.

Of a reviewer the last decision on a row counts, unless it was undone. Of several the majority does; an edit is an
acceptance. Left out: files (log.py) and the page (server.py).
"""

import difflib
import threading
import uuid
from collections.abc import Collection, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from distill.review.agreement import Agreement, agreements
from distill.review.log import Action, Log, Record, read_log
from distill.review.queue import Item, Queue, load_queue
from distill.types import Decision
from runtime.errors import UserError

STATES = {
    "todo": "Waiting for you",
    "open": "Waiting for anyone",
    "accept": "You accepted",
    "edit": "You edited",
    "reject": "You rejected",
    "disputed": "Disputed",
    "all": "All answers",
}
"""What a reviewer can ask to see."""
LONGEST_NAME = 60
LONGEST_TEXT = 1_000_000
"""Characters of an edited answer."""


class Decisions:
    """What counts of some records. Those about another text than the queue's don't; `stale` is their number."""

    def __init__(self, queue: Queue, records: Iterable[Record] = ()) -> None:
        self.queue = queue
        self.stale = 0
        self.keys: dict[str, Record] = {}
        """Submission -> its record."""
        self._made: dict[str, dict[int, Record]] = {}
        """Reviewer -> decisions that weren't undone, by number."""
        self._made_of: dict[tuple[str, str], dict[int, Record]] = {}
        """The same of reviewer and row."""
        self._said: dict[str, dict[str, Record]] = {}
        """Row -> reviewer -> the last of these."""
        self._settled: dict[str, Decision | None] = {}
        for record in records:
            self.add(record)

    def add(self, record: Record) -> None:
        """Count one more record."""
        self.keys[record.key] = record
        item = self.queue.by_id.get(record.row)
        if item is None or item.digest != record.digest:
            self.stale += 1
            return
        here = self._made_of.setdefault((record.reviewer, record.row), {})
        for made in (self._made.setdefault(record.reviewer, {}), here):
            if record.undoes is None:
                made[record.number] = record
            else:
                made.pop(record.undoes, None)
        said = self._said.setdefault(record.row, {})
        if (last := _last(here)) is None:
            said.pop(record.reviewer, None)
        else:
            said[record.reviewer] = last
        self._settled[record.row] = _settle(said.values())

    def of(self, item: Item) -> dict[str, Record]:
        """Reviewer -> the decision that counts."""
        return self._said.get(item.id, {})

    def last(self, reviewer: str) -> Record | None:
        """What this reviewer's undo would undo."""
        return _last(self._made.get(reviewer, {}))

    def settled(self, item: Item) -> Decision | None:
        """What the majority says; None where nobody has decided or opinions are divided. The latest edit is taken."""
        return self._settled.get(item.id)

    def is_in(self, state: str, item: Item, reviewer: str) -> bool:
        """Whether an answer is in one of STATES, seen by a reviewer."""
        said = self.of(item)
        if state == "todo":
            return reviewer not in said
        if state == "open":
            return not said
        if state == "disputed":
            return bool(said) and self.settled(item) is None
        return state == "all" or (reviewer in said and said[reviewer].action == state)

    def matching(self, reviewer: str, *, state: str = "todo", domain: str = "", text: str = "") -> list[Item]:
        """The answers to show, in the queue's order; text: to be found in id, prompt or answer, in either case."""
        wanted = text.casefold()
        return [
            item
            for item in self.queue.items
            if domain in ("", item.domain) and self.is_in(state, item, reviewer) and _mentions(item, wanted)
        ]

    def progress(self, reviewer: str = "") -> dict[str, int]:
        """How many answers there are, this reviewer has decided (`mine`), are settled, and are disputed."""
        settled = [self._settled[row] is not None for row, said in self._said.items() if said]
        mine = sum(reviewer in said for said in self._said.values())
        total = len(self.queue.items)
        return {"total": total, "mine": mine, "settled": settled.count(True), "disputed": settled.count(False)}

    def agreements(self) -> list[Agreement]:
        """Of every two reviewers."""
        return agreements({who: r.action for who, r in said.items()} for said in self._said.values())


class Review:
    """A queue under review: what reviewers do, on disk before it counts. Threads may share it."""

    def __init__(self, queue: Queue, log: Log) -> None:
        self.queue, self.log = queue, log
        self.decisions = Decisions(queue, log.records)
        self.lock = threading.RLock()

    def decide(
        self,
        item: Item,
        action: Action,
        *,
        reviewer: str,
        text: str | None = None,
        key: str | None = None,
        source: str = "page",
    ) -> Record:
        """Save a decision; an edit that changes nothing is an acceptance. The same key again changes nothing.

        Raises UserError where the decision makes no sense, DiskError where it can't be saved.
        """
        if action not in ("accept", "edit", "reject"):
            raise UserError(f"action={action!r}: use accept, edit or reject")
        if action == "edit":
            text = _edited(text)
            if text == item.answer:
                action, text = "accept", None
        else:
            text = None
        diff = None if text is None else unified_diff(item.answer, text)
        return self._save(item, reviewer, key, action=action, text=text, diff=diff, source=source)

    def undo(self, reviewer: str, *, key: str | None = None) -> Record | None:
        """Take back this reviewer's last decision that counts; None where there is none."""
        with self.lock:
            last = self.decisions.last(check_name(reviewer))
            if key in self.decisions.keys:
                return self.decisions.keys[key]
            if last is None:
                return None
            return self._save(self.queue.by_id[last.row], reviewer, key, action="undo", undoes=last.number)

    def _save(self, item: Item, reviewer: str, key: str | None, **fields: Any) -> Record:
        with self.lock:
            record = Record(
                number=len(self.log.records) + 1,
                key=key or uuid.uuid4().hex,
                time=datetime.now(UTC).isoformat(timespec="milliseconds"),
                reviewer=check_name(reviewer),
                row=item.id,
                digest=item.digest,
                **fields,
            )
            if (before := self.decisions.keys.get(record.key)) is not None:
                if _content(before) != _content(record):
                    raise UserError(f"key={record.key!r}: another decision was saved under it; load the page again")
                return before
            self.log.append(record)
            self.decisions.add(record)
            return record


def load_decisions(source: str | Path) -> dict[str, Decision]:
    """Row's id -> what people say of it, for the rows of a queue that are settled, also while they are at it."""
    queue = load_queue(source)
    decisions = Decisions(queue, read_log(queue.log_path))
    settled = {item.id: decisions.settled(item) for item in queue.items}
    return {row: decision for row, decision in settled.items() if decision is not None}


def _last(made: dict[int, Record]) -> Record | None:
    return next(reversed(made.values()), None)


def _settle(said: Collection[Record]) -> Decision | None:
    sides = {accepted: [r for r in said if (r.action != "reject") == accepted] for accepted in (True, False)}
    if len(sides[True]) == len(sides[False]):
        return None
    accepted = len(sides[True]) > len(sides[False])
    edits = [record for record in sides[accepted] if record.text is not None]
    text = max(edits, key=lambda record: record.number).text if edits else None
    return Decision(accepted=accepted, reviewer=", ".join(sorted(r.reviewer for r in sides[accepted])), text=text)


def unified_diff(before: str, after: str) -> str:
    """What changed, line by line, with one line around it."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), "model", "reviewer", lineterm="", n=1)
    return "\n".join(lines)


def check_name(reviewer: str) -> str:
    """A reviewer's name, without white space around it; UserError for one nobody could read."""
    name = reviewer.strip()
    if not (name.isprintable() and 1 <= len(name) <= LONGEST_NAME):
        raise UserError(f"reviewer={reviewer[:LONGEST_NAME]!r}: a name has 1 to {LONGEST_NAME} printable characters")
    return name


def _edited(text: str | None) -> str:
    if text is None or not text.strip() or len(text) > LONGEST_TEXT:
        raise UserError(f"text: an edited answer has 1 to {LONGEST_TEXT:,} characters; reject the row instead")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError("text: broken Unicode, which no tokenizer takes; type that part again") from error
    return text


def _content(record: Record) -> tuple[object, ...]:
    return record.reviewer, record.row, record.digest, record.action, record.text


def _mentions(item: Item, wanted: str) -> bool:
    if not wanted:
        return True
    return any(wanted in text.casefold() for text in (item.id, item.answer, *(m["content"] for m in item.prompt)))
