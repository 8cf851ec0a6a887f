"""What counts of what was decided: the last word of each, undo, the majority of all, and what is left to do."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from distill.review.decisions import Decisions, Review, load_decisions
from distill.review.log import Log, read_log
from distill.review.queue import Queue, load_queue
from distill.types import Decision
from runtime.errors import UserError


@pytest.fixture
def review(queue: Queue) -> Iterator[Review]:
    with Log(queue.log_path) as log:
        yield Review(queue, log)


def ids(review: Review, reviewer: str = "ana", **view: str) -> list[str]:
    return [item.id for item in review.decisions.matching(reviewer, **view)]


def actions(review: Review, number: int) -> dict[str, str]:
    return {who: record.action for who, record in review.decisions.of(review.queue.items[number - 1]).items()}


def test_a_decision_has_who_when_and_what_changed(review: Review) -> None:
    poem = review.queue.items[0]
    record = review.decide(poem, "edit", reviewer=" Ana ", text="Snow is\nwhiter.\n")
    assert (record.number, record.reviewer, record.row, record.digest) == (1, "Ana", "poem/0", poem.digest)
    assert record.time.endswith("+00:00") and record.time[10] == "T"
    assert record.text == "Snow is\nwhiter.\n"
    assert record.diff is not None and record.diff.splitlines()[2:] == [
        "@@ -1,2 +1,2 @@",
        " Snow is",
        "-white.",
        "+whiter.",
    ]
    assert read_log(review.queue.log_path) == [record]
    plain = review.decide(poem, "accept", reviewer="raj", text="not used")
    assert (plain.text, plain.diff) == (None, None)


def test_an_edit_that_changes_nothing_is_an_acceptance(review: Review) -> None:
    poem = review.queue.items[0]
    assert review.decide(poem, "edit", reviewer="ana", text=poem.answer).action == "accept"


def test_the_last_decision_counts_and_undo_takes_back_one_after_the_other(review: Review) -> None:
    poem, _, qa, _ = review.queue.items
    review.decide(poem, "accept", reviewer="ana")
    review.decide(qa, "reject", reviewer="ana")
    review.decide(poem, "reject", reviewer="ana")
    review.decide(poem, "accept", reviewer="raj")
    assert actions(review, 1) == {"ana": "reject", "raj": "accept"}
    undone = review.undo("ana")
    assert undone is not None and (undone.action, undone.undoes, undone.row) == ("undo", 3, "poem/0")
    assert actions(review, 1) == {"ana": "accept", "raj": "accept"}
    assert actions(review, 3) == {"ana": "reject"}
    review.undo("ana")
    assert actions(review, 3) == {}
    review.decide(qa, "accept", reviewer="ana")
    for _ in range(2):
        review.undo("ana")
    assert actions(review, 1) == {"raj": "accept"} and actions(review, 3) == {}
    assert review.undo("ana") is None and review.undo("nobody") is None
    assert [record.number for record in review.log.records] == list(range(1, 10))  # nothing is ever removed


def test_a_log_read_again_gives_the_same_state(review: Review) -> None:
    poem, hostile, qa, _ = review.queue.items
    for item, action, who in [(poem, "accept", "ana"), (qa, "reject", "ana"), (hostile, "reject", "raj")]:
        review.decide(item, action, reviewer=who)
    review.undo("ana")
    review.decide(poem, "edit", reviewer="ana", text="Better.")
    again = Decisions(review.queue, read_log(review.queue.log_path))
    for item in review.queue.items:
        assert again.of(item) == review.decisions.of(item) and again.settled(item) == review.decisions.settled(item)
    assert again.last("ana") == review.decisions.last("ana") and again.progress("ana") == review.decisions.progress(
        "ana"
    )


def test_the_same_submission_again_changes_nothing(review: Review) -> None:
    poem, _, qa, _ = review.queue.items
    first = review.decide(poem, "edit", reviewer="ana", text="x", key="k")
    assert review.decide(poem, "edit", reviewer="ana", text="x", key="k") == first
    for item, action, who, text in [(qa, "edit", "ana", "x"), (poem, "accept", "ana", None), (poem, "edit", "raj", "x"),
                                    (poem, "edit", "ana", "y")]:  # fmt: skip
        with pytest.raises(UserError, match="another decision was saved under it"):
            review.decide(item, action, reviewer=who, text=text, key="k")
    review.decide(qa, "accept", reviewer="ana")
    undone = review.undo("ana", key="u")
    assert review.undo("ana", key="u") == undone and actions(review, 1) == {"ana": "edit"}
    assert len(review.log.records) == 3


@pytest.mark.parametrize(
    ("said", "settled"),
    [
        ([], None),
        (["accept"], Decision(accepted=True, reviewer="a")),
        (["reject"], Decision(accepted=False, reviewer="a")),
        (["accept", "reject"], None),
        (["reject", "edit:x"], None),
        (["accept", "reject", "reject"], Decision(accepted=False, reviewer="b, c")),
        (["accept", "edit:x", "reject"], Decision(accepted=True, reviewer="a, b", text="x")),
        (["edit:x", "edit:y", "accept"], Decision(accepted=True, reviewer="a, b, c", text="y")),
        (["accept", "edit:x", "reject", "reject"], None),
    ],
)
def test_the_majority_settles_a_row(review: Review, said: list[str], settled: Decision | None) -> None:
    poem = review.queue.items[0]
    for who, saying in zip("abcd", said, strict=False):
        action, _, text = saying.partition(":")
        review.decide(poem, action, reviewer=who, text=text or None)  # type: ignore[arg-type]
    assert review.decisions.settled(poem) == settled
    assert load_decisions(review.queue.path) == ({"poem/0": settled} if settled else {})
    assert (ids(review, state="disputed") == ["poem/0"]) == (bool(said) and settled is None)


def test_views_are_by_state_domain_and_text(review: Review) -> None:
    poem, hostile, qa, _ = review.queue.items
    review.decide(poem, "accept", reviewer="ana")
    review.decide(hostile, "reject", reviewer="ana")
    review.decide(qa, "edit", reviewer="ana", text="x")
    review.decide(hostile, "accept", reviewer="raj")
    assert ids(review) == ["qa/1"] and ids(review, "raj") == ["poem/0", "qa/0", "qa/1"]
    by_state = {state: ids(review, state=state) for state in ("open", "accept", "edit", "reject", "disputed")}
    assert by_state == {
        "open": ["qa/1"], "accept": ["poem/0"], "edit": ["qa/0"], "reject": [hostile.id], "disputed": [hostile.id],
    }  # fmt: skip
    assert ids(review, state="all") == [item.id for item in review.queue.items]
    assert (
        ids(review, state="all", domain="qa") == ["qa/0", "qa/1"] and ids(review, state="edit", domain="writing") == []
    )
    assert ids(review, state="all", text="CANBERRA") == ["qa/1"]  # answer
    assert ids(review, state="all", text="middlemarch") == ["qa/0"]  # prompt
    assert ids(review, state="all", text="../etc") == [hostile.id] and ids(review, state="all", text="nothing") == []
    assert review.decisions.progress("ana") == {"total": 4, "mine": 3, "settled": 2, "disputed": 1}
    assert review.decisions.progress("raj")["mine"] == 1


def test_agreement_is_of_what_counts_now(review: Review) -> None:
    poem, hostile, qa, _ = review.queue.items
    for item, ana, raj in [(poem, "accept", "accept"), (hostile, "reject", "accept"), (qa, "reject", "reject")]:
        review.decide(item, ana, reviewer="ana")  # type: ignore[arg-type]
        review.decide(item, raj, reviewer="raj")  # type: ignore[arg-type]
    (pair,) = review.decisions.agreements()
    assert (pair.rows, pair.kappa) == (3, pytest.approx(0.4))
    review.undo("raj")
    (pair,) = review.decisions.agreements()
    assert (pair.rows, pair.raw) == (2, 0.5)


def test_a_decision_about_another_text_does_not_count(review: Review) -> None:
    poem, _, qa, _ = review.queue.items
    review.decide(qa, "accept", reviewer="ana")
    review.decide(poem, "reject", reviewer="ana")
    rows = [json.loads(line) for line in review.queue.path.read_text().splitlines()]
    rows[0]["messages"][-1]["content"] = "Snow is cold."
    review.queue.path.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows[:3])))
    changed = load_queue(review.queue.path)
    decisions = Decisions(changed, review.log.records)
    assert decisions.stale == 1 and decisions.of(changed.by_id["poem/0"]) == {}
    assert decisions.of(changed.by_id["qa/0"])["ana"].action == "accept"  # found by its name, wherever it stands now
    last = decisions.last("ana")
    assert last is not None and last.row == "qa/0"
    assert load_decisions(changed.path) == {"qa/0": Decision(accepted=True, reviewer="ana")}


@pytest.mark.parametrize("text", [None, "", " \n", "x" * 1_000_001, "\ud800"])
def test_a_text_that_can_be_no_answer_is_refused(review: Review, text: str | None) -> None:
    with pytest.raises(UserError, match="text: "):
        review.decide(review.queue.items[0], "edit", reviewer="ana", text=text)
    assert review.log.records == []


@pytest.mark.parametrize("name", ["", "  ", "a\nb", "\u202eana", "x" * 61])
def test_a_name_nobody_could_read_is_refused(review: Review, name: str) -> None:
    with pytest.raises(UserError, match="a name has 1 to 60 printable characters"):
        review.decide(review.queue.items[0], "accept", reviewer=name)
    with pytest.raises(UserError, match="reviewer="):
        review.undo(name)


def test_undo_is_no_decision(review: Review) -> None:
    with pytest.raises(UserError, match="use accept, edit or reject"):
        review.decide(review.queue.items[0], "undo", reviewer="ana")


def test_no_queue_means_no_decisions_and_its_name_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.jsonl"):
        load_decisions(tmp_path / "none.jsonl")
