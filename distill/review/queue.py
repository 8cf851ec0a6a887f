"""A file of rows with `id`, `messages` and `domain` -> the answers people are to judge, and the rows that are none.

JSON lines or Parquet. Where rows have the column `reviewed`, as SFT shards do, those with null in it need no review.
"""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from distill.types import Message
from runtime.errors import UserError
from runtime.progress import visible
from runtime.rows import BadRow, Reject, excerpt, kind, kind_of, parse, read_raw

QUEUE = "review.jsonl"
"""Its name in the folder of a distillation run."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """An answer to judge."""

    number: int
    """Its place in the queue, from 1."""
    id: str
    domain: str
    prompt: list[Message]
    """All that came before the answer."""
    answer: str
    """As the model wrote it."""
    row: dict[str, Any]
    """As it stands in the file."""

    @cached_property
    def digest(self) -> str:
        """Changes when prompt or answer do, so that no decision passes to another text."""
        content = json.dumps([*([m["role"], m["content"]] for m in self.prompt), self.answer])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Queue:
    """The answers of a file, in its order."""

    path: Path
    items: list[Item]
    aside: list[Reject]
    """Rows that can't be judged, or needn't be, with the reason."""

    @cached_property
    def by_id(self) -> dict[str, Item]:
        """Row's id -> its answer."""
        return {item.id: item for item in self.items}

    @property
    def log_path(self) -> Path:
        """Where the decisions are."""
        return self.path.with_name(f"{self.path.name}.decisions.jsonl")

    def summary(self) -> str:
        """One line: how many rows, and how many were set aside, by reason."""
        reasons = Counter(reject.reason for reject in self.aside).most_common()
        return f"{len(self.items):,} rows to review" + "".join(f"; {n:,} set aside: {reason}" for reason, n in reasons)


def load_queue(source: str | Path) -> Queue:
    """Read a queue, or that of a run's folder. Raises UserError where it can't be read or holds nothing to judge."""
    path = Path(source).expanduser()
    if (path / QUEUE).exists():
        path /= QUEUE
    if kind_of(str(path)) not in ("lines", "parquet"):
        raise UserError(f"queue {str(source)!r}: give a file of JSON lines or Parquet, or a run that has a {QUEUE}")
    items: list[Item] = []
    aside: list[Reject] = []
    seen: set[str] = set()
    for line, found in read_raw(str(path)):
        try:
            item = _item(parse(found) if isinstance(found, bytes) else found, len(items) + 1)
            if item.id in seen:
                raise BadRow("the id of an earlier row")
        except BadRow as bad:
            aside.append(Reject(line=line, reason=bad.reason, text=excerpt(found), malformed=bad.malformed))
            continue
        seen.add(item.id)
        items.append(item)
    queue = Queue(path, items, aside)
    if not items:
        first = f"; line {aside[0].line}: {aside[0].reason}: {visible(aside[0].text[:80])!r}" if aside else ""
        raise UserError(f"queue {str(source)!r}: {queue.summary()}{first}; a row needs `id` and `messages`")
    return queue


def _item(row: object, number: int) -> Item:
    if not isinstance(row, dict):
        raise BadRow(f"not an object but {kind(row)}")
    if row.get("reviewed", False) is None:
        raise BadRow("needs no review", malformed=False)
    name, domain, messages = row.get("id"), row.get("domain"), row.get("messages")
    if not isinstance(name, str) or not name:
        raise BadRow(f"id is {kind(name)}, not a string" if name != "" else "empty id")
    if not isinstance(domain, str | None):
        raise BadRow(f"domain is {kind(domain)}, not a string")
    if not isinstance(messages, list):
        raise BadRow(f"messages is {kind(messages)}, not a list")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise BadRow("a message that isn't an object with the strings role and content")
    if not messages or messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
        raise BadRow("doesn't end in an answer")
    said = [{"role": message["role"], "content": message["content"]} for message in messages]
    return Item(
        number=number, id=name, domain=domain or "", prompt=said[:-1], answer=said[-1]["content"], row=dict(row)
    )
