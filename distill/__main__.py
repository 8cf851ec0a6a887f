"""`python -m distill trace ROW --run RUN`: what a run has written, looked into; `review QUEUE`: people judge answers.

Exit codes: 0 done, 2 bad input, 130 after Ctrl-C. Each command's own module is imported only when it is asked for.
"""

import argparse
import os
import sys
from pathlib import Path

from runtime.errors import UserError

REVIEW = {"review": "review", "export": "export", "import": "import_"}
"""Commands that people's decisions are made and moved by -> functions of distill/review/commands.py."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    command, *rest = [*(sys.argv[1:] if arguments is None else arguments), ""]
    try:
        if command in REVIEW:
            from distill.review import commands

            code: int = getattr(commands, REVIEW[command])(rest[:-1])
            return code
        return trace(_parser().parse_args([command, *rest][:-1]))
    except UserError as error:
        print(f"python -m distill {command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has what it wanted: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit would complain
        return 141


def trace(args: argparse.Namespace) -> int:
    """Print a row's life."""
    from distill.ledger import Ledger
    from distill.shards import decisions_of
    from distill.trace import trace

    run_dir = Path(args.run)
    with Ledger(run_dir / "ledger.sqlite", read_only=True) as ledger:
        encoding = sys.stdout.encoding or "ascii"
        for line in trace(ledger, args.row, decisions=decisions_of(run_dir)):
            print(line.encode(encoding, "backslashreplace").decode(encoding))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m distill", description="Look into a distillation run, or have people review answers."
    )
    names = "trace | review | export | import"
    commands = parser.add_subparsers(dest="command", required=True, metavar=names)
    for name, says in {
        "review": "a local page on which people accept, edit and reject answers",
        "export": "answers and decisions, for Argilla, Label Studio or SFT",
        "import": "decisions made in Argilla or Label Studio",
    }.items():
        commands.add_parser(name, help=says, add_help=False)
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
