"""`python -m recipes.grpo` as a person runs it: the summary, the errors, and whether the tiny model really learns."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from recipes.grpo import show_samples
from rl.evaluate import Estimate, Evaluation
from rl.types import Group, Prompt
from runtime.metrics import read_metrics

ROOT = Path(__file__).parents[2]
GSM8K = ROOT.parent / "shared/data/gsm8k"


def grpo(*arguments, **kwargs):
    command = [sys.executable, "-m", "recipes.grpo", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **kwargs)


def held_out(run_dir):
    """The closing evaluations before and after, on all held-out problems."""
    lines = [m for m in read_metrics(run_dir / "metrics.jsonl") if m.get("eval/problems", 0) >= 100]
    return lines[0], lines[-1]


def test_shown_model_text_can_not_take_over_the_terminal():
    prompt = Prompt(index=0, epoch=0, seed=0, content="[bold]2?[/bold]", ids=[1], columns={})
    group = Group(prompt=prompt, completions=[], texts=["\x1b[31m\u202e[red]ok[/red]"], parts={"accuracy": [1.0]})
    estimate = Estimate(mean=1.0, low=0.5, high=1.0)
    evaluation = Evaluation(
        problems=1, unknown=0, pass_at={1: estimate}, format=1.0, mean_length=1.0, thinking=0.0, truncated=0.0,
        groups=[group],
    )  # fmt: skip
    console = Console(record=True, width=80, file=io.StringIO())
    show_samples("after", evaluation, console)
    shown = console.export_text()
    assert "[red]ok[/red]" in shown and "[bold]2?[/bold]" in shown
    assert "\x1b" not in shown and "\u202e" not in shown


@pytest.mark.slow
def test_bad_input_ends_with_2_and_one_line(tmp_path):
    unknown = grpo("--optim.lrr", "1e-5")
    assert unknown.returncode == 2 and "optim.lr" in unknown.stderr and "Traceback" not in unknown.stderr
    cut = grpo("--sampling.top_p", "0.9")
    assert cut.returncode == 2 and "sampling.top_p=0.9" in cut.stderr
    missing = grpo("--model", tmp_path / "nowhere", "--run_dir", tmp_path / "run")
    assert missing.returncode == 2 and "no such folder" in missing.stderr and "Traceback" not in missing.stderr


@pytest.mark.nightly
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_thirty_points_on_every_seed_and_the_run_shows_why(seed, tmp_path):
    result = grpo("--seed", seed, "--run_dir", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    before, after = held_out(tmp_path / "run")
    assert after["eval/accuracy"] >= before["eval/accuracy"] + 0.30
    assert after["eval/thinking_fraction"] > before["eval/thinking_fraction"] + 0.3
    assert after["eval/mean_length"] > before["eval/mean_length"] + 5
    assert max(m.get("sampling/logp_gap/mean", 0) for m in read_metrics(tmp_path / "run/metrics.jsonl")) < 0.02
    for shown in ("held-out accuracy", "tokens per completion", "shows its work", "report.html"):
        assert shown in result.stdout


@pytest.mark.nightly
def test_native_sampler_learns_alike(tmp_path):
    assert grpo("--sampling.backend", "native", "--run_dir", tmp_path / "run").returncode == 0
    before, after = held_out(tmp_path / "run")
    assert after["eval/accuracy"] >= before["eval/accuracy"] + 0.30


@pytest.mark.nightly
@pytest.mark.skipif(not GSM8K.exists(), reason="GSM8K is not beside the checkout (../shared/data/gsm8k)")
def test_format_reward_rises_above_090_on_gsm8k(tmp_path):
    result = grpo(
        *("--data", GSM8K / "train.jsonl", "--rewards", json.dumps({"accuracy": 1.0, "format": 1.0})),
        *("--sampling.max_tokens", 64, "--sampling.backend", "native", "--steps", 20, "--run_dir", tmp_path / "run"),
    )
    assert result.returncode == 0, result.stderr
    formats = [m["rewards/format/mean"] for m in read_metrics(tmp_path / "run/metrics.jsonl") if "reward" in m]
    assert formats[0] < 0.85
    assert sum(formats[-3:]) / 3 > 0.9
