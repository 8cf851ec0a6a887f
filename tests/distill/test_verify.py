"""Answers -> findings: by rules, by reward functions, by nobody; and what fails is unknown, and only it."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distill.config import DistillConfig, ExpertConfig
from distill.types import Finding, Problem, Sample
from distill.verify import Answer, Verifier
from runtime.errors import UserError

REWARDS = """
import os, time

def longer_than_gold(completions, answer, **_):
    texts = [completion[0]["content"] for completion in completions]
    if "crash" in texts: os._exit(3)
    if "hang" in texts: time.sleep(60)
    if "raise" in texts: raise RuntimeError("no")
    return [None if text == "?" else len(text) / len(gold) for text, gold in zip(texts, answer)]

def level(completions, level, prompts, **_):
    return [float(value) for value in level]
"""


def answers(texts: list[str], *, gold: str = "42", reason: Any = "stop", **columns: Any) -> list[Answer]:
    prompt = [{"role": "user", "content": "?"}]
    about = dict(domain="d", prompt=prompt, answer=gold, columns=columns)
    return [
        Answer(
            Problem(id=str(i), position=i, **about),
            Sample(
                problem=i, kind="reasoning", index=0, text=text, tokens=1, finish_reason=reason, seed=0, teacher="t",
                error="refused" if reason == "error" else "",
            ),
        )
        for i, text in enumerate(texts)
    ]  # fmt: skip


@pytest.fixture
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    (tmp_path / "own_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    opened: list[Verifier] = []

    def judge(given: list[Answer], *, scorer: str | None = None, workers: int = 1, **expert: Any) -> list[Finding]:
        settings = ExpertConfig(**expert)
        policy: Any = "best" if scorer else "first"
        config = DistillConfig(experts=(settings,), scorer=scorer, policy=policy, workers=workers)
        opened.append(Verifier(config))
        found = opened[-1].submit(settings, given).result(60)
        assert list(found) == [answer.sample.key for answer in given]
        return list(found.values())

    yield judge
    for verifier in opened:
        verifier.close()


def outcomes(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.outcome, finding.reason) for finding in findings]


def test_maths_is_right_wrong_or_unknown_with_the_reason(judge) -> None:
    found = judge(answers(["<think>6 × 7</think>\\boxed{42}", "\\boxed{41}", ""]))
    assert [f.outcome for f in found] == ["right", "wrong", "wrong"] and found[0].answer == "42"
    assert outcomes(judge(answers(["\\boxed{42}"], gold=""))) == [("unknown", "gold-unparsable")]


def test_code_is_graded_by_its_tests(judge) -> None:
    tests = [{"input": "2 3\n", "output": "5\n"}]
    program = "```python\na, b = map(int, input().split())\nprint(a {} b)\n```"
    found = judge(answers([program.format("+"), program.format("-")], tests=tests), grader="code")
    if {f.reason for f in found} == {"sandbox-unavailable"}:
        pytest.skip("nothing here to isolate code with")
    assert outcomes(found) == [("right", "passed"), ("wrong", "wrong-output")]
    (untested,) = judge(answers([program]), grader="code")
    assert (untested.outcome, untested.reason) == ("unknown", "bad-row") and "tests" in untested.detail


def test_a_teachers_fault_is_unknown_and_says_why(judge) -> None:
    (found,) = judge(answers([""], reason="error"))
    assert (found.outcome, found.reason, found.detail) == ("unknown", "teacher-fault", "refused")
    assert found.complaints == ()


def test_what_people_are_to_judge_is_unknown_and_read_all_the_same(judge) -> None:
    found = judge(answers(["Well said.", "<think>never closed"]), grader="none")
    assert outcomes(found) == [("unknown", "not-graded")] * 2
    assert [list(f.complaints) for f in found] == [[], ["unclosed think"]]


def test_an_answer_that_was_cut_off_is_hard_to_read(judge) -> None:
    (found,) = judge(answers(["\\boxed{42}"], reason="length"))
    assert found.outcome == "right" and list(found.complaints) == ["cut off"]


def test_a_reward_function_is_right_at_one(judge) -> None:
    found = judge(answers(["ab", "a", "?", "abc"]), grader="own_rewards.longer_than_gold")
    assert [f.outcome for f in found] == ["right", "wrong", "unknown", "right"]
    assert found[1].detail == "0.5" and "None" in found[2].detail
    by_column = judge(answers(["a", "b"], level="1"), grader="own_rewards.level")
    assert [f.outcome for f in by_column] == ["right", "right"]


@pytest.mark.parametrize(("bad", "why"), [("crash", "exited (code 3)"), ("hang", "time limit 2 s"), ("raise", "no")])
def test_only_what_a_reward_function_fails_on_is_unknown(judge, bad, why) -> None:
    found = judge(answers(["ab", bad, "a"]), grader="own_rewards.longer_than_gold", time_limit=2.0)
    assert [f.outcome for f in found] == ["right", "unknown", "wrong"]
    assert found[1].reason == "grader-fault" and why in found[1].detail


def test_a_function_that_always_fails_is_given_up_on(judge) -> None:
    found = judge(answers(["raise"] * 12), grader="own_rewards.longer_than_gold")
    assert {f.outcome for f in found} == {"unknown"}
    assert sum("not tried" in f.detail for f in found) == 4


def test_a_scorer_scores_what_may_be_kept(judge) -> None:
    given = answers(["\\boxed{42}", "\\boxed{41}", "<think>\\boxed{42}", "so \\boxed{42}"])
    found = judge(given, scorer="own_rewards.longer_than_gold")
    assert [f.score for f in found] == [5.0, None, None, 6.5]
    (cut,) = judge(answers(["\\boxed{42}"], reason="length"), scorer="own_rewards.longer_than_gold")
    assert cut.outcome == "right" and cut.score is None


def test_a_reward_nobody_knows_is_refused_at_once() -> None:
    with pytest.raises(UserError, match=r"grader or scorer: .*did you mean 'accuracy'"):
        Verifier(DistillConfig(experts=(ExpertConfig(grader="acuracy"),)))


def children() -> set[int]:
    tasks = Path(f"/proc/{os.getpid()}/task").iterdir()
    return {int(pid) for task in tasks for pid in (task / "children").read_text().split()}


def test_workers_that_are_killed_are_replaced(monkeypatch) -> None:
    """From the first second of grading on, maths is graded in worker processes."""
    monkeypatch.setattr("rewards.rows.PAYS_AFTER", 0.0)
    expert, others = ExpertConfig(), children()
    verifier = Verifier(DistillConfig(experts=(expert,), workers=2))
    try:
        assert len(verifier.submit(expert, answers(["\\boxed{42}"] * 8)).result(60)) == 8
        workers = children() - others
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
        found = verifier.submit(expert, answers(["\\boxed{42}", "\\boxed{41}"] * 4)).result(60)
        assert workers and [f.outcome for f in found.values()] == ["right", "wrong"] * 4
    finally:
        verifier.close()
    assert children() <= others
