"""Completions and tests through the real jail: every kind of test, what counts as the program, HumanEval."""

import ast
import copy
import json
import logging
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from rewards.code_tests import code_reward, grade_code, program_of
from rewards.sandbox.limits import Limits

ROOT = Path(__file__).parents[2]
HUMANEVAL = ROOT.parent / "shared" / "data" / "humaneval" / "HumanEval.jsonl"
GOLDEN = [json.loads(line) for line in (ROOT / "rewards/golden/code.jsonl").read_text().splitlines()]
ADD = "```python\ndef add(a, b):\n    return a + b\n```"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the jail needs Linux")


@pytest.mark.parametrize("case", GOLDEN, ids=[case["why"] for case in GOLDEN])
def test_golden(case: dict[str, Any]) -> None:
    assert grade_code(case["response"], case["tests"]).outcome == case["want"]


def grade(code: str, *tests: dict[str, Any], **options: Any) -> str:
    return grade_code(f"```python\n{code}\n```", tests, **options).reason


def test_the_reason_says_what_happened() -> None:
    stream = {"input": "", "output": "1"}
    assert grade("print(1)", stream) == "passed"
    assert grade("print(2)", stream) == "wrong-output"
    assert grade("1 / 0", stream) == "runtime-error"
    assert grade("import sys; print(1); sys.exit(3)", stream) == "runtime-error"
    assert grade("x = ['x' * 10**6 for _ in range(10**6)]", stream, limits=Limits(memory_mb=128)) == "memory-limit"
    assert grade("while True: pass", stream, limits=Limits(wall_seconds=0.3)) == "time-limit"
    assert grade("print('x' * 10**6)", stream, limits=Limits(output_bytes=1000)) == "output-limit"
    assert grade_code("", [stream]).reason == "no-answer"
    assert grade_code(ADD, []).reason == "tests-unusable"


def test_a_verdict_counts_tests() -> None:
    tests = [{"assert": f"assert add(1, {i}) == 3"} for i in (1, 2, 3)]
    stopped = grade_code(ADD, tests)
    assert (stopped.outcome, stopped.passed, stopped.total) == ("wrong", 0, 3)
    every = grade_code(ADD, tests, all_tests=True)
    assert (every.outcome, every.passed, every.total) == ("wrong", 1, 3)
    assert every.answer == "def add(a, b):\n    return a + b" and every.ms > 0


def test_reward_has_trl_signature() -> None:
    tests = [{"assert": "assert add(1, 2) == 3"}, {"assert": "assert add(1, 2) == 4"}]
    message = [{"role": "assistant", "content": ADD}]
    columns: dict[str, Any] = dict(prompts=["p"] * 3, completion_ids=[[1]] * 3, tests=[tests[:1], tests, []])
    assert code_reward(completions=[ADD, message, ADD], **columns) == [1.0, 0.0, None]
    assert code_reward(completions=[ADD, message, ADD], partial=True, **columns) == [1.0, 0.5, None]


def test_program_is_the_last_complete_python_block() -> None:
    assert program_of("```python\na\n```\n```py\nb\n```\n```python\nc") == "b"
    assert program_of("```\na\n```\n```bash\nb\n```") == "a"
    assert program_of("```\na\n```\n```python\nb\n```\n```\nc\n```") == "b"
    assert program_of("```bash\nb\n```") is None
    assert program_of("<think>```python\na\n```") is None
    assert program_of("    return 1") == "    return 1"
    assert program_of("```python\nprint('```')\n```") == "print('```')"


def test_a_starter_serves_a_continuation_and_a_whole_program() -> None:
    starter = "from math import sqrt\n\ndef root(x):\n    '''Square root.'''\n"
    test = {"assert": "assert root(4) == 2"}
    assert grade("    return sqrt(x)", test, starter=starter) == "passed"
    assert grade("def root(x):\n    return sqrt(x)", test, starter=starter) == "passed"
    assert grade("    return x", test, starter=starter) == "wrong-output"


def test_asserts_compare_as_python_does_and_calls_by_json_type() -> None:
    identity = "def f(x):\n    return eval(x)"
    for text, equal in [("1.0", "1"), ("True", "1"), ("{1: (2,)}", "{1.0: (2,)}"), ("{3, 1}", "{1, 3}")]:
        assert grade(identity, {"assert": f"assert f({text!r}) == {equal}"}) == "passed", text
    for text, other in [("(1,)", "[1]"), ("'1'", "1"), ("float('nan')", "1"), ("{1: 2}", "{1: 3}"), ("b'a'", "'a'")]:
        assert grade(identity, {"assert": f"assert f({text!r}) == {other}"}) == "wrong-output", text
    for text, same in [("{'a': [1, None]}", {"a": [1, None]}), ("(1.5, 'x')", [1.5, "x"]), ("None", None)]:
        assert grade(identity, {"call": "f", "args": [text], "output": same}) == "passed", text
    for text, unlike in [("1.0", 1), ("True", 1), ("0", False), ("{1: 2}", {"1": 2}), ("{1}", [1])]:
        assert grade(identity, {"call": "f", "args": [text], "output": unlike}) == "wrong-output", text


def test_checks_may_compute_and_expect_exceptions() -> None:
    assert grade("def f(x): return 1 / x", {"assert": "import math\nassert math.isclose(f(3), 1 / 3)"}) == "passed"
    raises = "try:\n    f(0)\nexcept ZeroDivisionError:\n    pass\nelse:\n    assert False"
    assert grade("def f(x): return 1 / x", {"assert": raises}) == "passed"
    assert grade("def f(x): return 0", {"assert": raises}) == "wrong-output"
    assert grade("def f(x): yield from range(x)", {"assert": "assert list(f(3)) == [0, 1, 2]"}) == "passed"
    assert grade("def f(**k): return k", {"assert": "assert f(a=1)['a'] == 1"}) == "passed"
    assert grade("def f(x): return x", {"assert": "assert f(1)[0] == 1"}) == "runtime-error"


@pytest.mark.parametrize(
    "test",
    [
        {},
        {"input": "1"},
        {"input": 1, "output": "1"},
        {"input": "1", "output": "1", "x": 1},
        {"assert": "assert add(1"},
        {"assert": "x", "entry_point": 3},
        {"call": "add", "args": [1]},
        {"call": "add", "args": 1, "output": 1},
        {"call": "add", "args": [object()], "output": 1},
        {"assert": "assert add(1, 1) == 2", "input": "1"},
    ],
)
def test_a_malformed_test_is_unknown_and_logged(test: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        verdict = grade_code(ADD, [{"assert": "assert add(1, 1) == 2"}, test])
    assert (verdict.outcome, verdict.reason, verdict.score) == ("unknown", "tests-unusable", None)
    assert "tests unusable" in caplog.text


def test_expected_values_stay_out_of_the_jail() -> None:
    """A program that searches all it can reach, frames and objects, finds no trace of the test that calls it."""
    code = """
import gc, re, sys
def find():
    frame, reached = sys._getframe(), [t for t in gc.get_objects() if isinstance(t, (list, dict, tuple))]
    while frame := frame.f_back:
        reached += [frame.f_locals, frame.f_globals]
    found = re.search("4711[0-9]{4}", repr(reached))
    return found and found[0]
found = find()
if __name__ == "__main__":
    print(found)
"""
    expected = "47110815"
    check = f"hidden = '{expected}'\ndef check(candidate):\n    assert candidate() == hidden"
    assert grade(code, {"assert": check, "entry_point": "find"}) == "wrong-output"
    assert grade(code, {"assert": f"assert find() == {expected!r}"}) == "wrong-output"
    assert grade(code, {"call": "find", "output": expected}) == "wrong-output"
    assert grade(code, {"input": "", "output": expected}) == "wrong-output"
    assert grade(code, {"input": "", "output": "None"}) == "passed"  # it did search


def humaneval() -> list[dict[str, Any]]:
    if not HUMANEVAL.exists():
        pytest.skip("HumanEval is not at ../shared/data/humaneval/HumanEval.jsonl")
    return [json.loads(line) for line in HUMANEVAL.read_text().splitlines()]


def solve(row: dict[str, Any], solution: str, **options: Any) -> str:
    tests = [{"assert": row["test"], "entry_point": row["entry_point"]}]
    return grade_code(f"```python\n{solution}\n```", tests, starter=row["prompt"], **options).reason


def test_all_of_humaneval_is_right() -> None:
    rows = humaneval()
    with ThreadPoolExecutor(2) as pool:
        reasons = list(pool.map(lambda row: solve(row, row["canonical_solution"]), rows))
    assert len(rows) == 164
    assert [row["task_id"] for row, reason in zip(rows, reasons, strict=True) if reason != "passed"] == []


def mutants(source: str) -> Iterator[str]:
    """The program with one comparison flipped, one operator swapped, one number moved, or one result dropped."""
    tree = ast.parse(source)
    swaps: dict[type, ast.AST] = {
        ast.Lt: ast.LtE(), ast.LtE: ast.Lt(), ast.Gt: ast.GtE(), ast.GtE: ast.Gt(), ast.Eq: ast.NotEq(),
        ast.NotEq: ast.Eq(), ast.In: ast.NotIn(), ast.Add: ast.Sub(), ast.Sub: ast.Add(), ast.Mult: ast.Add(),
        ast.Mod: ast.Mult(), ast.FloorDiv: ast.Mult(), ast.Div: ast.Mult(), ast.And: ast.Or(), ast.Or: ast.And(),
    }  # fmt: skip
    for index in range(len(list(ast.walk(tree)))):
        changed = copy.deepcopy(tree)
        match list(ast.walk(changed))[index]:
            case ast.Compare(ops=ops) as node if type(ops[0]) in swaps:
                node.ops[0] = swaps[type(ops[0])]  # type: ignore[call-overload]
            case ast.BinOp(op=op) | ast.BoolOp(op=op) as node if type(op) in swaps:
                node.op = swaps[type(op)]  # type: ignore[assignment]
            case ast.Constant(value=int(value)) as node:
                node.value = value + 1
            case ast.Return() as node:
                node.value = ast.Constant(value=None)
            case _:
                continue
        yield ast.unparse(changed)


def test_a_mutant_of_every_humaneval_solution_is_wrong() -> None:
    rows = humaneval()
    limits = Limits(wall_seconds=1.5, cpu_seconds=1)

    def first_wrong(row: dict[str, Any]) -> str | None:
        whole = mutants(row["prompt"] + row["canonical_solution"])
        return next((reason for m in whole if (reason := solve(row, m, limits=limits)) != "passed"), None)

    with ThreadPoolExecutor(2) as pool:
        reasons = list(pool.map(first_wrong, rows))
    assert [row["task_id"] for row, reason in zip(rows, reasons, strict=True) if reason is None] == []
    assert {reason.partition("/")[0] for reason in reasons if reason} <= {"wrong-output", "runtime-error", "time-limit"}
