"""Which rows are put before people, and why the others aren't."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distill.review.queue import load_queue
from runtime.errors import UserError

TALK = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]


def write(path: Path, *rows: Any) -> Path:
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return path


def test_the_last_message_is_judged_and_what_came_before_is_shown(tmp_path: Path) -> None:
    longer = [{"role": "system", "content": "Be brief."}, *TALK, *TALK]
    rows = [{"id": "a", "messages": TALK, "domain": "maths"}, {"id": "b", "messages": longer}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "queue.parquet")
    for path in (tmp_path / "queue.parquet", write(tmp_path / "queue.jsonl", *rows)):
        first, second = load_queue(path).items
        assert (first.number, first.id, first.domain, first.prompt, first.answer) == (1, "a", "maths", TALK[:1], "4")
        assert (second.number, second.domain, second.prompt) == (2, "", longer[:-1])
        assert load_queue(path).log_path == path.with_name(f"{path.name}.decisions.jsonl")


def test_the_digest_is_of_prompt_and_answer(tmp_path: Path) -> None:
    said = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "5"}]
    asked = [{"role": "user", "content": "2+3?"}, TALK[1]]
    talks = {"a": TALK, "b": said, "c": asked, "d": TALK}
    a, b, c, d = load_queue(write(tmp_path / "q.jsonl", *({"id": i, "messages": t} for i, t in talks.items()))).items
    assert a.digest == d.digest and len({a.digest, b.digest, c.digest}) == 3


BAD: dict[str, Any] = {
    "broken JSON": b"{",
    "not an object but of type list": [],
    "id is null, not a string": {"messages": TALK},
    "empty id": {"id": "", "messages": TALK},
    "the id of an earlier row": {"id": "good", "messages": TALK},
    "domain is of type int, not a string": {"id": "x", "messages": TALK, "domain": 3},
    "messages is of type str, not a list": {"id": "x", "messages": "hi"},
    "a message that isn't an object with the strings role and content": {"id": "x", "messages": [{"role": "user"}]},
    "doesn't end in an answer": {"id": "x", "messages": TALK[:1]},
    "needs no review": {"id": "x", "messages": TALK, "reviewed": None},
}


def test_rows_that_are_no_answers_are_set_aside_with_line_and_reason(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", {"id": "good", "messages": TALK, "reviewed": False}, *BAD.values())
    queue = load_queue(path)
    assert [item.id for item in queue.items] == ["good"]
    assert [(reject.line, reject.reason) for reject in queue.aside] == list(enumerate(BAD, start=2))
    assert [reject.reason for reject in queue.aside if not reject.malformed] == ["needs no review"]
    assert queue.summary().startswith("1 rows to review; 1 set aside: broken JSON; 1 set aside: not an object")


def test_a_file_without_an_answer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"line 1: empty id: .*a row needs `id` and `messages`"):
        load_queue(write(tmp_path / "q.jsonl", BAD["empty id"]))
    with pytest.raises(UserError, match="give a file of JSON lines or Parquet"):
        load_queue("stories")
    with pytest.raises(UserError, match="no such file"):
        load_queue(tmp_path / "none.jsonl")
