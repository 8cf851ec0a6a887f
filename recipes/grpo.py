"""`python -m recipes.grpo`: GRPO on any causal LM; with no arguments, on the built-in tiny DeepSeek-V3.

The tiny run first makes the model (a short SFT on two habits, cached), then lets GRPO find out which habit pays,
and ends with held-out accuracy before and after, the curves, and sample completions.
"""

import sys
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

from recipes.cli import main
from rl.config import GRPOConfig
from rl.evaluate import Evaluation
from rl.train import Result, train
from runtime.metrics import read_metrics
from runtime.progress import terminal_plot, track_steps, visible


def run(config: GRPOConfig) -> int:
    """Train and show what came of it; returns the exit code."""
    result = train(config, named_models={"tiny": lambda: tiny_model(Console(stderr=True))})
    show(result, Console())
    return result.exit_code


def tiny_model(console: Console) -> Path:
    """The warmed-up tiny model, made now if the cache doesn't hold it."""
    from recipes.tiny import SFT, tiny_checkpoint

    began = time.monotonic()
    with track_steps(SFT.steps, "warm-up: SFT of the tiny DeepSeek-V3", console=console) as tracker:

        def on_step(step: int, metrics: dict[str, float]) -> None:
            if step % 20 == 0 or step == SFT.steps:
                tracker.update(step, metrics)

        folder = tiny_checkpoint(on_step=on_step)
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
    if result.before and result.after:
        console.print(Text(f"\nheld-out accuracy   {result.before.accuracy}  →  {result.after.accuracy}"))
        console.print(
            Text(
                f"shows its work      {100 * result.before.thinking:.0f} %  →  {100 * result.after.thinking:.0f} %\n"
                f"tokens per answer   {result.before.mean_length:.1f}  →  {result.after.mean_length:.1f}\n"
                f"({result.after.problems} problems never trained on, sampled once each; 95 % intervals)"
            )
        )
    elif result.after:
        console.print(Text(f"\nheld-out accuracy   {result.after.accuracy} of {result.after.problems} problems"))
    if result.exit_code:
        console.print(Text(f"left after step {result.steps}, saved; the same command with --resume goes on"))
    console.print(Text(f"run folder          {result.run_dir}  (open report.html)"))


def show_samples(title: str, evaluation: Evaluation, console: Console, count: int = 2) -> None:
    """A few held-out problems with what the model said. Model text is hostile: shown with its controls spelled out."""
    console.print(Text(f"\n{title}:", style="bold"))
    for group in evaluation.groups[:count]:
        content = group.prompt.content
        question = content if isinstance(content, str) else content[-1]["content"]
        right = group.parts["accuracy"][0] == 1
        console.print(Text("  " + visible(question, keep=""), style="dim"))
        answer = visible(group.texts[0], keep="").replace("\\n", " ⏎ ")
        console.print(Text(f"  {'✓' if right else '✗'} {answer}", style="green" if right else "red"))


if __name__ == "__main__":
    sys.exit(main(GRPOConfig, run, prog="python -m recipes.grpo", description=__doc__))
