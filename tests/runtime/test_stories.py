"""The story task: every answer recomputed from the English alone, splits disjoint, formats exact."""

import re
from itertools import pairwise

import pytest

from runtime.stories import CHANGES, NAMES, THINGS, stories, story


def reread(question: str) -> list[int]:
    """The running totals, read from the question by other rules than those that wrote it."""
    first, *events, ask = re.findall(r"[^.?]+[.?]", question)
    name, total = re.fullmatch(r"(\w+) has (\d+) \w+\.", first).groups()  # type: ignore[union-attr]
    assert ask.strip().endswith(f"does {name} have?")
    totals = [int(total)]
    for event in map(str.strip, events):
        (k,) = map(int, re.findall(r"\d+", event))
        subject, verb = event.split()[:2]
        gains = verb in ("finds", "buys") or (verb == "gives" and subject != name)
        totals.append(totals[-1] + (k if gains else -k))
    return totals


def test_every_answer_follows_from_the_question() -> None:
    for index in range(2000):
        s = story(7, index)
        totals = reread(s.question)
        assert len(totals) == 4
        assert s.answer == str(totals[-1])
        assert 4 <= totals[0] <= 20
        assert all(2 <= total <= 30 for total in totals)
        assert all(2 <= abs(b - a) <= 9 for a, b in pairwise(totals))


def test_worked_shows_each_step_and_direct_none() -> None:
    for index in range(300):
        s = story(1, index)
        totals = reread(s.question)
        lines = [f"{a}+{b - a}={b}" if b > a else f"{a}-{a - b}={b}" for a, b in pairwise(totals)]
        assert s.worked == "<think>" + "\n".join(lines) + "</think>\\boxed{" + s.answer + "}"
        assert s.direct == "<think></think>\\boxed{" + s.answer + "}"


def test_a_story_is_pinned() -> None:
    # A change here changes everybody's data: numbers measured before can't be compared with numbers after.
    assert (
        story(0, 0).question
        == "Kai has 10 cups. Kai sells 3. Kai buys 9 more. Kai buys 9 more. How many cups does Kai have?"
    )
    assert story(0, 0) == story(0, 0) != story(0, 1)


def test_all_names_things_and_changes_occur_about_equally() -> None:
    questions = [story(3, i).question for i in range(3000)]
    for words in (NAMES, THINGS):
        counts = [sum(f"{word} " in q for q in questions) for word in words]
        assert min(counts) > 0.75 * max(counts)
    text = " ".join(questions)
    phrases = (r"gives \w+ \d", r"finds \d more", r"buys \d more", r"gives \d to", r"loses \d", r"sells \d")
    counts = [len(re.findall(phrase, text)) for phrase in phrases]
    for signed in (counts[:3], counts[3:]):  # gains are commoner: stories start low in the range
        assert min(signed) > 0.85 * max(signed)
    assert {int(k) for k in re.findall(r"(?:loses|sells|finds|buys) (\d)", text)} == {abs(k) for k in CHANGES}


def test_splits_are_disjoint_across_seeds_and_distinct_within() -> None:
    train = {r["prompt"][0]["content"] for seed in (0, 1) for r in stories(1500, split="train", seed=seed)}
    held_out = {r["prompt"][0]["content"] for seed in (0, 1, 2) for r in stories(200, split="heldout", seed=seed)}
    assert not train & held_out
    assert len(train) == 3000 and len(held_out) == 600


def test_about_one_in_ten_is_held_out() -> None:
    assert 0.08 < sum(story(5, i).held_out for i in range(3000)) / 3000 < 0.12


def test_more_rows_only_append() -> None:
    assert stories(50, split="heldout", seed=4)[:20] == stories(20, split="heldout", seed=4)


def test_rows_are_conversational() -> None:
    (row,) = stories(1, split="train", seed=0)
    assert set(row) == {"prompt", "answer", "worked", "direct"}
    assert [m["role"] for m in row["prompt"]] == ["user"]
    with pytest.raises(ValueError, match="split='test'"):
        stories(1, split="test", seed=0)  # type: ignore[arg-type]
