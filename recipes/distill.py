"""`python -m recipes.distill`: answers to learn from, graded, read and chosen, with the life of every row.

With no arguments the built-in tiny DeepSeek-V3 (made if missing) answers the built-in stories, four times each. It ends
with what became of all answers and where the shards are: `python -m recipes.sft --mix SHARDS/data-00000.parquet` learns
from them, `python -m recipes.grpo --data SHARDS/problems.jsonl --curriculum.reward accuracy` from the pass rates, and
`python -m distill trace ROW --run RUN` prints a row's life. Where people are to judge an expert's answers (`review`),
`python -m distill review RUN` shows them, and the same command with --resume writes the shards with what was decided.
"""

import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text

from distill.config import DistillConfig
from distill.generate import Result, generate
from distill.shards import Export
from recipes.cli import main
from recipes.grpo import tiny_model
from runtime.progress import visible


def run(config: DistillConfig) -> int:
    """Generate and show what came of it; returns the exit code."""
    result = generate(config, named_models={"tiny": lambda: tiny_model(Console(stderr=True))})
    show(result, Console())
    return result.exit_code


def show(result: Result, console: Console) -> None:
    """The end of a run: what became of the answers, and where the shards are."""
    if result.export is None:
        console.print(Text(f"left with {result.left} problems to go, saved; the same command with --resume goes on"))
    else:
        console.print(yield_table(result.export))
        for reason, count in result.export.aside.items():
            console.print(Text(f"{count:,} rows set aside: {visible(reason, keep='')}"))
        if waiting := sum(part.waiting for part in result.export.table):
            console.print(
                Text(
                    f"waiting for people  {waiting:,} rows: python -m distill review {result.run_dir}, then the same "
                    "command with --resume"
                ),
                soft_wrap=True,
            )
        console.print(
            Text(f"shards              {result.export.folder}  ({result.export.rows:,} rows)"), soft_wrap=True
        )
    console.print(Text(f"run folder          {result.run_dir}"), soft_wrap=True)


def yield_table(exported: Export) -> Table:
    """Domain by domain and kind by kind, from problems to rows."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    for head in ("domain", "kind"):
        table.add_column(head)
    for head in ("problems", "answers", "right", "wrong", "unknown", "unreadable", "kept", "tokens"):
        table.add_column(head, justify="right")
    for part in exported.table:
        counts = (part.problems, part.answers, part.right, part.wrong, part.unknown, part.hard_to_read, part.kept)
        cells = (visible(part.domain, keep=""), part.kind, *(f"{n:,}" for n in (*counts, part.tokens)))
        table.add_row(*map(Text, cells))
    return table


if __name__ == "__main__":
    sys.exit(main(DistillConfig, run, prog="python -m recipes.distill", description=__doc__ or ""))
