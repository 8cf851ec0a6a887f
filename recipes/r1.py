"""`python -m recipes.r1`: a chain of recipes in one command; with no arguments, R1's stages on the tiny DeepSeek-V3.

A chain is a list of stages in YAML (recipes/configs/chain_*.yaml), each a recipe with its settings and with
${STAGE.OUTPUT} for what earlier stages made. Each runs in a folder of its own below the chain's, and every model is
measured on the same held-out problems. It ends with the accuracy of every stage. --plan shows the stages and what is
missing; --resume goes on, --from STAGE begins anew there, --only STAGE runs one.
"""

import contextlib
import json
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from recipes.chain.config import ChainConfig, Stage, missing_inputs, resolve_stages
from recipes.chain.run import Chain
from recipes.cli import main
from rl.evaluate import Estimate
from runtime.errors import UserError
from runtime.files import write_durably

TINY = Path(__file__).parent / "configs/chain_tiny.yaml"
TABLE = "table.json"


def run(config: ChainConfig) -> int:
    """Run the chain, or show its plan; returns the exit code."""
    console = Console()
    run_dir = Path(config.run_dir or f"runs/r1-{datetime.now():%Y%m%d-%H%M%S}")
    stages = resolve_stages(config, run_dir)
    missing = missing_inputs(stages, run_dir)
    if config.plan:
        console.print(plan_table(stages))
        for line in missing:
            console.print(Text(f"missing: {line}"), soft_wrap=True)
        return 0
    if missing:
        raise UserError("\n".join(missing))
    with contextlib.closing(Chain(config, run_dir, stages)) as chain:
        code = chain.run()
    rows = table_rows(stages, chain.record)
    write_durably(run_dir / TABLE, json.dumps(rows, indent=1) + "\n")
    console.print(result_table(rows))
    if config.evaluation is not None:
        held_out = f"{config.evaluation.problems} problems of {config.evaluation.data}"
        console.print(Text(f"(at most {held_out}, never trained on; the same for all; 95 % intervals)"), soft_wrap=True)
    console.print(Text(f"chain               {run_dir}  ({TABLE} holds the table)"), soft_wrap=True)
    return code


def table_rows(stages: Sequence[Stage], record: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What every stage came to, as JSON; absent where it didn't run or makes no model."""
    rows = []
    for stage in stages:
        entry = record.get(stage.name, {})
        row: dict[str, Any] = {"stage": stage.name, "recipe": stage.recipe, "folder": str(stage.folder)}
        row |= {"finished": "outputs" in entry, "seconds": entry.get("seconds"), "steps": entry.get("steps")}
        if evaluation := entry.get("evaluation"):
            row["accuracy"] = evaluation["pass_at"]["1"]
            row |= {name: evaluation[name] for name in ("problems", "format", "mean_length")}
        elif stage.recipe == "distill" and row["finished"]:
            row["rows"] = json.loads((stage.folder / "shards/manifest.json").read_text())["rows"]
        rows.append(row)
    return rows


def result_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows for people."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    for head in ("run folder", "recipe"):
        table.add_column(head, no_wrap=True)
    for head in ("held-out accuracy", "format", "tokens", "steps", "time"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        measured = ["", "", ""]
        if accuracy := row.get("accuracy"):
            measured = [str(Estimate(**accuracy)), f"{100 * row['format']:.0f} %", f"{row['mean_length']:.1f}"]
        elif "rows" in row:
            measured[0] = f"{row['rows']:,} rows"
        elif not row["finished"]:
            measured[0] = "not finished"
        steps = "" if row["steps"] is None else f"{row['steps']:,}"
        seconds = "" if row["seconds"] is None else f"{row['seconds'] // 60:.0f}:{row['seconds'] % 60:02.0f}"
        table.add_row(*map(Text, (Path(row["folder"]).name, row["recipe"], *measured, steps, seconds)))
    return table


def plan_table(stages: Sequence[Stage]) -> Table:
    """The stages before they run."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for head in ("stage", "recipe", "from", "folder"):
        table.add_column(head, overflow="fold")
    for stage in stages:
        made_of = ", ".join((*stage.needs, *stage.built_in)) or "–"
        table.add_row(*map(Text, (stage.name, f"python -m recipes.{stage.recipe}", made_of, str(stage.folder))))
    return table


def arguments(argv: Sequence[str]) -> list[str]:
    """The command's arguments: --from as the field it stands for, and the tiny chain where no file is named."""
    whole = ["--from_stage" + a[len("--from") :] if a == "--from" or a.startswith("--from=") else a for a in argv]
    named = any(a.split("=")[0] in ("--config", "--stages") for a in whole)
    return whole if named else ["--config", str(TINY), *whole]


if __name__ == "__main__":
    sys.exit(
        main(ChainConfig, run, prog="python -m recipes.r1", description=__doc__ or "", argv=arguments(sys.argv[1:]))
    )
