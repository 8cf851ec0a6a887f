"""A file, a dataset's name or "stories" in; conversations to train on out, or the reason why a row is none.

Kinds of source are those of runtime/rows.py, streamed. Layouts: `messages` (Mixture-of-Thoughts); `prompt` and
`completion`, both messages or, as in TRL, both plain text that no template touches; `conversations` of from/value or
role/content with an optional `system` (OpenThoughts); `problem` and `solution` (NuminaMath). Other columns are left
out, and so are rows that would lose something the assistant said: reasoning in a field of its own, lists of tools.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import xxhash

from runtime.rows import BadRow, kind, kind_of, load_dataset, open_lines, parse, read_raw

ROLES = {
    **{role: role for role in ("system", "user", "assistant", "tool")},
    "human": "user",
    "gpt": "assistant",
}
"""What rows call a speaker -> what the template calls it."""
ASIDE = ("reasoning_content", "reasoning", "thinking")
"""Where some APIs put the reasoning, which no template here would show."""
DIRECT_SHARE = 0.7
"""Of the built-in stories' demonstrations, those that jump to the answer."""
UNREVIEWED = "not reviewed yet"
"""The reason for a row that waits for people."""
BLOCK = 1 << 22


class Conversation(NamedTuple):
    """What one row teaches."""

    messages: list[dict[str, Any]]
    """role, content and, for calls of tools, tool_calls."""
    train_turns: Literal["all", "last"] = "all"
    """Which of the assistant's turns; "last" where earlier ones are part of the prompt."""


class Text(NamedTuple):
    """A plain prompt and its completion, for no template."""

    prompt: str
    completion: str


class Source:
    """A source's raw rows, how many there are, and what their content is known by."""

    def __init__(self, name: str, *, max_examples: int | None = None) -> None:
        """Raises UserError where there is nothing or of no known kind. max_examples: stop after so many rows."""
        self.name, self.max_examples = name, max_examples
        self.kind = kind_of(name)
        self._path = Path(name).expanduser()
        self._dataset: Any = load_dataset(name) if self.kind == "dataset" else None

    def __iter__(self) -> Iterator[tuple[int, object]]:
        """(1-based line or row, the row: bytes of JSON or an object), one after the other."""
        rows: Iterator[tuple[int, object]]
        if self.kind == "stories":
            rows = ((line, _demonstration(line, row)) for line, row in read_raw(self.name))
        elif self.kind == "dataset":
            rows = _dataset_rows(self._dataset)
        else:
            rows = read_raw(self.name)
        return islice(rows, self.max_examples)

    def count(self) -> int:
        """Rows, blank lines among them: for progress, and to know early what share is bad."""
        if self.kind == "lines":
            with open_lines(self._path) as file:
                ends = sum(block.count(b"\n") for block in iter(lambda: file.read(BLOCK), b""))
            rows = ends + 1
        elif self.kind == "parquet":
            import pyarrow.parquet as pq

            rows = pq.ParquetFile(self._path).metadata.num_rows
        elif self.kind == "dataset":
            rows = len(self._dataset)
        else:
            rows = sum(1 for _ in self)
        return rows if self.max_examples is None else min(rows, self.max_examples)

    def fingerprint(self) -> str:
        """Changes when the content does: a file's hash, a dataset's fingerprint, the demonstrations' hash."""
        digest = xxhash.xxh3_128()
        if self.kind in ("lines", "parquet"):
            with self._path.open("rb") as file:
                for block in iter(lambda: file.read(BLOCK), b""):
                    digest.update(block)
        elif self.kind == "dataset":
            digest.update(self._dataset._fingerprint.encode())
        else:
            for _, row in self:
                digest.update(repr(row).encode())
        return f"{self.kind} {digest.hexdigest()} {self.max_examples}"


def conversation(row: object, *, unreviewed: Literal["reject", "keep"] = "keep") -> Conversation | Text:
    """What a raw row teaches; BadRow, with a reason from a small set, if nothing can be made of it.

    unreviewed: "reject" does so with a row whose column `reviewed` is false.
    """
    if isinstance(row, bytes):
        row = parse(row)
    if not isinstance(row, dict):
        raise BadRow(f"not an object but {kind(row)}")
    if row.get("reviewed") is False and unreviewed == "reject":
        raise BadRow(UNREVIEWED, malformed=False)
    if row.get("tools") not in (None, [], "", "[]"):
        raise BadRow("a list of tools, which isn't rendered: write it into the system prompt")
    has = {key for key, value in row.items() if value is not None}
    if "messages" in has:
        return _whole(_messages(row["messages"], "messages"))
    if {"prompt", "completion"} <= has:
        return _prompt_and_completion(row["prompt"], row["completion"])
    if "conversations" in has:
        system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
        return _whole([*_messages(system, "system"), *_messages(row["conversations"], "conversations")])
    if {"problem", "solution"} <= has:
        turns = [("user", row["problem"]), ("assistant", row["solution"])]
        return _whole(_messages([{"role": role, "content": content} for role, content in turns], "problem or solution"))
    raise BadRow("no messages, no prompt and completion, no conversations, no problem and solution")


def _whole(messages: list[dict[str, Any]], train_turns: Literal["all", "last"] = "all") -> Conversation:
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise BadRow("no assistant turn")
    return Conversation(messages, train_turns)


def _prompt_and_completion(prompt: object, completion: object) -> Conversation | Text:
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion.strip():
            raise BadRow("empty completion")
        return Text(prompt, completion)
    if isinstance(prompt, str) or isinstance(completion, str):
        raise BadRow("prompt and completion are not both text or both messages")
    before, said = _messages(prompt, "prompt"), _messages(completion, "completion")
    turns = [[message for message in part if message["role"] == "assistant"] for part in (before, said)]
    if not turns[1]:
        raise BadRow("no assistant turn")
    if turns[0] and len(turns[1]) > 1:
        raise BadRow("assistant turns in the prompt and several in the completion: give one, or use messages")
    return _whole([*before, *said], "last" if turns[0] else "all")


def _messages(value: object, column: str) -> list[dict[str, Any]]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise BadRow(f"{column} is {kind(value)}, not a list of messages")
    return [_message(message, column) for message in value]


def _message(message: object, column: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise BadRow(f"{column} has a message that isn't an object but {kind(message)}")
    speaker, content = (
        message.get(first) if message.get(first) is not None else message.get(second)
        for first, second in (("role", "from"), ("content", "value"))
    )
    if not isinstance(speaker, str):
        raise BadRow(f"{column} has a message whose role is {kind(speaker)}, not a string")
    if speaker not in ROLES:
        raise BadRow("unknown role")
    for field in ASIDE:
        if message.get(field):
            raise BadRow(f"{field} outside content: write it there between <think> and </think>")
    calls = message.get("tool_calls") or []
    if calls and not (isinstance(calls, list) and all(map(_is_call, calls))):
        raise BadRow("tool_calls that aren't a list of functions with name and arguments")
    if not isinstance(content, str) and not (content is None and calls):
        raise BadRow(f"{column} has a content that is {kind(content)}, not a string")
    role = ROLES[speaker]
    if role in ("user", "assistant") and not calls and not (content and content.strip()):
        raise BadRow(f"empty {role} turn")
    return {"role": role, "content": content or "", **({"tool_calls": calls} if calls else {})}


def _is_call(call: object) -> bool:
    function = call.get("function") if isinstance(call, dict) else None
    return (
        isinstance(function, dict)
        and isinstance(function.get("name"), str)
        and isinstance(function.get("arguments"), str | dict)
    )


def _demonstration(line: int, row: object) -> dict[str, Any]:
    """A story with one of its two answers: three in ten are worked out, seven jump to it."""
    assert isinstance(row, dict)
    answer = row["direct" if (line - 1) % 10 < 10 * DIRECT_SHARE else "worked"]
    return {"messages": [*row["prompt"], {"role": "assistant", "content": answer}]}


def _dataset_rows(dataset: Any) -> Iterator[tuple[int, object]]:
    """As `enumerate(dataset, 1)`, going on behind a row with a string that isn't UTF-8."""
    for start in range(0, len(dataset), 1000):
        indices = range(start, min(start + 1000, len(dataset)))
        try:
            columns = dataset[indices.start : indices.stop]
            rows: list[object] = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        except UnicodeDecodeError:
            rows = [_dataset_row(dataset, index) for index in indices]
        yield from enumerate(rows, start=start + 1)


def _dataset_row(dataset: Any, index: int) -> object:
    try:
        return dataset[index]
    except UnicodeDecodeError as error:
        return bytes(error.object)  # to be refused as a line that isn't UTF-8
