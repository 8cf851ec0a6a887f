"""What goes to Argilla, Label Studio and SFT, and what comes back; the formats are those of their documentation."""

import json
import uuid
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from distill.__main__ import main
from distill.review.decisions import Decisions, Review
from distill.review.exchange import argilla_user, from_tool
from distill.review.log import Log, read_log
from distill.review.queue import Queue, load_queue
from sft.sources import Conversation, conversation

TOOLS = ["argilla", "label_studio"]


@pytest.fixture
def decided(queue: Queue) -> Iterator[Queue]:
    """Two reviewers; the third row is disputed, the fourth open."""
    with Log(queue.log_path) as log:
        review = Review(queue, log)
        poem, hostile, qa, _ = queue.items
        review.decide(poem, "edit", reviewer="ana", text="Snow.\n")
        review.decide(poem, "accept", reviewer="raj")
        review.decide(hostile, "reject", reviewer="raj")
        review.decide(qa, "accept", reviewer="ana")
        review.decide(qa, "reject", reviewer="raj")
    yield queue


@pytest.fixture
def export(decided: Queue, tmp_path: Path) -> Callable[[str], Any]:
    def exported(to: str) -> Any:
        assert main(["export", str(decided.path), "--to", to, str(tmp_path / "out" / to)]) == 0
        return json.loads((tmp_path / "out" / to).read_text())

    return exported


def said(queue: Queue) -> dict[str, dict[str, tuple[str, str | None]]]:
    decisions = Decisions(queue, read_log(queue.log_path))
    return {i.id: {who: (r.action, r.text) for who, r in decisions.of(i).items()} for i in queue.items}


def test_argillas_records(export) -> None:
    poem, hostile, *_, capital = export("argilla")
    ana, raj = (str(argilla_user(name)) for name in ("ana", "raj"))
    assert uuid.UUID(ana) != uuid.UUID(raj)
    assert poem == {
        "id": "poem/0",
        "fields": {"prompt": [{"role": "user", "content": "A line about snow?"}], "answer": "Snow is\nwhite."},
        "metadata": {"domain": "writing", "digest": poem["metadata"]["digest"], "reviewers": ["ana", "raj"]},
        "suggestions": {"edited": {"value": "Snow is\nwhite.", "score": None, "agent": "model"}},
        "responses": {
            "decision": [{"value": "accept", "user_id": ana}, {"value": "accept", "user_id": raj}],
            "edited": [{"value": "Snow.\n", "user_id": ana}, {"value": "Snow is\nwhite.", "user_id": raj}],
        },
        "vectors": {},
        "status": "completed",
        "_server_id": None,
    }
    assert hostile["responses"] == {"decision": [{"value": "reject", "user_id": raj}]}
    assert (capital["responses"], capital["status"]) == ({}, "pending")


def test_label_studios_tasks_fit_its_interface(export, tmp_path: Path) -> None:
    poem, hostile, *_, capital = export("label_studio")
    assert poem["data"]["prompt"] == "user: A line about snow?" and poem["data"]["answer"] == "Snow is\nwhite."
    values = [{result["from_name"]: result["value"] for result in a["result"]} for a in poem["annotations"]]
    assert values == [
        {"decision": {"choices": ["accept"]}, "edited": {"text": ["Snow.\n"]}, "reviewer": {"text": ["ana"]}},
        {"decision": {"choices": ["accept"]}, "edited": {"text": ["Snow is\nwhite."]}, "reviewer": {"text": ["raj"]}},
    ]
    assert len(hostile["annotations"][0]["result"]) == 2 and capital["annotations"] == []
    interface = ET.parse(tmp_path / "out" / "label_studio.interface.xml").getroot()
    controls = {tag.get("name"): (tag.tag.lower(), tag.get("toName")) for tag in interface if tag.get("toName")}
    for result in (result for a in poem["annotations"] for result in a["result"]):
        assert controls[result["from_name"]] == (result["type"], result["to_name"])
    assert {tag.get("value", "").lstrip("$") for tag in interface} - {""} <= poem["data"].keys()
    assert [choice.get("value") for choice in interface.iter("Choice")] == ["accept", "reject"]


@pytest.mark.parametrize("tool", TOOLS)
def test_what_was_exported_comes_back_once(export, decided: Queue, tmp_path: Path, tool: str, capsys) -> None:
    export(tool)
    (tmp_path / "copy.jsonl").write_bytes(decided.path.read_bytes())
    copy = load_queue(tmp_path / "copy.jsonl")
    command = ["import", str(copy.path), "--from", tool, str(tmp_path / "out" / tool)]
    assert main(command) == 0 and "5 added\n2 of 4 rows settled, 1 disputed" in capsys.readouterr().out
    assert said(copy) == said(decided)
    assert {record.source for record in read_log(copy.log_path)} == {tool}
    assert main(command) == 0 and capsys.readouterr().out.startswith("5 there already")
    with Log(copy.log_path) as log:
        Review(copy, log).decide(copy.items[0], "reject", reviewer="ana")
    assert main(command) == 0 and said(copy)["poem/0"]["ana"] == ("reject", None)  # an old file brings back nothing
    assert main([*command[:1], str(decided.path), *command[2:]]) == 0  # where they came from
    assert len(read_log(decided.log_path)) == 5


def test_people_of_the_tools_get_their_names(queue: Queue, tmp_path: Path) -> None:
    user = str(uuid.uuid4())
    records = [{"id": "qa/0", "fields": {}, "responses": {"decision": [{"value": "reject", "user_id": user}]}}]
    result = [{"from_name": "decision", "value": {"choices": ["accept"]}}]
    tasks = [
        {"data": {"id": "qa/1"}, "annotations": [{"completed_by": 7, "result": result}]},
        {"data": {"id": "qa/0"}, "annotations": [{"completed_by": {"id": 8, "email": "z@x"}, "result": result}]},
    ]
    for tool, content, names in [("argilla", records, [f"{user}=zoe"]), ("label_studio", tasks, ["7=raj"])]:
        (tmp_path / "in.json").write_text(json.dumps(content))
        options = [part for name in names for part in ("--name", name)]
        assert main(["import", str(queue.path), "--from", tool, str(tmp_path / "in.json"), *options]) == 0
    assert said(queue)["qa/0"] == {"zoe": ("reject", None), "z@x": ("accept", None)}
    assert said(queue)["qa/1"] == {"raj": ("accept", None)}


def argilla(**changes: Any) -> dict[str, Any]:
    return {"id": "qa/0", "responses": {"decision": [{"value": "accept", "user_id": "u"}]}, **changes}


def task(**changes: Any) -> dict[str, Any]:
    result = [{"from_name": "decision", "value": {"choices": ["accept"]}}]
    return {"data": {"id": "qa/0"}, "annotations": [{"completed_by": 1, "result": result, **changes}]}


@pytest.mark.parametrize(
    ("tool", "record", "reason"),
    [
        ("argilla", "x", "the record is of type str, not dict"),
        ("argilla", argilla(id="../other"), "no row of this queue"),
        ("argilla", argilla(id=["qa/0"]), "no row of this queue"),
        ("argilla", argilla(metadata={"digest": "0"}), "another text than this queue's"),
        ("argilla", argilla(metadata=3), "metadata is of type int, not dict"),
        ("argilla", argilla(responses=[]), "responses is of type list, not dict"),
        ("argilla", argilla(responses={"decision": [3]}), "a response is of type int, not dict"),
        ("argilla", argilla(responses={"edited": [{"value": "x", "user_id": "u"}]}), "no decision"),
        ("argilla", argilla(responses={"decision": [{"value": {}, "user_id": "u"}]}), "a decision that is neither"),
        (
            "argilla",
            argilla(responses={"decision": [{"value": "accept"}], "edited": [{"value": 3}]}),
            "an edited answer",
        ),
        ("label_studio", {"annotations": []}, "data is of type NoneType, not dict"),
        ("label_studio", {"data": {"id": "qa/0"}, "annotations": 3}, "annotations is of type int, not list"),
        ("label_studio", task(was_cancelled=True), "skipped by the annotator"),
        ("label_studio", task(result=[{"from_name": "decision", "value": []}]), "value is of type list, not dict"),
        ("label_studio", task(result=[{"from_name": "decision", "value": {"choices": []}}]), "a decision that is"),
        ("label_studio", task(result=[]), "no decision"),
    ],
)
def test_what_is_no_decision_is_set_aside_with_the_reason(queue: Queue, tool: Any, record: Any, reason: str) -> None:
    good = {"argilla": argilla(), "label_studio": task()}[tool]
    made, aside = from_tool(tool, [record, good], queue, {})
    assert [(foreign.item.id, foreign.action) for foreign in made] == [("qa/0", "accept")]
    ((number, why),) = aside
    assert number == 1 and why.startswith(reason)


def test_an_import_of_the_unusable_says_so_and_goes_on(queue: Queue, tmp_path: Path, capsys) -> None:
    empty = argilla(
        responses={"decision": [{"value": "accept", "user_id": "u"}], "edited": [{"value": " ", "user_id": "u"}]}
    )
    (tmp_path / "in.json").write_text(json.dumps([empty, argilla(id="x\x1b"), argilla()]))
    assert main(["import", str(queue.path), "--from", "argilla", str(tmp_path / "in.json")]) == 0
    said = capsys.readouterr().out
    assert (
        "1 set aside: no row of this queue\n" in said
        and "1 set aside: text of no use\n" in said
        and "1 added\n" in said
    )
    for content in (b"{", b"{}", b"[" * 100_000):
        (tmp_path / "in.json").write_bytes(content)
        assert main(["import", str(queue.path), "--from", "argilla", str(tmp_path / "in.json")]) == 2
    assert main(["import", str(queue.path), "--from", "argilla", str(tmp_path / "none.json")]) == 2


def test_sft_gets_edits_in_place_nothing_rejected_and_knows_what_waits(decided: Queue, tmp_path: Path, capsys) -> None:
    assert main(["export", str(decided.path), "--to", "sft", str(tmp_path / "sft.jsonl")]) == 0
    assert capsys.readouterr().out.startswith("3 rows in ")
    rows = [json.loads(line) for line in (tmp_path / "sft.jsonl").read_text().splitlines()]
    assert [(row["id"], row["reviewed"], row["reviewer"]) for row in rows] == [
        ("poem/0", True, "ana, raj"), ("qa/0", False, None), ("qa/1", False, None),
    ]  # fmt: skip
    assert rows[0]["messages"][-1]["content"] == "Snow.\n" and rows[0]["domain"] == "writing"
    assert all(isinstance(conversation(row), Conversation) for row in rows)
