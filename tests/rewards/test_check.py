"""`python -m rewards check`: a miss is a miss, with its line; budgets close; everybody's own rewards can be checked."""

import json
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rewards.check import (
    GOLDEN,
    KINDS,
    Suite,
    golden_suite,
    grader_of,
    hostile_suite,
    judge_suite,
    metamorphic_suite,
    read_case,
    suites,
)
from rewards.verdict import Verdict

ROOT = Path(__file__).parents[2]


def case(want: Any = 1, kind: str = "right", response: str = "abc", **columns: Any) -> str:
    return json.dumps({"why": f"{kind} one", "want": want, "kind": kind, "response": response, **columns})


def one_of_each(*left_out: str, **columns: Any) -> list[str]:
    """Cases of a reward that is 1 for short responses; of all kinds but those left out."""
    return [case(kind=kind, **columns) for kind in KINDS if kind not in left_out]


def brevity(columns: Mapping[str, Any]) -> float:
    return 1.0 if len(columns["response"]) < 5 else 0.0


def run(tmp_path: Path, lines: list[str], grader: Any = brevity, budget_ms: float = 1000.0) -> Suite:
    (tmp_path / "brevity.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return golden_suite(tmp_path / "brevity.jsonl", grader, budget_ms=budget_ms)


def misses(suite: Suite) -> list[tuple[str, str, str]]:
    return [(miss.where.rpartition("/")[2], miss.want, miss.got) for miss in suite.misses]


def test_cases_that_come_out_as_wanted_are_no_misses(tmp_path: Path) -> None:
    suite = run(tmp_path, [*one_of_each("bad-gold"), "", case(0, response="a" * 9), case("wrong", response="a" * 9)])
    assert (suite.name, suite.cases, suite.misses) == ("golden/brevity", 7, [])


@pytest.mark.parametrize(
    ("want", "given", "missed"),
    [
        ("right", 1.0, False),
        ("right", 0.0, True),
        ("right", None, True),
        ("wrong", 0.0, False),
        ("wrong", None, True),
        ("unknown", None, False),
        ("unknown", 0.0, True),
        (0.25, 0.25, False),
        (0.3, 0.1 + 0.2, False),
        (0.25, 0.26, True),
        (0.25, None, True),
        ("right", Verdict(outcome="right", reason="equal/string"), False),
        ("wrong", Verdict(outcome="unknown", reason="gold-unparsable"), True),
        ("right", "1.0", True),
    ],
)
def test_what_is_wanted_is_an_outcome_or_a_number(tmp_path: Path, want: Any, given: Any, missed: bool) -> None:
    suite = run(tmp_path, [case(want, kind) for kind in KINDS], lambda columns: given)
    assert len(suite.misses) == (len(KINDS) if missed else 0)


def test_a_miss_says_where_what_and_why(tmp_path: Path) -> None:
    verdict = Verdict(outcome="wrong", reason="no-answer")
    suite = run(tmp_path, ["", case("right")], lambda columns: verdict)
    assert (
        str(suite.misses[-1]) == f"{tmp_path}/brevity.jsonl:2: right: right one\n  wanted right, got wrong (no-answer)"
    )


def test_a_reward_that_raises_is_a_miss_and_the_rest_goes_on(tmp_path: Path) -> None:
    def grade(columns: Mapping[str, Any]) -> float:
        if columns["response"] == "bad":
            raise ValueError("\x1b[2J")
        return 1.0

    suite = run(tmp_path, [case(response="bad"), *one_of_each("bad-gold")], grade)
    assert (suite.cases, misses(suite)) == (6, [("brevity.jsonl:1", "1", r"ValueError: \x1b[2J")])


def test_every_kind_is_asked_for_and_a_bad_gold_where_there_are_golds(tmp_path: Path) -> None:
    assert run(tmp_path, one_of_each("bad-gold")).misses == []
    assert [m.why for m in run(tmp_path, one_of_each("bad-gold", answer="1")).misses] == ["cases of kind 'bad-gold'"]
    missing = run(tmp_path, one_of_each("truncated", "adversarial", "bad-gold")).misses
    assert [m.why for m in missing] == ["cases of kind 'truncated'", "cases of kind 'adversarial'"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("nonsense", "not JSON"),
        ('{"why": "x", "want": 1, "response": ""}', "kind is missing"),
        (case(kind="rihgt"), "kind='rihgt'"),
        (case(want="rihgt"), "want='rihgt'"),
        (case(want=True), "want=True"),
        ('{"kind": "right", "want": 1, "response": ""}', "why is missing"),
    ],
)
def test_a_case_that_cannot_be_read_is_a_miss(tmp_path: Path, line: str, says: str) -> None:
    suite = run(tmp_path, [*one_of_each("bad-gold"), line])
    assert suite.cases == 5
    assert [miss.where.rpartition(":")[2] for miss in suite.misses] == ["6"]
    assert says in suite.misses[0].got


def test_a_slow_reward_misses_its_budget_even_if_it_remembers(tmp_path: Path) -> None:
    seen = set()

    def grade(columns: Mapping[str, Any]) -> float:
        if columns["response"] not in seen:
            time.sleep(0.02)
        seen.add(columns["response"])
        return 1.0

    lines = [case(kind=kind, response=kind) for kind in KINDS]
    assert [m.why for m in run(tmp_path, lines, grade, budget_ms=10.0).misses] == ["p99 latency"]
    seen.clear()
    assert run(tmp_path, lines, grade, budget_ms=10_000.0).misses == []


def test_percentiles_are_those_of_the_cases() -> None:
    suite = Suite(name="s", cases=100, seconds=1.0, misses=[], ms=[float(ms) for ms in range(100, 0, -1)])
    assert (suite.percentile(0.5), suite.percentile(0.99)) == (51.0, 100.0)
    assert Suite(name="s", cases=0, seconds=0.0, misses=[]).percentile(0.5) is None


def test_a_reward_gets_its_columns_as_trl_gives_them() -> None:
    sys.modules["seen_columns"] = module = type(sys)("seen_columns")

    def reward(**columns: Any) -> list[None]:
        module.columns = columns  # type: ignore[attr-defined]
        return [None]

    module.reward = reward  # type: ignore[attr-defined]
    grade = grader_of("seen_columns.reward")
    assert grade({"response": "a", "prompt": "p", "answer": "1", "completion_ids": [5, 6]}) is None
    assert module.columns == {"prompts": ["p"], "completions": ["a"], "answer": ["1"], "completion_ids": [[5, 6]]}
    del sys.modules["seen_columns"]


def test_golden_files_are_complete_and_right() -> None:
    """The quick part of the night: every golden case, one rewording and one fault of every maths gold."""
    done = subprocess.run(
        [sys.executable, "-m", "rewards", "check", "--quick"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ran = {line.split()[0] for line in done.stdout.splitlines()[1:] if line}
    golden = {f"golden/{path.stem}" for path in GOLDEN.glob("*.jsonl")} - {"golden/judge"}
    assert golden | {"metamorphic/math", "canaries/judge", "hostile/code"} <= ran


def test_a_suite_that_breaks_is_a_miss_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "nobodys.jsonl").write_text("\n".join(one_of_each()))
    (tmp_path / "math.jsonl").write_text(case("wrong", gold="1", response="2"))
    monkeypatch.setattr("rewards.check.GOLDEN", tmp_path)
    monkeypatch.setattr("rewards.sandbox.hostile.programs", lambda: 1 / 0)
    ran = {suite.name: suite for suite in suites(quick=True)}
    assert "reward 'nobodys' is unknown" in ran["golden/nobodys"].misses[0].got
    assert ran["metamorphic/math"].cases > 1
    assert ran["golden/math"].cases == 1 and ran["canaries/judge"].cases > 10
    assert ran["hostile/code"].misses[0].got == "ZeroDivisionError: division by zero"
    assert "ValueError" in capsys.readouterr().err


def test_a_program_that_is_not_contained_is_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    program = {"number": 7, "name": "stop", "reasons": ["time-limit"], "code": "print(42)"}
    monkeypatch.setattr("rewards.sandbox.hostile.programs", lambda: [program, {**program, "reasons": ["passed"]}])
    suite = hostile_suite()
    if suite.misses and suite.misses[0].why == "not run":
        pytest.skip("no isolation for code on this machine: python -m rewards doctor")
    assert [miss.why for miss in suite.misses] == ["7, stop"]
    assert suite.misses[0].got == "its verdict is passed, not time-limit"


def test_metamorphic_cases_are_more_with_all_rules(tmp_path: Path) -> None:
    golden = tmp_path / "math.jsonl"
    golden.write_text(json.dumps({"why": "half", "want": "right", "kind": "right", "gold": "1/2", "response": "0.5"}))
    few, all_ = metamorphic_suite(golden, rules=1), metamorphic_suite(golden, rules=None)
    assert few.misses == all_.misses == []
    assert 2 <= few.cases < all_.cases


def test_the_judges_canaries_are_refused_without_a_judge() -> None:
    suite = judge_suite()
    assert suite.cases > 10
    assert suite.misses == []


def test_cases_of_the_golden_files_name_what_they_want() -> None:
    lines = (GOLDEN / "math.jsonl").read_bytes().splitlines()
    assert len({json.dumps(read_case(line), sort_keys=True) for line in lines}) == len(lines)


@pytest.fixture
def own_reward(tmp_path: Path) -> Path:
    """Somebody's folder with a reward and its golden file."""
    (tmp_path / "my_rewards.py").write_text(
        textwrap.dedent("""\
            def brevity(completions, **columns):
                return [1.0 if len(completion) < 5 else 0.0 for completion in completions]
            """)
    )
    (tmp_path / "brevity.jsonl").write_text("\n".join(one_of_each("bad-gold")))
    return tmp_path


def check(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command, path = [sys.executable, "-m", "rewards", "check", *arguments], {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, env=path)


def test_ones_own_reward_is_checked_from_ones_own_folder(own_reward: Path) -> None:
    done = check(own_reward, "--reward", "my_rewards.brevity", "--golden", "brevity.jsonl")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("\n0 misses in 5 cases\n")


def test_a_miss_of_ones_own_reward_is_printed_and_the_exit_code_is_1(own_reward: Path) -> None:
    with (own_reward / "brevity.jsonl").open("a") as golden:
        golden.write("\n" + case(1, response="much too long"))
    done = check(own_reward, "--reward", "my_rewards:brevity", "--golden", "brevity.jsonl")
    assert done.returncode == 1
    assert "brevity.jsonl:6: right: right one\n  wanted 1, got 0.0\n\n1 misses in 6 cases\n" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--reward", "my_rewards.brevety", "--golden", "brevity.jsonl"], "did you mean 'brevity'?"),
        (["--reward", "my_rewards.brevity", "--golden", "gone.jsonl"], "--golden gone.jsonl: no such file"),
        (["--reward", "my_rewards.brevity"], "no such file; give the JSONL file of the cases"),
        (["--golden", "brevity.jsonl"], "say with --reward whose it is"),
    ],
)
def test_what_cannot_be_checked_is_said_with_exit_code_2(own_reward: Path, arguments: list[str], says: str) -> None:
    done = check(own_reward, *arguments)
    assert done.returncode == 2
    assert says in done.stderr and done.stdout == ""
