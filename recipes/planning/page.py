"""A plan -> a page for a terminal, or plain values for JSON."""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from recipes.planning.plan import Fact, Plan
from runtime.planning.layout import GIB, USABLE
from runtime.planning.memory import total


def show(plan: Plan, console: Console) -> None:
    """The plan of one recipe."""
    census = plan.census
    size = f"{census.total:,} parameters, {census.activated:,} for a token"
    console.print(Text(f"{plan.recipe} of {plan.model} on {plan.layout.gpus} × {plan.gpu.name}", style="bold"))
    console.print(Text(f"{size}\nlayout: {plan.layout}, {plan.status}\n"))
    console.print(_memory(plan))
    phase, peak = plan.peak
    room = f"{size_text(plan.limit)}, {USABLE:.0%} of its {size_text(plan.gpu.memory)}"
    verdict = f"fits: {size_text(peak)} ({phase}) of {room}"
    if not plan.fits:
        verdict = f"does not fit: {size_text(peak)} ({phase}), more than {room}"
    console.print(Text(verdict, style="bold green" if plan.fits else "bold red"))
    console.print()
    console.print(_facts(plan))
    for note in plan.notes:
        console.print(Text(f"• {note}"))
    console.print()
    for command in plan.commands:
        console.print(Text(command), soft_wrap=True)  # to be copied: never broken
    console.print()


def as_json(plan: Plan) -> dict[str, Any]:
    """Everything on the page, unrounded; a phase's total is the sum of its lines."""
    census, layout = plan.census, plan.layout
    lines = [
        {
            "name": line.name,
            "formula": line.formula,
            "bytes": {phase: line.bytes.get(phase, 0) for phase in plan.phases},
        }
        for line in plan.lines
    ]
    return {
        "model": plan.model,
        "parameters": {"total": census.total, "activated": census.activated},
        "gpu": plan.gpu.name,
        "layout": {
            "gpus": layout.gpus,
            "shards": layout.shards,
            "expert": layout.expert,
            "tensor": layout.tensor,
            "pipeline": layout.pipeline,
            "launched_by_a_recipe": layout.launched,
        },
        "memory": {"lines": lines, "totals": {phase: total(plan.lines, phase) for phase in plan.phases}},
        "limit": plan.limit,
        "fits": plan.fits,
        "facts": {fact.name: {"value": fact.value, "unit": fact.unit, "how": fact.how} for fact in plan.facts},
        "notes": plan.notes,
        "commands": plan.commands,
    }


def size_text(size: float) -> str:
    """Bytes in the unit that leaves a figure of one to four digits."""
    for unit, name in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:,.1f} {name}"
    return f"{size:.0f} B"


def fact_text(fact: Fact) -> str:
    """A figure with its unit."""
    if fact.value >= 1e7:
        return f"{fact.value:.3g} {fact.unit}"
    return f"{fact.value:,.0f} {fact.unit}" if fact.value >= 100 else f"{fact.value:.3g} {fact.unit}"


def _memory(plan: Plan) -> Table:
    table = Table(title=f"memory of the fullest {plan.gpu.name}", title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for phase in plan.phases:
        table.add_column(phase, justify="right")
    table.add_column("is", style="dim")
    for line in plan.lines:
        if any(line.bytes.values()):
            cells = [size_text(line.bytes[p]) if line.bytes.get(p) else "" for p in plan.phases]
            table.add_row(line.name, *cells, line.formula)
    table.add_row("total", *(size_text(total(plan.lines, phase)) for phase in plan.phases), style="bold")
    return table


def _facts(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    for fact in plan.facts:
        table.add_row(fact.name, fact_text(fact), Text(fact.how, style="dim"))
    return table
