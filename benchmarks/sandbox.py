"""Trivial programs a second, each isolated: `grade_code` in our jail against `bwrap python3` and bare `python3`.

Every contestant runs the same program (double a number on standard input) from as many threads as there are
processors and must print the right number every time; otherwise the exit code is 1. bwrap gets what its manual
advises: all namespaces, a read-only root, a sized /tmp, no capabilities; our jail does that and adds limits,
seccomp and the comparison of output. `python3 -I -S` has no isolation at all: it shows what a start of the interpreter
costs. Left out: long programs, where nobody's overhead matters.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from benchmarks._common import Contestant, Turns, alternate, ratio, setting, spread, table, timed

PROGRAM = "print(2 * int(input()))"
OURS, BWRAP, BARE = "grade_code, our jail", "bwrap python3", "python3, not isolated"
PYTHON = [sys.executable, "-I", "-S", "-c", PROGRAM]
WRAP = [
    "bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL",
    "--ro-bind", "/", "/", "--dev", "/dev", "--size", str(32 << 20), "--tmpfs", "/tmp", "--chdir", "/tmp",
]  # fmt: skip


def by_process(command: list[str]) -> Callable[[int], bool]:
    """A run of a command with a number on standard input; whether it answered rightly."""

    def run(number: int) -> bool:
        done = subprocess.run(command, input=f"{number}\n", capture_output=True, text=True, check=False)
        return done.stdout == f"{2 * number}\n"

    return run


def by_grade(number: int) -> bool:
    from rewards.code_tests import grade_code

    return grade_code(f"```python\n{PROGRAM}\n```", [{"input": f"{number}\n", "output": f"{2 * number}\n"}]).score == 1


def serve(turns: Turns, name: str, threads: int) -> None:
    """Run as many programs as asked; answers with the seconds, or with None if one answer was wrong."""
    run = by_grade if name == OURS else by_process([*WRAP, *PYTHON] if name == BWRAP else PYTHON)
    with ThreadPoolExecutor(threads) as pool:
        turns.answer({"works": all(pool.map(run, range(threads)))})
        for programs in turns:
            seconds, right = timed(lambda count=programs: all(pool.map(run, range(count))))
            turns.answer(seconds if right else None)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sandbox", description=__doc__)
    parser.add_argument("--programs", type=int, default=400, help="in one round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    names = [OURS, BWRAP, BARE] if shutil.which("bwrap") else [OURS, BARE]
    if BWRAP not in names:
        print("bwrap is not installed here (Debian: bubblewrap): compared with a bare python3 only", file=sys.stderr)
    print(f"{setting(args.threads)}  \n{args.programs} programs a round, {args.rounds} rounds\n")
    contestants: list[Contestant] = []
    try:
        for name in names:
            contestants.append(Contestant(name, serve, name, args.threads, threads=1))
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for _, contestant in alternate(contestants, args.rounds):
            taken = contestant.turn(args.programs)
            if taken is None:
                print(f"{contestant.name}: a wrong answer", file=sys.stderr)
                return 1
            seconds[contestant.name].append(taken)
    finally:
        for contestant in contestants:
            contestant.close()
    rows = [
        [name, spread([args.programs / s for s in seconds[name]], ".0f"), ratio(seconds[OURS], seconds[name])]
        for name in names
    ]
    print(table(["contestant", "programs/s", "times ours is faster"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
