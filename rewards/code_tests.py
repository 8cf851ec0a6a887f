"""A completion and tests -> whether its program passes them, run in the jail of rewards/sandbox/.

Expected values stay out of the process that runs the program. A test is one of

    {"input": "2 3\\n", "output": "5\\n"}                  standard input and output
    {"call": "add", "args": [2, 3], "output": 5}         by JSON's exact types; also "kwargs"; "Solution.add" works
    {"assert": "assert add(2, 3) == 5"}                  by Python's ==, as MBPP has them
    {"assert": "def check(candidate): …", "entry_point": "add"}   as HumanEval has them

Each gets a fresh process, with the standard library and nothing else. Left out: functions that must change their
arguments in place, and test code that needs more of the program than to call its functions.
"""

import ast
import builtins
import logging
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from rewards.completions import after_thinking, text_of
from rewards.sandbox.backend import Backend, Finished, SandboxFault, SandboxUnavailable
from rewards.sandbox.doctor import remedy
from rewards.sandbox.judge import same_output, same_value
from rewards.sandbox.limits import Limits
from rewards.sandbox.local import default_sandbox
from rewards.sandbox.values import NotPlainError, encode
from rewards.verdict import Verdict

FENCE = "```"
PYTHON = ("python", "python3", "py")
PASSED = "passed"
PARALLEL_ROWS = os.cpu_count() or 1
LOG = logging.getLogger(__name__)


def code_reward(
    completions: Sequence[str | Sequence[Mapping[str, str]]],
    tests: Sequence[Sequence[Mapping[str, Any]]],
    starter: Sequence[str] | None = None,
    partial: bool = False,
    sandbox: Backend | None = None,
    **_: Any,
) -> list[float | None]:
    """1.0 where a completion's program passes all tests of its row, else 0.0; None where nobody can say.

    TRL's signature; `tests` and `starter` are columns. `partial` gives the share of tests passed instead.
    """

    def score(row: int) -> float | None:
        verdict = grade_code(
            text_of(completions[row]),
            tests[row],
            sandbox=sandbox,
            starter=starter[row] if starter else "",
            all_tests=partial,
        )
        return (verdict.passed or 0) / verdict.total if partial and verdict.total else verdict.score

    with ThreadPoolExecutor(PARALLEL_ROWS) as pool:
        return list(pool.map(score, range(len(completions))))


def grade_code(
    response: str,
    tests: Sequence[Mapping[str, Any]],
    *,
    limits: Limits | None = None,
    sandbox: Backend | None = None,
    starter: str = "",
    all_tests: bool = False,
) -> Verdict:
    """Right if the last Python block of a response passes every test.

    `starter` is put before the program, such as HumanEval's prompt: the response may be a whole program or go
    on from there. Stops at the first failure unless `all_tests`. Reasons: `passed`, `wrong-output`,
    `runtime-error`, `time-limit`, `memory-limit`, `output-limit`, `no-answer`, `hack/…`; of an unknown outcome
    `tests-unusable`, `sandbox-fault`, `sandbox-unavailable`, `sandbox-outage` (the log says more).
    """
    began = time.perf_counter()
    total = len(tests)
    verdict = Verdict(outcome="wrong", reason="no-answer", passed=0, total=total)
    program = program_of(response)
    try:
        cases = [read_test(test) for test in tests]
        if not cases:
            raise ValueError("tests=[]: give at least one")
        if program is not None:
            whole = f"{starter}\n{program}" if starter else program
            whole = f"{starter}\n{program}" if starter else program
            verdict = _grade(whole, cases, limits or Limits(), sandbox or default_sandbox(), all_tests)
    except ValueError as error:
        LOG.warning("tests unusable: %s", error)
        verdict = Verdict(outcome="unknown", reason="tests-unusable", total=total)
    except SandboxFault as fault:
        advice = f"; {remedy(fault.layer)}" if isinstance(fault, SandboxUnavailable) else ""
        LOG.warning("%s: %s%s", fault.reason, fault, advice)
        verdict = Verdict(outcome="unknown", reason=fault.reason, total=total)
    return replace(verdict, answer=program, ms=1000 * (time.perf_counter() - began))


def _grade(program: str, cases: list["Test"], limits: Limits, backend: Backend, all_tests: bool) -> Verdict:
    reasons = []
    for case in cases:
        reasons.append(case.reason(backend, program, limits))
        if reasons[-1] != PASSED and not all_tests:
            break
    passed = reasons.count(PASSED)
    failure = next((reason for reason in reasons if reason != PASSED), None)
    return Verdict(outcome="wrong" if failure else "right", reason=failure or PASSED, passed=passed, total=len(cases))


def program_of(response: str) -> str | None:
    """The last complete Python block of what follows the thinking; all of that if there are no fences at all.

    A fence without a language counts if none names Python. None if there is no program.
    """
    text = after_thinking(response)
    if text is None:
        return None
    if FENCE not in text:
        return text if text.strip() else None
    blocks: dict[bool, str] = {}  # whether it is named Python -> the last such block
    language: str | None = None
    block: list[str] = []
    for line in text.split("\n"):
        mark = line.strip()
        if language is None:
            if mark.startswith(FENCE):
                language, block = mark.strip("`").strip().lower(), []
        elif mark == FENCE:
            if language in ("", *PYTHON):
                blocks[language != ""] = "\n".join(block)
            language = None
        else:
            block.append(line)
    return blocks.get(True, blocks.get(False))


@dataclass(frozen=True, kw_only=True)
class StreamTest:
    """Standard input and the whole standard output."""

    input: str
    output: str

    def reason(self, backend: Backend, program: str, limits: Limits) -> str:
        finished = backend.run(program, self.input, limits)
        return _judged(finished, finished.status == "ok" and same_output(self.output, finished.stdout))


@dataclass(frozen=True, kw_only=True)
class CallTest:
    """One call and its result."""

    function: str
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    output: Any
    """As rewards/sandbox/values.py encodes it."""
    exact: bool
    """By JSON's types; else by Python's `==`."""

    def reason(self, backend: Backend, program: str, limits: Limits) -> str:
        finished = backend.call(program, self.function, self.args, self.kwargs, limits)
        return _judged(finished, finished.status == "ok" and same_value(self.output, finished.value, exact=self.exact))


@dataclass(frozen=True, kw_only=True)
class CheckTest:
    """Test code, run apart from the program."""

    source: str
    names: Sequence[str]
    """Functions it calls that it doesn't define."""
    entry_point: str | None

    def reason(self, backend: Backend, program: str, limits: Limits) -> str:
        finished = backend.check(program, self.source, self.names, self.entry_point, limits)
        if finished.status == "bad-check":
            raise ValueError(f"assert={self.source[:100]!r}: {finished.detail}")
        return _judged(finished, finished.status == "ok")


Test = StreamTest | CallTest | CheckTest


def _judged(finished: Finished, passes: bool) -> str:
    if passes:
        return PASSED
    return "wrong-output" if finished.status in ("ok", "no-result", "failed-check") else finished.status


def read_test(test: Mapping[str, Any]) -> Test:
    """One test of a row; fields that are None count as absent, as a table of mixed tests has them.

    Raises ValueError with what is wrong with it.
    """
    given = {name: value for name, value in test.items() if value is not None}
    names = set(given)
    if names == {"input", "output"} and isinstance(test["input"], str) and isinstance(test["output"], str):
        return StreamTest(input=test["input"], output=test["output"])
    if "assert" in names and names <= {"assert", "entry_point"} and all(isinstance(v, str) for v in given.values()):
        return _read_assert(given["assert"], given.get("entry_point"))
    args, kwargs = given.get("args", []), given.get("kwargs", {})
    if "call" in names <= {"call", "args", "kwargs", "output"} and "output" in test:
        if isinstance(given["call"], str) and isinstance(args, list) and isinstance(kwargs, Mapping):
            try:
                expected = encode(test["output"])
                encode([args, dict(kwargs)])
            except NotPlainError as error:
                raise ValueError(f"test of {given['call']!r}: {error} is no JSON") from error
            return CallTest(function=given["call"], args=args, kwargs=kwargs, output=expected, exact=True)
    raise ValueError(
        f"test={str(test)[:100]!r}: give text input and output, an assert (and entry_point), or call, args and output"
    )


def _read_assert(source: str, entry_point: str | None) -> Test:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"assert={source[:100]!r}: {error}") from error
    return _plain_call(tree) or CheckTest(source=source, names=_free_names(tree), entry_point=entry_point)


def _plain_call(tree: ast.Module) -> CallTest | None:
    """Of `assert f(literals) == literal` and nothing else."""
    match tree.body:
        case [
            ast.Assert(
                test=ast.Compare(
                    left=ast.Call(func=ast.Name(id=function), args=args, keywords=keywords),
                    ops=[ast.Eq()],
                    comparators=[expected],
                )
            )
        ] if not hasattr(builtins, function) and all(word.arg for word in keywords):
            try:
                return CallTest(
                    function=function,
                    args=[ast.literal_eval(arg) for arg in args],
                    kwargs={str(word.arg): ast.literal_eval(word.value) for word in keywords},
                    output=encode(ast.literal_eval(expected)),
                    exact=False,
                )
            except (ValueError, TypeError, NotPlainError):
                return None
    return None


def _free_names(tree: ast.Module) -> list[str]:
    """Names that test code uses and neither defines nor finds among the built-in ones."""
    used, bound = set(), set(dir(builtins))
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Load()):
                used.add(name)
            case ast.Name(id=name) | ast.arg(arg=name) | ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                bound.add(name)
            case ast.ExceptHandler(name=str(name)):
                bound.add(name)
            case ast.alias(name=name, asname=short):
                bound.add(short or name.partition(".")[0])
    return sorted(used - bound)
