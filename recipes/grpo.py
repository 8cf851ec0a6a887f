"""`python -m recipes.grpo`: GRPO on any causal LM; with no arguments, on the built-in tiny DeepSeek-V3.

The tiny run first makes the model (a short SFT on two habits, cached), then lets GRPO find out which habit pays,
and ends with held-out accuracy before and after, the curves, and sample completions.
"""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.console import Console
from rich.text import Text

from recipes.cli import main
from rl.config import GRPOConfig
from rl.evaluate import Estimate, Evaluation
from rl.train import Result, train
from runtime.metrics import read_metrics
from runtime.progress import terminal_plot, visible


def run(config: GRPOConfig) -> int:
    """Train and show what came of it; returns the exit code."""
    result = train(config, named_models={"tiny": lambda: tiny_model(Console(stderr=True))})
    if PartialState().is_main_process:
        show(result, Console())
    return result.exit_code


def tiny_model(console: Console) -> Path:
    """The warmed-up tiny model, made now if the cache doesn't hold it."""
    from recipes.tiny import tiny_checkpoint

    began = time.monotonic()
    folder = tiny_checkpoint()
    seconds = time.monotonic() - began
    console.print(Text(f"tiny model: {folder}" + (f" (made in {seconds:.0f} s)" if seconds > 5 else " (cached)")))
    return folder


def show(result: Result, console: Console) -> None:
    """The end of a run: curves, samples, accuracy, and where everything is."""
    metrics = read_metrics(result.run_dir / "metrics.jsonl")
    series = {
        "reward": [m["reward"] for m in metrics if m.get("reward") is not None],
        "tokens per completion": [m["completions/mean_length"] for m in metrics if "reward" in m],
    }
    if len(series["reward"]) > 1:
        console.print(Text(terminal_plot(series)))
    for title, evaluation in (("before", result.before), ("after", result.after)):
        if evaluation is not None:
            show_samples(title, evaluation, console)
    evaluations = [m for m in metrics if m.get("eval/problems")]
    whole = [m for m in evaluations if m["eval/problems"] == max(e["eval/problems"] for e in evaluations)]
    if result.after is not None:
        show_change(whole[0], whole[-1], console)
    if result.exit_code:
        console.print(Text(f"left after step {result.steps}, saved; the same command with --resume goes on"))
    console.print(Text(f"run folder          {result.run_dir}  (open report.html)"))


def show_change(before: Mapping[str, Any], after: Mapping[str, Any], console: Console) -> None:
    """Held-out accuracy and habits, first and last; also of a run that was resumed in between."""

    def accuracy(m: Mapping[str, Any]) -> str:
        return str(Estimate(mean=m["eval/accuracy"], low=m["eval/accuracy_low"], high=m["eval/accuracy_high"]))

    lines = {
        "held-out accuracy": [accuracy(m) for m in (before, after)],
        "right format": [f"{100 * m['eval/format']:.0f} %" for m in (before, after)],
        "shows its work": [f"{100 * m['eval/thinking_fraction']:.0f} %" for m in (before, after)],
        "tokens per answer": [f"{m['eval/mean_length']:.1f}" for m in (before, after)],
    }
    console.print()
    for name, (first, last) in lines.items():
        console.print(Text(f"{name:20}{first}  →  {last}"))
    console.print(Text(f"({after['eval/problems']:.0f} problems never trained on, sampled once each; 95 % intervals)"))


def show_samples(title: str, evaluation: Evaluation, console: Console, count: int = 2) -> None:
    """A few held-out problems with what the model said. Model text is hostile: shown with its controls spelled out."""
    console.print(Text(f"\n{title}:", style="bold"))
    for group in evaluation.groups[:count]:
        content = group.prompt.content
        question = content if isinstance(content, str) else content[-1]["content"]
        right = group.parts["accuracy"][0] == 1
        console.print(Text("  " + visible(question, keep=""), style="dim"))
        answer = visible(group.texts[0], keep="\n").replace("\n", " ⏎ ")
        console.print(Text(f"  {'✓' if right else '✗'} {answer}", style="green" if right else "red"))


if __name__ == "__main__":
    sys.exit(main(GRPOConfig, run, prog="python -m recipes.grpo", description=__doc__))
