"""Golden, metamorphic and hostile suites -> a table and every miss: `python -m rewards check`.

A golden file is JSONL, one case a line: `why`, `want` ("right", "wrong", "unknown" or a score), `kind`, and the
reward's own columns (`response`, `gold`, ...). It must hold every kind of `KINDS`; a bad gold only where some case
has a gold. A file's name is its reward's: `math`, `code`, or one that `rewards.resolve` knows.
Left out: what the suites hold (rewards/golden/, rewards/maths/metamorphic.py, rewards/sandbox/hostile.toml), and judges
that are models: judge.jsonl is read here only as far as no model is needed (rewards/model_based/judge.py: canaries).
"""

import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rewards.rows import parse_row, read_lines, shown
from rewards.verdict import Verdict

GOLDEN = Path(__file__).parent / "golden"
KINDS = ("right", "wrong", "reworded", "truncated", "adversarial", "bad-gold")
WANT: dict[str, float | None] = {"right": 1.0, "wrong": 0.0, "unknown": None}
GOLDS = ("gold", "answer", "tests")
"""Columns that can be bad."""
BUDGET_MS = {"math": 50.0, "code": 500.0}
"""Milliseconds that 99 of 100 golden cases of a reward must stay under; others have `OTHERS_MS`."""
OTHERS_MS = 20.0
QUICK_SLACK = 4.0
"""Times the budget that a quick check allows: it runs beside other work."""
TAKES_A_JUDGE = ("asks for a mark in words no rule knows", "claims that an authority has checked it")
"""Injections of judge.jsonl that no rule sees, by their `why`; like wrong answers, they are for a model."""
TOLERANCE = 1e-9
"""Of a score: golden files write decimals."""

Case = tuple[str, Mapping[str, Any]]
"""Where it stands, and its columns."""
Score = Verdict | float | None
Grader = Callable[[Mapping[str, Any]], Score]


@dataclass(frozen=True, kw_only=True)
class Miss:
    """A case that came out otherwise than wanted."""

    where: str
    """File and line, or what was graded."""
    why: str
    """What the case is about, in its own words."""
    want: str
    got: str

    def __str__(self) -> str:
        return f"{self.where}: {self.why}\n  wanted {self.want}, got {self.got}"


@dataclass(frozen=True, kw_only=True)
class Suite:
    """One suite after its run."""

    name: str
    cases: int
    seconds: float
    misses: list[Miss]
    ms: list[float] = field(default_factory=list)
    """Latency of each case."""
    budget_ms: float | None = None
    """For the 99th percentile; over it is a miss."""

    def percentile(self, share: float) -> float | None:
        """The latency that `share` of the cases stay at or under; None if it wasn't taken."""
        ordered = sorted(self.ms)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


def check(*, quick: bool, reward: str | None, golden: str | None) -> int:
    """Run all suites, or one reward's golden file, and print them; the exit code: 0, 1 any miss, 2 bad input."""
    try:
        chosen = suites(quick=quick) if reward is None and golden is None else iter([_one(reward, golden)])
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{'suite':<24}{'cases':>8}{'misses':>8}{'seconds':>10}{'p50 ms':>10}{'p99 ms':>10}{'budget':>10}")
    done = []
    for suite in chosen:
        columns = (suite.percentile(0.5), suite.percentile(0.99), suite.budget_ms)
        latency = "".join(f"{'' if ms is None else format(ms, ',.2f'):>10}" for ms in columns)
        print(f"{suite.name:<24}{suite.cases:>8,}{len(suite.misses):>8,}{suite.seconds:>10.1f}{latency}", flush=True)
        done.append(suite)
    misses = [miss for suite in done for miss in suite.misses]
    for miss in misses:
        print(f"\n{miss}")
    print(f"\n{len(misses):,} misses in {sum(suite.cases for suite in done):,} cases")
    return 1 if misses else 0


def suites(*, quick: bool) -> Iterator[Suite]:
    """Every suite, run when it is asked for; `quick` rewords each gold once, not in every way."""
    parts: dict[str, Callable[[], Suite]] = {
        f"golden/{path.stem}": partial(built_in_suite, path, slack=QUICK_SLACK if quick else 1.0)
        for path in sorted(GOLDEN.glob("*.jsonl"))
        if path.stem != "judge"
    }
    parts["metamorphic/math"] = partial(metamorphic_suite, GOLDEN / "math.jsonl", rules=1 if quick else None)
    parts["canaries/judge"] = judge_suite
    parts["hostile/code"] = hostile_suite
    for name, run in parts.items():
        try:
            yield run()
        except Exception as error:  # a suite that breaks must not hide what the others find
            traceback.print_exc()
            miss = Miss(where=name, why="the suite itself", want="a run to its end", got=_describe(error))
            yield Suite(name=name, cases=0, seconds=0.0, misses=[miss])


def built_in_suite(path: Path, *, slack: float) -> Suite:
    """Run the golden file of the reward that it is named after."""
    return golden_suite(path, grader_of(path.stem), budget_ms=slack * BUDGET_MS.get(path.stem, OTHERS_MS))


def golden_suite(path: Path, grader: Grader, *, budget_ms: float) -> Suite:
    """Run a golden file. Its cases' latencies must keep to the budget, and it must have a case of each kind."""
    shown = str(path.relative_to(GOLDEN.parents[1]) if path.is_relative_to(GOLDEN) else path)
    cases: list[Case] = []
    misses: list[Miss] = []
    with path.open("rb") as stream:
        for number, line in read_lines(stream):
            try:
                cases.append((f"{shown}:{number}", read_case(line)))
            except ValueError as error:
                where = f"{shown}:{number}"
                misses.append(Miss(where=where, why="can't be read", want="a golden case", got=str(error)))
    kinds = {case["kind"] for _, case in cases}
    has_gold = any(column in case for _, case in cases for column in GOLDS)
    misses += [
        Miss(where=shown, why=f"cases of kind {kind!r}", want="one at least", got="none")
        for kind in KINDS
        if kind not in kinds and (kind != "bad-gold" or has_gold)
    ]
    return run_suite(f"golden/{path.stem}", cases, grader, budget_ms=budget_ms, misses=misses)


def metamorphic_suite(path: Path, *, rules: int | None) -> Suite:
    """Golden maths cases reworded, spoilt and swapped; `rules` as in rewards/maths/metamorphic.py: cases."""
    from rewards.maths import metamorphic

    with path.open("rb") as stream:
        rows = [read_case(line) for _, line in read_lines(stream)]
    made = (
        (f"gold {shown(str(case['gold']))}, response {shown(case['response'])}", case)
        for case in metamorphic.cases(rows, rules)
    )
    return run_suite("metamorphic/math", made, grader_of("math"))


def judge_suite() -> Suite:
    """Judge canaries that are refused before any judge: even one that calls everything right must not pay for them."""
    from rewards.model_based.backends import Reply
    from rewards.model_based.judge import CANARIES, Judge

    judge = Judge(lambda requests: [Reply(text='{"analysis": "", "verdict": "right"}') for _ in requests], votes=1)
    cases = [
        (f"{CANARIES.name}:{number}", case)
        for number, case in enumerate(map(json.loads, CANARIES.read_text(encoding="utf-8").splitlines()), start=1)
        if case["kind"] != "wrong" and case["why"] not in TAKES_A_JUDGE
    ]

    def grade(case: Mapping[str, Any]) -> Verdict:
        return judge.judge([case["prompt"]], [case["response"]], [case.get("answer")])[0]

    return run_suite("canaries/judge", cases, grade)


def hostile_suite() -> Suite:
    """The programs of rewards/sandbox/hostile.toml, each in the jail, each contained."""
    from rewards.sandbox.hostile import run_all

    began = time.perf_counter()
    attacks = run_all()
    where = "rewards/sandbox/hostile.toml"
    misses = [
        Miss(where=where, why=f"{attack.number}, {attack.name}", want="contained", got="; ".join(attack.problems))
        for attack in attacks
        if attack.problems
    ]
    if all(attack.reason == "sandbox-unavailable" for attack in attacks):
        got = "no isolation: python -m rewards doctor"
        misses = [Miss(where=where, why="not run", want="a machine that can isolate programs", got=got)]
    seconds = time.perf_counter() - began
    return Suite(name="hostile/code", cases=len(attacks), seconds=seconds, misses=misses)


def run_suite(
    name: str, cases: Iterable[Case], grader: Grader, *, budget_ms: float | None = None, misses: Iterable[Miss] = ()
) -> Suite:
    """Grade every case, once: graders remember, so a second time would show nothing but that."""
    began = time.perf_counter()
    misses, latencies = list(misses), list[float]()
    for where, case in cases:
        columns = {column: value for column, value in case.items() if column not in ("why", "want", "kind")}
        if not latencies:
            _run(grader, columns)  # imports, and processes that start, are no case's latency
        got, ms = _run(grader, columns)
        latencies.append(ms)
        if not _is(got, case["want"]):
            why = f"{case['kind']}: {case['why']}"
            misses.append(Miss(where=where, why=why, want=str(case["want"]), got=_describe(got)))
    seconds = time.perf_counter() - began
    suite = Suite(name=name, cases=len(latencies), seconds=seconds, misses=misses, ms=latencies, budget_ms=budget_ms)
    slowest = suite.percentile(0.99)
    if budget_ms is not None and slowest is not None and slowest > budget_ms:
        misses.append(Miss(where=name, why="p99 latency", want=f"{budget_ms:g} ms at most", got=f"{slowest:.1f} ms"))
    return suite


def grader_of(name: str) -> Grader:
    """Of `math`, `code` or a reward's name: what grades one case. Raises ValueError if there is none."""
    if name == "math":
        from rewards.maths.grade import grade_math

        return lambda case: grade_math(case["gold"], case["response"])
    if name == "code":
        from rewards.code_tests import grade_code

        return lambda case: grade_code(case["response"], case["tests"])
    from rewards import resolve

    function = resolve(name)

    def grade(case: Mapping[str, Any]) -> float | None:
        columns = {column: [value] for column, value in case.items() if column not in ("response", "prompt")}
        columns.setdefault("completion_ids", [[]])
        (score,) = function(prompts=[case.get("prompt", "")], completions=[case["response"]], **columns)
        return score

    return grade


def read_case(line: bytes | None) -> dict[str, Any]:
    """A golden case. Raises ValueError for anything else."""
    case = parse_row(line)
    for name in ("why", "kind"):
        if not isinstance(case.get(name), str):
            raise ValueError(f"{name} is missing: give a string")
    if "response" not in case:
        raise ValueError("response is missing: give what is graded")
    if case["kind"] not in KINDS:
        raise ValueError(f"kind={case['kind']!r}: give one of {', '.join(KINDS)}")
    want = case.get("want")
    if isinstance(want, bool) or not (isinstance(want, int | float) or (isinstance(want, str) and want in WANT)):
        raise ValueError(f"want={want!r}: give {', '.join(WANT)} or a score")
    return case


def _one(reward: str | None, golden: str | None) -> Suite:
    if reward is None:
        raise ValueError(f"--golden {golden}: say with --reward whose it is")
    path = Path(golden) if golden else GOLDEN / f"{reward}.jsonl"
    if not path.is_file():
        raise ValueError(f"--golden {path}: no such file; give the JSONL file of the cases")
    return golden_suite(path, grader_of(reward), budget_ms=BUDGET_MS.get(reward, OTHERS_MS))


def _run(grader: Grader, columns: Mapping[str, Any]) -> tuple[Score | Exception, float]:
    """What came out, and milliseconds."""
    began = time.perf_counter()
    try:
        got: Score | Exception = grader(columns)
    except Exception as error:  # a reward is anyone's code; raising is an outcome nobody wants
        got = error
    return got, 1e3 * (time.perf_counter() - began)


def _is(got: object, want: str | float) -> bool:
    score = got.score if isinstance(got, Verdict) else got
    wanted = WANT[want] if isinstance(want, str) else want
    if score is None or wanted is None:
        return score is wanted
    return isinstance(score, int | float) and abs(score - wanted) <= TOLERANCE


def _describe(got: object) -> str:
    if isinstance(got, Verdict):
        return f"{got.outcome} ({got.reason})"
    if isinstance(got, Exception):
        return f"{type(got).__name__}: {shown(str(got))}"
    return "unknown" if got is None else shown(repr(got))
