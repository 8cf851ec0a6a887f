"""Layouts and kinds of source, and the reason for every row that can't be used."""

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from runtime.errors import UserError
from runtime.rows import BadRow
from sft.sources import Conversation, Source, Text, conversation

USER, BOT = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "<think>easy</think>4"}
TALK = [USER, BOT]
SAID = [("user", "2+2?"), ("assistant", "<think>easy</think>4")]
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 2}'}}


def turns(row: object) -> list[tuple[str, str]]:
    made = conversation(row)
    assert isinstance(made, Conversation)
    return [(message["role"], message["content"]) for message in made.messages]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TALK},
        {"messages": TALK, "num_tokens": 7, "source": "open-r1/codeforces-cots"},  # Mixture-of-Thoughts
        {"prompt": [USER], "completion": [BOT]},
        {"conversations": [{"from": "user", "value": "2+2?"}, {"from": "assistant", "value": "<think>easy</think>4"}]},
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "<think>easy</think>4"}]},
        {"conversations": TALK, "system": ""},
        {"problem": "2+2?", "solution": "<think>easy</think>4", "answer": "4", "problem_type": "Algebra"},  # NuminaMath
        {"messages": None, "problem": "2+2?", "solution": "<think>easy</think>4"},  # Parquet's absent column
        b'{"messages": [{"role": "user", "content": "2+2?"}, '
        b'{"role": "assistant", "content": "<think>easy</think>4"}]}',
    ],
)
def test_every_layout_becomes_the_same_messages(row: object) -> None:
    assert turns(row) == SAID


def test_openthoughts_system_prompt_comes_first() -> None:
    talk = [{"from": "user", "value": "2+2?"}, {"from": "assistant", "value": "4"}]
    row = {"system": "Think.", "conversations": talk}
    assert turns(row) == [("system", "Think."), ("user", "2+2?"), ("assistant", "4")]


def test_plain_prompt_and_completion_stay_text_as_in_trl() -> None:
    assert conversation({"prompt": "2+2=", "completion": "4"}) == Text("2+2=", "4")


def test_only_the_completion_is_trained_where_the_prompt_has_the_assistants_turns_too() -> None:
    again = {"role": "user", "content": "And 3+3?"}
    made = conversation({"prompt": [*TALK, again], "completion": [{"role": "assistant", "content": "6"}]})
    assert isinstance(made, Conversation) and made.train_turns == "last" and len(made.messages) == 4
    whole = conversation({"prompt": [USER], "completion": [BOT, again, BOT]})
    assert isinstance(whole, Conversation) and whole.train_turns == "all"


def test_calls_of_tools_and_their_outputs_are_kept_and_nothing_else_is() -> None:
    absent = {"tool_calls": None, "name": None, "tool_call_id": None}  # what Parquet makes of absent keys
    messages = [
        {**USER, **absent},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "name": None},
        {"role": "tool", "content": "4", **absent},
        {**BOT, **absent},
    ]
    made = conversation({"messages": messages})
    assert isinstance(made, Conversation)
    assert made.messages == [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "4"},
        BOT,
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b'{"messages": [', "broken JSON"),
        (b'{"messages": "\xff"}', "broken UTF-8"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "broken UTF-8"),
        ([1], "not an object but of type list"),
        ({}, "no messages, no prompt and completion, no conversations, no problem and solution"),
        ({"prompt": "2+2="}, "no messages, no prompt and completion, no conversations, no problem and solution"),
        ({"messages": "hi"}, "messages is of type str, not a list of messages"),
        ({"messages": 3}, "messages is of type int, not a list of messages"),
        ({"messages": ["hi"]}, "messages has a message that isn't an object but of type str"),
        ({"messages": [{"content": "hi"}]}, "messages has a message whose role is null, not a string"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "unknown role"),
        ({"messages": [{"role": "user", "content": [1]}]}, "messages has a content that is of type list, not a string"),
        ({"messages": [USER, {"role": "assistant"}]}, "messages has a content that is null, not a string"),
        ({"messages": []}, "no assistant turn"),
        ({"messages": [USER]}, "no assistant turn"),
        ({"messages": [{"role": "user", "content": " "}, BOT]}, "empty user turn"),
        ({"messages": [USER, {"role": "assistant", "content": "\n"}]}, "empty assistant turn"),
        ({"messages": [USER, {**BOT, "tool_calls": ["add"]}]}, "tool_calls that aren't a list of functions"),
        ({"messages": [USER, {**BOT, "reasoning_content": "hm"}]}, "reasoning_content outside content"),
        ({"messages": TALK, "tools": [{"name": "add"}]}, "a list of tools, which isn't rendered"),
        ({"prompt": "2+2=", "completion": " "}, "empty completion"),
        ({"prompt": "2+2=", "completion": [BOT]}, "prompt and completion are not both text or both messages"),
        ({"prompt": [USER], "completion": [USER]}, "no assistant turn"),
        ({"prompt": TALK, "completion": [BOT, BOT]}, "assistant turns in the prompt and several in the completion"),
        ({"conversations": TALK, "system": 3}, "system has a content that is of type int, not a string"),
        ({"problem": "2+2?", "solution": 4}, "problem or solution has a content that is of type int, not a string"),
        ({"problem": "2+2?", "solution": ""}, "empty assistant turn"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_used_says_why(row: object, reason: str) -> None:
    with pytest.raises(BadRow) as raised:
        conversation(row)
    assert raised.value.reason.startswith(reason)


ROWS = [
    {"messages": TALK, "problem": None, "solution": None},
    {"messages": None, "problem": "1+1?", "solution": "2"},
]


def lines(*rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@pytest.fixture(params=["rows.jsonl", "rows.json.gz", "rows.parquet", "folder", "saved"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Two rows in each kind of source."""
    place: Path = tmp_path / request.param
    if place.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), place)
    elif place.suffix == ".gz":
        place.write_bytes(gzip.compress(lines(*ROWS)))
    elif place.suffix:
        place.write_bytes(lines(*ROWS))
    elif request.param == "saved":
        datasets.Dataset.from_list(ROWS).save_to_disk(str(place))
    else:
        place.mkdir()
        (place / "train.jsonl").write_bytes(lines(*ROWS))
    return str(place)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_every_kind_of_source_gives_its_rows_with_their_lines(path: str) -> None:
    source = Source(path)
    assert [(line, turns(row)) for line, row in source] == [(1, SAID), (2, [("user", "1+1?"), ("assistant", "2")])]
    assert list(source) == list(source)  # can be read again
    assert source.count() in (2, 3)  # a text file's last line end may begin a line


def test_max_examples_ends_a_source_early(path: str) -> None:
    source = Source(path, max_examples=1)
    assert [line for line, _ in source] == [1] and source.count() == 1
    assert source.fingerprint() != Source(path).fingerprint()


def test_the_fingerprint_follows_the_content(path: str, tmp_path: Path) -> None:
    before = Source(path).fingerprint()
    assert Source(path).fingerprint() == before
    file = tmp_path / "other.jsonl"
    file.write_bytes(lines(*ROWS))
    same = Source(str(file)).fingerprint()
    file.write_bytes(lines(*ROWS).replace(b"2+2", b"2+3"))
    assert Source(str(file)).fingerprint() != same


def test_a_folder_whose_file_changed_is_another_source(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / "train.jsonl"
    prints = []
    for rows in (ROWS, ROWS[:1]):
        file.write_bytes(lines(*rows))
        prints.append(Source(str(tmp_path / "data")).fingerprint())
    assert prints[0] != prints[1]


def test_lines_count_blank_ones_and_none_is_held(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(lines(ROWS[0]) + b"\n" + lines(ROWS[1]))
    rows = iter(Source(str(file)))
    assert next(rows)[0] == 1 and next(rows)[0] == 3


def test_a_dataset_goes_on_behind_a_string_that_is_not_utf8(tmp_path: Path) -> None:
    problems = pa.array([b"1+1?", b"\xff", b"2+2?"]).cast(pa.binary())
    broken = pa.StringArray.from_buffers(3, problems.buffers()[1], problems.buffers()[2])
    table = pa.table({"problem": broken, "solution": ["2", "3", "4"]})
    datasets.Dataset(table).save_to_disk(str(tmp_path / "saved"))
    pq.write_table(table, tmp_path / "rows.parquet")
    for name in ("saved", "rows.parquet"):
        (_, first), (two, broken_row), (three, last) = Source(str(tmp_path / name))
        assert (turns(first)[0][1], turns(last)[0][1], two, three) == ("1+1?", "2+2?", 2, 3)
        with pytest.raises(BadRow, match="broken UTF-8"):
            conversation(broken_row)


def test_the_built_in_stories_are_worked_three_times_in_ten() -> None:
    source = Source("stories:heldout")
    said = [turns(row)[-1][1] for _, row in source]
    assert source.count() == len(said) == 400
    assert sum(not answer.startswith("<think></think>") for answer in said) == 120
    assert Source("stories").fingerprint() != source.fingerprint()


@pytest.mark.parametrize("name", ["nowhere.jsonl", "./nowhere", "stories:test", "a b"])
def test_a_source_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="source "):
        Source(name)


def test_a_file_cut_short_is_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl.gz"
    file.write_bytes(gzip.compress(lines(*ROWS * 1000))[:-50])
    with pytest.raises(UserError, match=r"rows\.jsonl\.gz.*can't be read"):
        list(Source(str(file)))
