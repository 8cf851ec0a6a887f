"""`python -m rewards grade | check | doctor`: the graders from a shell.

Exit codes: 0 done, 1 a miss or nothing to isolate code with, 2 bad input, 74 a full or failing disk,
128 + signal when told to leave. Left out: what each command does (rewards/rows.py, rewards/check.py,
rewards/sandbox/doctor.py), which is imported only when it is asked for, so that the first verdict comes at once.
"""

import argparse
import os
import sys

ROWS = """\
a row of FILE.jsonl:
  {"kind": "math", "gold": "1/2", "response": "<think>...</think> \\\\boxed{0.5}"}
  {"kind": "code", "response": "```python\\n...```", "tests": [{"input": "1 2\\n", "output": "3\\n"}]}
  {"kind": "code", "response": "```python\\n...```", "tests": [{"assert": "assert add(1, 2) == 3"}]}

examples:
  python -m rewards grade answers.jsonl > verdicts.jsonl
  zcat answers.jsonl.gz | python -m rewards grade - --workers 8
"""
CASES = """\
a case of a golden file ("want": right, wrong, unknown or a score), beside the columns of the reward:
  {"why": "cut off", "kind": "truncated", "want": "wrong", "response": "So \\\\boxed{3", "answer": "3"}

examples:
  python -m rewards check --quick
  python -m rewards check --reward my_rewards.brevity --golden brevity.jsonl
"""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    args = _parser().parse_args(arguments)
    try:
        if args.command == "grade":
            from rewards.rows import grade_file

            return grade_file(args.file, workers=args.workers)
        if args.command == "check":
            from rewards.check import check

            return check(quick=args.quick, reward=args.reward, golden=args.golden)
        from rewards.sandbox.doctor import diagnose, lines

        diagnosis = diagnose()
        print("\n".join(lines(diagnosis)))
        return 0 if diagnosis.available else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has what it wanted: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit would complain
        return 141


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rewards",
        description="Grade maths and code, check the graders, and see what isolation this machine offers.",
        epilog="`python -m rewards grade --help` shows what a row looks like; more is in docs/rewards.md.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="grade | check | doctor")
    as_written = argparse.RawDescriptionHelpFormatter
    grade = commands.add_parser(
        "grade",
        help="rows of a JSONL file -> one verdict a line on stdout, in order",
        description="Write one verdict for each row, in order. A row that can't be graded is reported on stderr with\n"
        'its line number, gets the verdict "unknown", and makes the exit code 2.',
        epilog=ROWS,
        formatter_class=as_written,
    )
    grade.add_argument("file", metavar="FILE.jsonl", help='the rows; "-" reads stdin')
    grade.add_argument(
        "--workers",
        type=_positive,
        default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        help="processes that grade after the first second of work; default: the number of cores, %(default)s here",
    )
    check = commands.add_parser(
        "check",
        help="golden, metamorphic and hostile suites; exit code 1 on any miss",
        description="Run every suite, or one reward against its golden file, and print each miss.",
        epilog=CASES,
        formatter_class=as_written,
    )
    check.add_argument("--quick", action="store_true", help="fewer rewordings, more time: under a minute")
    check.add_argument("--reward", help="only this one: a built-in name, or your package.module.function")
    check.add_argument("--golden", metavar="FILE.jsonl", help="its cases; a built-in reward has its own file")
    commands.add_parser("doctor", help="what isolation this machine offers for code, and what would be refused")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: give 1 or more")
    return number


if __name__ == "__main__":
    sys.exit(main())
