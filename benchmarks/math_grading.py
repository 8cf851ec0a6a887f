"""Verdicts a second and mistakes: rewards.grade_math against math-verify, on the same completions.

    python -m benchmarks.math_grading [--peer_python PATH]

The completions are the golden file's and, where it is, ../shared/data/math_cases.jsonl's, each answer boxed at the
end of a page of reasoning. Everyone runs in a process pinned to one core. Ours starts anew each round, so that its
first pass finds empty caches; math-verify stays, for its parser learns. The second pass is the same list again:
our caches are full, and math-verify is spared the parsing of golds. Timed are only pairs that both grade as
labelled, and no hostile ones, on which math-verify waits for its 5 s alarm. Accuracy is over all.

math-verify at its best: LaTeX and expressions, box first, relations compared with sets. Its defaults, verl's choice,
letters of choices and strict=False made as many mistakes or more. Another version may live elsewhere: `--peer_python`.
"""

import argparse
import contextlib
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("DATA", ROOT.parent / "shared/data")) / "math_cases.jsonl"
REASONING = "First let us see what is given. If $a+b=12$ and $a-b=4$ then $a=8$, so the other is $4$; that checks. "
WHOLE = ("\\boxed", "\\fbox", "<think>", "<answer>", "</think>")
"""A response with one of these is a completion; another is a bare answer, and gets a box."""
DELIMITED = ("$", "\\(", "\\[", "**")
"""A bare answer with one of these stays as it is, alone: what it tests is its delimiters."""

WARM_UP = [
    (r"3\sin^2 t", r"3-3\cos^2 t"),
    (r"\sqrt{t^2+6t+9}", r"|t+3|"),
    (r"13", r"|5+12i|"),
    (r"\binom{m}{4}", r"\frac{m!}{24(m-4)!}"),
    (r"\sum_{k=1}^{m} 3k", r"\frac{3m(m+1)}{2}"),
    (r"\frac32", r"\sum_{k=0}^{\infty} 3^{-k}"),
    (r"\log_3 8", r"\frac{3\ln 2}{\ln 3}"),
]
"""None of them is timed: imports, workers that start and sympy's tables are not a verdict's time."""

Pair = tuple[str, str]
"""Gold and completion."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer_python", default=sys.executable, help="the Python that has math-verify")
    parser.add_argument("--pairs", type=int, default=300, help="pairs to time, drawn from those both grade as labelled")
    parser.add_argument("--chars", type=int, default=4000, help="of reasoning before the answer")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--serve", choices=SERVERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(SERVERS[args.serve]())

    from benchmarks._common import ratio, setting, spread, table

    rows = labelled(args.chars)
    pairs = [(gold, completion) for gold, completion, _, _ in rows]
    print(f"{setting(1, 'sympy', 'mpmath')}  \n{len(rows)} pairs; {args.chars} characters of reasoning\n", flush=True)
    with Grader("math-verify", args.peer_python) as peer:
        with Grader("ours", sys.executable) as ours:
            graded = {"ours": ours.grade(pairs), "math-verify": peer.grade(pairs)}
        wants = [want for _, _, want, _ in rows]
        print(table(["grader", "as labelled", "wrongly right", "wrongly not right", "ms p50", "p99", "max"], [
            [name, *accuracy(wants, outcomes), *latency(seconds)] for name, (outcomes, seconds) in graded.items()
        ]), flush=True)  # fmt: skip
        agreed = [
            n
            for n, (_, _, want, hostile) in enumerate(rows)
            if not hostile and graded["ours"][0][n] == graded["math-verify"][0][n] == want
        ]
        chosen = sorted(random.Random(0).sample(agreed, min(args.pairs, len(agreed))))
        timed, expected = [pairs[n] for n in chosen], [wants[n] for n in chosen]
        rates: dict[tuple[str, str], list[float]] = {}
        for r in range(args.rounds):
            with Grader("ours", sys.executable) as ours:
                for grader in (ours, peer) if r % 2 else (peer, ours):
                    for temperature in ("cold", "cached"):
                        outcomes, seconds = grader.grade(timed, forget=temperature == "cold")
                        if outcomes != expected:
                            print(f"parity: {grader.name} graded a timed pair otherwise than before")
                            return 1
                        rates.setdefault((grader.name, temperature), []).append(len(timed) / sum(seconds))
            print(f"round {r + 1} of {args.rounds}", file=sys.stderr)
    print(f"\n{len(timed)} of the {len(agreed)} pairs that are not hostile and both grade as labelled:\n")
    print(table(["caches", "ours, verdicts/s", "math-verify, verdicts/s", "ours / math-verify"], [
        [temperature, spread(mine, ",.0f"), spread(theirs, ",.0f"), ratio(theirs, mine)]
        for temperature in ("cold", "cached")
        for mine, theirs in [(rates["ours", temperature], rates["math-verify", temperature])]
    ]))  # fmt: skip
    return 0


def labelled(chars: int) -> list[tuple[str, str, str, bool]]:
    """Gold, completion, "right" or "wrong", hostile; cases without a good gold are ours alone and left out."""
    golden = (ROOT / "rewards/golden/math.jsonl").read_text(encoding="utf-8").splitlines()
    shared = SHARED.read_text(encoding="utf-8").splitlines() if SHARED.exists() else []
    cases = [(c["gold"], c["response"], c["want"], c["category"]) for c in map(json.loads, golden)]
    cases += [
        (c["gold"], c["pred"], "right" if c["equal"] else "wrong", c["category"]) for c in map(json.loads, shared)
    ]
    reasoning = (REASONING * math.ceil(chars / len(REASONING)))[:chars]
    return [
        (str(gold), _completion(reasoning, response), want, category in ("adversarial", "hedging"))
        for gold, response, want, category in cases
        if want != "unknown"
    ]


def _completion(reasoning: str, response: str) -> str:
    if "think>" in response or not response.strip():
        return response
    whole = any(mark in response for mark in WHOLE)
    if not whole and any(mark in response for mark in DELIMITED):
        return response
    return f"{reasoning}\n\n" + (response if whole else rf"The answer is $\boxed{{{response}}}$.")


def accuracy(wants: list[str], outcomes: list[str]) -> list[str]:
    """Counts: as labelled, right though wrong, anything else though right."""
    found = Counter(zip(wants, outcomes, strict=True))
    hits = found["right", "right"] + found["wrong", "wrong"]
    passed = found["wrong", "right"]
    return [f"{hits} of {len(wants)}", str(passed), str(len(wants) - hits - passed)]


def latency(seconds: list[float]) -> list[str]:
    """Milliseconds: median, 99th percentile, slowest."""
    centiles = statistics.quantiles(seconds, n=100)
    return [f"{1000 * s:,.2f}" for s in (centiles[49], centiles[98], max(seconds))]


class Grader:
    """A grader in its own pinned process, over one JSON line a request and one an answer."""

    def __init__(self, name: str, python: str) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [python, __file__, "--serve", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)} if name == "ours" else None,
            text=True,
        )
        self._read()

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate("", timeout=60)

    def grade(self, pairs: list[Pair], *, forget: bool = False) -> tuple[list[str], list[float]]:
        """Outcomes and seconds of each pair; `forget` what the peer was told to keep of golds."""
        assert self._process.stdin
        print(json.dumps({"pairs": pairs, "forget": forget}), file=self._process.stdin, flush=True)
        return self._read()

    def _read(self) -> Any:
        assert self._process.stdout
        if not (line := self._process.stdout.readline()):
            sys.exit(f"{self.name} ended; its error is above; `make setup` installs math-verify, or name --peer_python")
        return json.loads(line)


def serve(grade: tuple[Callable[[str, str], str], Callable[[], None]]) -> int:
    """Answer requests on stdin until it ends."""
    one, forget = grade
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    for gold, answer in WARM_UP:
        one(gold, rf"\boxed{{{answer}}}")
    print("[]", file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if request["forget"]:
            forget()
        print(json.dumps(list(zip(*_timed(one, request["pairs"]), strict=True))), file=answers, flush=True)
    return 0


def _timed(grade: Callable[[str, str], str], pairs: list[Pair]) -> Iterator[tuple[str, float]]:
    for gold, completion in pairs:
        began = time.perf_counter()
        outcome = grade(gold, completion)
        yield outcome, time.perf_counter() - began


def _ours() -> tuple[Callable[[str, str], str], Callable[[], None]]:
    _pin()
    from rewards import grade_math

    return (lambda gold, completion: grade_math(gold, completion).outcome), lambda: None


def _math_verify() -> tuple[Callable[[str, str], str], Callable[[], None]]:
    import functools
    import logging

    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    _pin()
    logging.disable(logging.CRITICAL)
    configs = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())

    @functools.cache
    def gold_of(gold: str) -> Any:
        return parse(gold if "\\boxed" in gold or "####" in gold else rf"\boxed{{{gold}}}", configs)

    def grade(gold: str, completion: str) -> str:
        equal = verify(gold_of(gold), parse(completion, configs), allow_set_relation_comp=True)
        return "right" if equal else "wrong"

    return grade, gold_of.cache_clear


def _pin() -> None:
    """This process and its children on one core."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


SERVERS = {"ours": _ours, "math-verify": _math_verify}


if __name__ == "__main__":
    sys.exit(main())
