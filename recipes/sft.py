"""`python -m recipes.sft`: fine-tune any causal LM on a mix of examples; with no arguments, the tiny DeepSeek-V3.

The tiny run is recipes/configs/sft_tiny.yaml: from random weights to a model that answers the built-in stories, and
from which `python -m recipes.grpo` goes on. It ends with held-out accuracy before and after, the curves, and sample
completions.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState
from rich.console import Console
from rich.text import Text

from recipes.cli import main
from recipes.tiny import random_checkpoint
from runtime.metrics import read_metrics
from runtime.models import load_tokenizer
from runtime.progress import terminal_plot, visible
from sft.config import SFTConfig
from sft.data import set_template
from sft.evaluate import Accuracy
from sft.guard import preview
from sft.train import Result, train

TINY = Path(__file__).parent / "configs/sft_tiny.yaml"


def run(config: SFTConfig) -> int:
    """Train and show what came of it; returns the exit code."""
    models = {"tiny": lambda: random_checkpoint(seed=config.seed)}
    if config.preview:
        tokenizer = load_tokenizer(models[config.model]() if config.model in models else config.model)
        set_template(tokenizer, config.chat_template)
        preview(config.sources, tokenizer, config.preview, train_turns=config.train_turns, console=Console())
        return 0
    result = train(config, named_models=models)
    if PartialState().is_main_process:
        show(result, Console())
    return result.exit_code


def show(result: Result, console: Console) -> None:
    """The end of a run: curves, samples, accuracy, and where everything is."""
    metrics = read_metrics(result.run_dir / "metrics.jsonl")
    series = {
        "loss": [m["loss"] for m in metrics if m.get("loss") is not None],
        "held-out loss": [m["eval/loss"] for m in metrics if m.get("eval/loss") is not None],
    }
    if any(len(values) > 1 for values in series.values()):
        console.print(Text(terminal_plot({name: values for name, values in series.items() if len(values) > 1})))
    for title, accuracy in (("before", result.before), ("after", result.after)):
        if accuracy is not None:
            show_samples(title, accuracy, console)
    evaluations = [m for m in metrics if m.get("eval/loss") is not None]
    if len(evaluations) > 1:
        first, last = evaluations[0]["eval/loss"], evaluations[-1]["eval/loss"]
        console.print(Text(f"\nheld-out loss       {first:.3f}  →  {last:.3f}"))
    if result.before and result.after:
        console.print(Text(f"held-out accuracy   {_percent(result.before)}  →  {_percent(result.after)}"))
        console.print(Text(f"({result.after.problems} problems never trained on, sampled once each; 95 % intervals)"))
    if result.exit_code:
        console.print(Text(f"left after step {result.steps}, saved; the same command with --resume goes on"))
    else:
        console.print(Text(f"model               {result.run_dir / 'checkpoints/final'}"))
    console.print(Text(f"run folder          {result.run_dir}  (open report.html)"))


def show_samples(title: str, accuracy: Accuracy, console: Console, count: int = 2) -> None:
    """A few problems with what the model said. Model text is hostile: shown with its controls spelled out."""
    console.print(Text(f"\n{title}:", style="bold"))
    for sample in accuracy.samples[:count]:
        console.print(Text("  " + visible(sample.question, keep=""), style="dim"))
        shown = visible(sample.text, keep="\n").replace("\n", " ⏎ ")
        right = sample.grades["accuracy"] == 1
        console.print(Text(f"  {'✓' if right else '✗'} {shown}", style="green" if right else "red"))


def _percent(accuracy: Accuracy) -> str:
    return f"{100 * accuracy.mean:.1f} % [{100 * accuracy.low:.1f}, {100 * accuracy.high:.1f}]"


def with_default(arguments: Sequence[str]) -> list[str]:
    """The command's arguments; the tiny run's file first where neither a file nor a model is named."""
    named = any(argument.split("=")[0] in ("--config", "--model") for argument in arguments)
    return list(arguments) if named else ["--config", str(TINY), *arguments]


if __name__ == "__main__":
    sys.exit(
        main(SFTConfig, run, prog="python -m recipes.sft", description=__doc__ or "", argv=with_default(sys.argv[1:]))
    )
