"""A reviewed queue -> what Argilla, Label Studio and SFT read; what people decided in those two -> decisions.

Argilla 2: the records of `dataset.records.to_json` and `from_json`. Label Studio: tasks with annotations, as it imports
and exports them in its JSON. Both ask `decision` (accept or reject) and `edited`, the answer as it should be;
docs/distill.md says how to set them up. What comes back is as hostile as any data: whatever isn't a decision on a row
of the queue is set aside with a reason.
"""

import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from distill.review.decisions import Decisions
from distill.review.log import Action, Record
from distill.review.queue import Item, Queue
from runtime.rows import BadRow

Tool: TypeAlias = Literal["argilla", "label_studio"]

LABELING = """<View>
  <Text name="prompt" value="$prompt"/>
  <Text name="answer" value="$answer"/>
  <Choices name="decision" toName="answer" choice="single" required="true">
    <Choice value="accept"/><Choice value="reject"/>
  </Choices>
  <TextArea name="edited" toName="answer" value="$answer" maxSubmissions="1" editable="true" rows="12"/>
  <TextArea name="reviewer" toName="answer" maxSubmissions="1" placeholder="reviewer, if not you"/>
</View>
"""
"""Label Studio's interface for `to_label_studio`."""


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """A decision somebody made elsewhere."""

    item: Item
    reviewer: str
    action: Action
    text: str | None


def to_argilla(decisions: Decisions) -> list[dict[str, Any]]:
    """Every answer as a record, its decisions as responses.

    A response has its user's id. Argilla takes those of its users alone: make each reviewer's with
    rg.User(id=argilla_user(name), ...).
    """
    records = []
    for item in decisions.queue.items:
        said = decisions.of(item)
        responses: dict[str, list[dict[str, str]]] = {"decision": [], "edited": []}
        for reviewer, record in said.items():
            user = str(argilla_user(reviewer))
            responses["decision"].append({"value": _choice(record), "user_id": user})
            if record.action != "reject":
                responses["edited"].append({"value": _final(item, record), "user_id": user})
        records.append(
            {
                "id": item.id,
                "fields": {"prompt": item.prompt, "answer": item.answer},
                "metadata": {"domain": item.domain, "digest": item.digest, "reviewers": list(said)},
                "suggestions": {"edited": {"value": item.answer, "score": None, "agent": "model"}},
                "responses": {question: given for question, given in responses.items() if given},
                "vectors": {},
                "status": "completed" if said else "pending",
                "_server_id": None,
            }
        )
    return records


def to_label_studio(decisions: Decisions) -> list[dict[str, Any]]:
    """Every answer as a task, its decisions as annotations.

    The reviewer is a field of the annotation: Label Studio refuses annotations of people it doesn't know, and counts
    those of nobody as of who imports them.
    """
    tasks = []
    for item in decisions.queue.items:
        annotations = []
        for reviewer, record in decisions.of(item).items():
            result = [_result("decision", "choices", _choice(record)), _result("reviewer", "text", reviewer)]
            if record.action != "reject":
                result.append(_result("edited", "text", _final(item, record)))
            annotations.append({"result": result, "was_cancelled": False, "created_at": record.time})
        prompt = "\n\n".join(f"{message['role']}: {message['content']}" for message in item.prompt)
        data = {"id": item.id, "domain": item.domain, "digest": item.digest, "prompt": prompt, "answer": item.answer}
        tasks.append({"data": data, "annotations": annotations})
    return tasks


def to_sft(decisions: Decisions) -> Iterator[dict[str, Any]]:
    """The rows for SFT: without the rejected ones, edits in place, `reviewed` false where nothing is settled."""
    for item in decisions.queue.items:
        decision = decisions.settled(item)
        if decision is not None and not decision.accepted:
            continue
        answer = item.answer if decision is None or decision.text is None else decision.text
        reviewed = {"reviewed": decision is not None, "reviewer": decision and decision.reviewer}
        yield {**item.row, "messages": [*item.prompt, {"role": "assistant", "content": answer}], **reviewed}


def from_tool(
    tool: Tool, found: object, queue: Queue, names: Mapping[str, str]
) -> tuple[list[Foreign], list[tuple[int, str]]]:
    """The decisions in a tool's export, and (1-based record, reason) of what is none; names: its user's id -> name."""
    read: Callable[..., Iterator[Foreign | str]] = _from_argilla if tool == "argilla" else _from_label_studio
    decisions: list[Foreign] = []
    aside: list[tuple[int, str]] = []
    for number, record in enumerate(_of(found, list, "the file"), start=1):
        try:
            for made in read(_of(record, dict, "the record"), queue, names):
                if isinstance(made, str):
                    aside.append((number, made))
                else:
                    decisions.append(made)
        except BadRow as bad:
            aside.append((number, bad.reason))
    return decisions, aside


def argilla_user(reviewer: str) -> uuid.UUID:
    """The id of a reviewer's Argilla account: always the same for a name."""
    return uuid.uuid5(uuid.NAMESPACE_URL, f"reviewer:{reviewer}")


def _from_argilla(record: dict[str, Any], queue: Queue, names: Mapping[str, str]) -> Iterator[Foreign | str]:
    metadata = _of(record.get("metadata", {}), dict, "metadata")
    item = _item(queue, record.get("id"), metadata.get("digest"))
    known = {str(argilla_user(name)): name for name in metadata.get("reviewers") or () if isinstance(name, str)}
    responses = _of(record.get("responses", {}), dict, "responses")
    answers: dict[str, dict[str, Any]] = {}
    for question in ("decision", "edited"):
        for response in _of(responses.get(question, []), list, f"responses to {question}"):
            response = _of(response, dict, "a response")
            answers.setdefault(str(response.get("user_id")), {})[question] = response.get("value")
    for user, said in answers.items():
        yield _foreign(item, names.get(user, known.get(user, user)), said.get("decision"), said.get("edited"))


def _from_label_studio(task: dict[str, Any], queue: Queue, names: Mapping[str, str]) -> Iterator[Foreign | str]:
    data = _of(task.get("data"), dict, "data")
    item = _item(queue, data.get("id"), data.get("digest"))
    for annotation in _of(task.get("annotations", []), list, "annotations"):
        annotation = _of(annotation, dict, "an annotation")
        if annotation.get("was_cancelled"):
            yield "skipped by the annotator"
            continue
        by = annotation.get("completed_by")
        user = str(by.get("email") or by.get("id") if isinstance(by, dict) else by)
        said: dict[str, Any] = {}
        for result in _of(annotation.get("result", []), list, "result"):
            value = _of(_of(result, dict, "a result").get("value", {}), dict, "value")
            texts = value.get("choices", value.get("text"))
            said[str(result.get("from_name"))] = texts[0] if isinstance(texts, list) and texts else texts
        reviewer = said.get("reviewer")
        reviewer = reviewer if isinstance(reviewer, str) and reviewer.strip() else names.get(user, user)
        yield _foreign(item, reviewer, said.get("decision"), said.get("edited"))


def _foreign(item: Item, reviewer: str, decision: object, edited: object) -> Foreign | str:
    if decision not in ("accept", "reject"):
        return "no decision" if decision is None else "a decision that is neither accept nor reject"
    if decision == "reject":
        return Foreign(item=item, reviewer=reviewer, action="reject", text=None)
    if edited is None or edited == item.answer:
        return Foreign(item=item, reviewer=reviewer, action="accept", text=None)
    if not isinstance(edited, str):
        return "an edited answer that is no text"
    return Foreign(item=item, reviewer=reviewer, action="edit", text=edited)


def _item(queue: Queue, name: object, digest: object) -> Item:
    item = queue.by_id.get(name) if isinstance(name, str) else None
    if item is None:
        raise BadRow("no row of this queue")
    if digest is not None and digest != item.digest:
        raise BadRow("another text than this queue's")
    return item


def _of(value: Any, type_: type, what: str) -> Any:
    if not isinstance(value, type_):
        raise BadRow(f"{what} is of type {type(value).__name__}, not {type_.__name__}")
    return value


def _choice(record: Record) -> str:
    return "reject" if record.action == "reject" else "accept"


def _final(item: Item, record: Record) -> str:
    return item.answer if record.text is None else record.text


def _result(name: str, field: Literal["choices", "text"], value: str) -> dict[str, Any]:
    kind = {"choices": "choices", "text": "textarea"}[field]
    return {"id": name, "from_name": name, "to_name": "answer", "type": kind, "value": {field: [value]}}
