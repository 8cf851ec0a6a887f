"""`python -m recipes.sft` as a person runs it: what it prints, what it refuses, and whether the tiny model learns."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

import deepseek_v3
from recipes.cli import main
from recipes.sft import TINY, run, show_samples, with_default
from recipes.tiny import make_tokenizer
from runtime.metrics import read_metrics
from runtime.models import load_causal_lm, load_tokenizer
from sft.config import SFTConfig
from sft.evaluate import Accuracy

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    config = deepseek_v3.preset(
        "tiny", hidden_size=16, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
        intermediate_size=16, moe_intermediate_size=8, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        deepseek_v3.DeepseekV3ForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def rows(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    turns = [[("user", f"{i}+{i}?"), ("assistant", str(2 * i))] for i in range(4)]
    messages = [[dict(role=role, content=content) for role, content in talk] for talk in turns]
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in messages))
    return path


@pytest.fixture
def arguments(model, rows, tmp_path) -> list[str]:
    """Of a run of two steps."""
    settings = dict(model=model, mix=rows, row_length=32, rows_per_step=2, token_cache=tmp_path / "tokens", workers=1)
    return [f"--{name}={value}" for name, value in (settings | dict(run_dir=tmp_path / "run")).items()]


def command(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "recipes.sft", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def refused(capsys):
    """What the command says to these arguments, in a line, after which it ends with 2."""

    def say(*arguments: object) -> str:
        try:
            code = main(SFTConfig, run, prog="sft", description="", argv=with_default(list(map(str, arguments))))
        except SystemExit as left:
            code = left.code
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sft: error: ")]
        assert code == 2 and len(said) == 1
        return said[0]

    return say


def test_a_run_ends_with_0_and_says_where_everything_is(arguments, capsys, tmp_path):
    assert main(SFTConfig, run, prog="sft", description="", argv=with_default(arguments)) == 0
    assert f"{tmp_path / 'run'}/checkpoints/final" in capsys.readouterr().out.replace("\n", "")
    assert {m["step"] for m in read_metrics(tmp_path / "run/metrics.jsonl")} == {0, 1, 2}
    load_causal_lm(tmp_path / "run/checkpoints/final")


def test_a_missing_file_is_refused(refused, arguments):
    assert "/nowhere/x.jsonl" in refused(*arguments, "--mix=/nowhere/x.jsonl")


def test_a_misspelt_setting_is_refused_with_the_one_it_may_be(refused, arguments):
    assert "optim.lrr is not a setting (flag --optim.lrr); did you mean optim.lr?" in refused("--optim.lrr", "1e-5")


def test_an_empty_mix_is_refused(refused, arguments, tmp_path):
    assert "mix: give at least one source" in refused(*arguments, "--mix=[]")
    (tmp_path / "empty.jsonl").write_text("")
    assert "empty.jsonl" in refused(*arguments, f"--mix={tmp_path / 'empty.jsonl'}")


def test_a_source_all_of_whose_examples_are_too_long_is_refused_with_the_reason(refused, arguments, tmp_path):
    said = refused(*arguments, "--row_length=4")
    assert "rows can't be used" in said and "4 × longer than 4 tokens" in said and "rejects.jsonl" in said
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_missing_model_and_a_used_folder_are_refused(refused, arguments, tmp_path):
    assert "no such folder" in refused(*arguments, f"--model={tmp_path / 'nowhere'}")
    (tmp_path / "run/checkpoints/step-000001").mkdir(parents=True)
    assert "already holds a run" in refused(*arguments)


@pytest.mark.slow
def test_as_a_process_it_ends_with_0_and_refuses_with_2_and_one_line(arguments):
    ended = command(*arguments)
    assert ended.returncode == 0 and "Traceback" not in ended.stderr and "4 samples" in ended.stderr, ended.stderr
    ended = command(*arguments, "--mix=/nowhere/x.jsonl", arguments[-1] + "-2")
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert [line for line in ended.stderr.splitlines() if "error" in line] == [ended.stderr.splitlines()[-1]]


def test_the_tiny_run_is_the_default_unless_a_file_or_a_model_is_named():
    assert with_default(["--seed", "1"]) == ["--config", str(TINY), "--seed", "1"]
    assert with_default(["--model=x"]) == ["--model=x"] and with_default(["--config", "y"]) == ["--config", "y"]


def test_a_preview_shows_examples_and_starts_no_run(arguments, capsys, tmp_path):
    assert main(SFTConfig, run, prog="sft", description="", argv=[*arguments, "--preview=2"]) == 0
    assert "0+0?" in capsys.readouterr().out and not (tmp_path / "run").exists()


def test_shown_model_text_can_not_take_over_the_terminal():
    said: Any = SimpleNamespace(
        question="[bold]2?[/bold]", text="\x1b[31m\u202e[red]ok[/red]\x07", grades={"accuracy": 1.0}
    )
    accuracy = Accuracy(mean=1.0, low=0.5, high=1.0, format=1.0, problems=1, samples=(said,))
    console = Console(record=True, width=80, file=io.StringIO())
    show_samples("after", accuracy, console)
    shown = console.export_text()
    assert "[red]ok[/red]" in shown and "[bold]2?[/bold]" in shown
    assert not set("\x1b\u202e\x07") & set(shown)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_tiny_run_learns_in_minutes_what_grpo_starts_from(seed, tmp_path):
    ended = command("--seed", seed, "--run_dir", tmp_path / "run", XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert ended.returncode == 0, ended.stderr
    evaluations = [m for m in read_metrics(tmp_path / "run/metrics.jsonl") if "eval/loss" in m]
    assert evaluations[0]["eval/accuracy"] < 0.05 and evaluations[0]["eval/loss"] > 5
    assert evaluations[-1]["eval/loss"] < 1 and evaluations[-1]["eval/format"] > 0.2
    assert evaluations[-1]["eval/accuracy"] > evaluations[0]["eval/accuracy"] + 0.1
    assert load_tokenizer(tmp_path / "run/checkpoints/final").chat_template
