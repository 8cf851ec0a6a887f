"""`python -m recipes.report RUN [RUN ...]`: a run's report.html written anew, or one page that compares several runs.

python -m recipes.report runs/a            # runs/a/report.html
python -m recipes.report runs/a runs/b     # runs/comparison.html: curves over each other, figures, settings that differ

Needs a run's files alone, also while the run goes on. Prints the page's path.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtime.errors import EXIT_DISK, DiskError, UserError
from runtime.report import write_comparison, write_report
from runtime.report.read import is_run, read_run

COMPARISON = "comparison.html"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page and print its path; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, such as runs/NAME")
    parser.add_argument("--out", help="file to write; default: report.html in the run, or comparison.html beside it")
    options = parser.parse_args(argv)
    try:
        print(write([Path(run) for run in options.runs], Path(options.out) if options.out else None))
    except UserError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    except DiskError as error:
        print(f"{parser.prog}: error: {error}, then the same command", file=sys.stderr)
        return EXIT_DISK
    return 0


def write(runs: Sequence[Path], out: Path | None = None) -> Path:
    """The page of one run, or of several; where it is. Raises UserError for a folder that holds no run."""
    for run in runs:
        if not run.is_dir():
            raise UserError(f"{run}: no such folder; give the folder of a run, such as runs/NAME")
        if not is_run(run):
            raise UserError(f"{run}: holds no run (neither config.yaml nor metrics.jsonl); give the folder of one")
    path = out or (runs[0] / "report.html" if len(runs) == 1 else runs[0].absolute().parent / COMPARISON)
    if not path.parent.is_dir() or path.is_dir():
        raise UserError(f"--out {path}: give a file in a folder that exists")
    try:
        if len(runs) == 1:
            return write_report(runs[0], defaults=defaults(read_run(runs[0]).kind), path=path)
        return write_comparison(runs, path)
    except PermissionError as error:
        raise UserError(f"{path} can't be written ({error.strerror}); give another --out") from error


def defaults(kind: str) -> Any:
    """The configuration of that kind of run when nothing is set; None for a kind that isn't known."""
    if kind == "grpo":
        from rl.config import GRPOConfig

        return GRPOConfig()
    if kind == "sft":
        from sft.config import SFTConfig

        return SFTConfig()
    if kind == "distill":
        from distill.config import DistillConfig

        return DistillConfig()
    if kind == "reward_model":
        from recipes.reward_model import RewardModelTraining

        return RewardModelTraining()
    return None


if __name__ == "__main__":
    sys.exit(main())
