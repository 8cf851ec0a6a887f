"""One night of the rewards' suites -> summary.md and figures.json, with the change since another night's figures.

Runs every suite of `python -m rewards check` whole, the judge's canaries where a judge is given, and the peers'
comparison where its script is there. Exit code 1 on any miss. Left out: the tests (`make nightly` runs them).
"""

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from rewards.check import Miss, Suite, suites

ROOT = Path(__file__).resolve().parent.parent
PEERS = ("math_grading", "sandbox")
"""Scripts beside this one that compare with peers (math-verify, bwrap) and print Markdown."""
NOISE = 0.2
"""A latency that moved by less is shown without its change: machines that run nights are shared."""

Figures = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.nightly", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where both files go")
    parser.add_argument("--previous", type=Path, metavar="FILE", help="figures.json of another night; may be missing")
    parser.add_argument("--quick", action="store_true", help="a sample of the long suites, and no peers")
    parser.add_argument("--peer_python", default=sys.executable, help="the Python that has math-verify")
    parser.add_argument("--judge", metavar="FILE.yaml", help="a judge to try the canaries on (JudgeConfig)")
    args = parser.parse_args()
    figures = measure(quick=args.quick, judge=args.judge, peer_python=args.peer_python)
    previous = read_figures(args.previous)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    text = summary(figures, previous)
    (args.out / "summary.md").write_text(text, encoding="utf-8")
    print(text, end="")
    return 1 if any(suite["misses"] for suite in figures["suites"].values()) else 0


def measure(*, quick: bool, judge: str | None, peer_python: str) -> Figures:
    """Tonight's figures: plain JSON."""
    found: dict[str, Figures] = {}
    for suite in night(quick=quick, judge=judge):
        print(f"{suite.name}: {len(suite.misses)} misses of {suite.cases} in {suite.seconds:.1f} s", file=sys.stderr)
        found[suite.name] = {
            "cases": suite.cases,
            "seconds": round(suite.seconds, 1),
            "p50_ms": suite.percentile(0.5),
            "p99_ms": suite.percentile(0.99),
            "budget_ms": suite.budget_ms,
            "misses": [vars(miss) for miss in suite.misses],
        }
    return {
        "when": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "quick": quick,
        "suites": found,
        "peers": {} if quick else {name: peer(name, peer_python) for name in PEERS},
    }


def night(*, quick: bool, judge: str | None) -> Iterator[Suite]:
    """All suites, and the canaries with a real judge."""
    yield from suites(quick=quick)
    if judge:
        from rewards.model_based.judge import CANARIES, JudgeConfig, canaries, open_judge
        from rewards.model_based.settings import read_settings

        config = read_settings(judge, JudgeConfig)
        missed = [
            Miss(where=CANARIES.name, why=m.why, want=m.want, got=f"{m.verdict.outcome} ({m.verdict.reason})")
            for m in canaries(open_judge(config))
        ]
        cases = len(CANARIES.read_text(encoding="utf-8").splitlines())
        yield Suite(name="canaries/model", cases=cases, seconds=0.0, misses=missed)


def peer(name: str, peer_python: str) -> str:
    """What a comparison prints, or why there is nothing."""
    options = ["--peer_python", peer_python] if name == "math_grading" else []
    command = [sys.executable, "-m", f"benchmarks.{name}", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return done.stdout.strip()
    return f"Exit code {done.returncode}.\n\n```text\n{done.stderr[-500:].strip()}\n```"


def read_figures(path: Path | None) -> Figures | None:
    """Another night's figures; None where there are none to compare with, or only half of them."""
    if path is None or not path.exists():
        return None
    try:
        found: Figures = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        print(f"--previous {path}: {error}; this night stands alone", file=sys.stderr)
        return None
    return found


def commit() -> str:
    """What is checked out, in short."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


# --- the page ---------------------------------------------------------------------------------------------------------


def summary(tonight: Figures, previous: Figures | None) -> str:
    """Markdown: what is new first, then every suite beside the other night's."""
    suites, before = tonight["suites"], (previous or {}).get("suites", {})
    now, then = misses_of(suites), misses_of(before)
    cases = sum(suite["cases"] for suite in suites.values())
    gone = sorted(set(before) - set(suites))
    lines = [
        f"# Rewards, {tonight['when']}",
        "",
        f"**{verdict(now, then, cases, previous is None)}**",
        "",
        f"Commit {tonight['commit']}, {tonight['machine']}. " + against(tonight, previous),
        "",
        "| suite | cases | misses | p50 ms | p99 ms | budget ms | seconds |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *(row(name, suite, before.get(name)) for name, suite in suites.items()),
    ]
    if gone:
        lines += ["", f"No longer there: {', '.join(gone)}."]
    new = [miss for key, miss in now.items() if key not in then]
    still = [miss for key, miss in now.items() if key in then]
    mended = [miss for key, miss in then.items() if key not in now]
    for title, misses in (("New misses", new), ("Still missed", still), ("No longer missed", mended)):
        if misses:
            lines += [
                "",
                f"## {title}",
                "",
                "```text",
                *(str(Miss(**miss)).replace("`", "'") for miss in misses),
                "```",
            ]
    if tonight["peers"]:
        lines += ["", "## Beside peers"]
        for name, text in tonight["peers"].items():
            lines += ["", f"`python -m benchmarks.{name}`", "", text]
            if other := (previous or {}).get("peers", {}).get(name):
                lines += ["", "<details><summary>The night before</summary>", "", other, "", "</details>"]
    return "\n".join(lines) + "\n"


def verdict(now: Collection[Any], then: Collection[Any], cases: int, first: bool) -> str:
    """The night in a sentence."""
    if not now:
        fixed = f"; {len(then)} that were missed are mended" if then else ""
        return f"All {cases:,} cases as wanted{fixed}."
    new = len(set(now) - set(then))
    return f"{len(now):,} of {cases:,} cases missed" + ("." if first else f", {new:,} of them new.")


def against(tonight: Figures, previous: Figures | None) -> str:
    if previous is None:
        return "The first night: nothing to compare with."
    other = " That night took a sample only." if previous["quick"] and not tonight["quick"] else ""
    return f"Changes in brackets are since {previous['when']} (commit {previous['commit']}).{other}"


def row(name: str, suite: Figures, before: Figures | None) -> str:
    """One suite; a change stands in brackets where there is one."""
    cells = [name]
    for key in ("cases", "misses"):
        count, old = (len(s[key]) if key == "misses" else s[key] for s in (suite, before or suite))
        cells.append(f"{count:,}" + (f" ({count - old:+,})" if count != old else ""))
    for key in ("p50_ms", "p99_ms"):  # without a budget it is a matter of microseconds, or of the machine
        ms, old = suite[key], (before or suite)[key]
        moved = f" ({ms / old - 1:+.0%})" if suite["budget_ms"] and old and abs(ms / old - 1) > NOISE else ""
        cells.append("" if ms is None else f"{ms:,.2f}{moved}")
    cells += ["" if suite["budget_ms"] is None else f"{suite['budget_ms']:,.0f}", f"{suite['seconds']:,.1f}"]
    return f"| {' | '.join(cells)} |"


def misses_of(suites: dict[str, Figures]) -> dict[tuple[str, ...], Figures]:
    """Misses by what they are about, without line numbers: a case that moved in its file is still the same."""
    found: dict[tuple[str, ...], Figures] = {}
    for name, suite in suites.items():
        for miss in suite["misses"]:
            key: tuple[str, ...] = (name, re.sub(r":[0-9]+$", "", miss["where"]), miss["why"])
            while key in found:
                key += ("again",)
            found[key] = miss
    return found


if __name__ == "__main__":
    sys.exit(main())
