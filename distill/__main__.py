"""`python -m distill trace ROW --run RUN`: what a run has written, looked into.

Exit codes: 0 done, 2 bad input, 130 after Ctrl-C. Each command's own module is imported only when it is asked for.
"""

import argparse
import os
import sys
from pathlib import Path

from runtime.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    args = _parser().parse_args(arguments)
    try:
        from distill.ledger import Ledger
        from distill.trace import trace

        with Ledger(Path(args.run) / "ledger.sqlite", read_only=True) as ledger:
            encoding = sys.stdout.encoding or "ascii"
            for line in trace(ledger, args.row):
                print(line.encode(encoding, "backslashreplace").decode(encoding))
        return 0
    except UserError as error:
        print(f"python -m distill {args.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has what it wanted: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit would complain
        return 141


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m distill", description="Look into a distillation run.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="trace")
    row = commands.add_parser(
        "trace",
        help="the life of one row: problem, teacher, parameters, seed, verdict, filters, choice, review",
        description="Print the life of one row, or of every answer to a problem.",
    )
    row.add_argument("row", metavar="ROW", help="`id` in a shard (PROBLEM/KIND/INDEX), or `problem_id`")
    row.add_argument("--run", required=True, help="run folder of python -m recipes.distill")
    return parser


if __name__ == "__main__":
    sys.exit(main())
