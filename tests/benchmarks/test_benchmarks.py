"""Benchmarks run from end to end at the smallest sizes, and their gates close on what is wrong."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

from benchmarks._common import alternate, make_checkpoint, ratio, spread
from benchmarks.sampling import gap

ROOT = Path(__file__).resolve().parents[2]


def run(name: str, *arguments: str) -> str:
    """The output of a benchmark; fails with its errors where it fails."""
    command = [sys.executable, "-m", f"benchmarks.{name}", "--rounds", "1", "--threads", "1", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_sampling_passes_its_gate_and_prints_a_table() -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    printed = run("sampling", "--rows", "8", "--tokens", "4")
    assert printed.count("from transformers' (≤ 1e-05)") == 3
    assert "| 8 × 4 | " in printed


@pytest.mark.slow
def test_grpo_step_passes_its_gate_and_prints_a_table() -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    pytest.importorskip("trl", reason="TRL is not installed")
    printed = run("grpo_step", "--prompts", "2", "--group", "2", "--tokens", "4", "--steps", "1")
    assert [line.split(" | ")[0] for line in printed.splitlines()[-3:]] == ["| TRL", "| ours, native", "| ours, vLLM"]


def test_gap_is_how_far_a_sampler_is_from_transformers(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", "tiny")
    model = transformers.DeepseekV3ForCausalLM.from_pretrained(folder)
    prompt, ids = [0, 7, 8], [9, 10]
    with torch.no_grad():
        table = model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
    right = [float(table[2, 9]), float(table[3, 10])]
    assert gap(model, [(prompt, ids, right)]) < 1e-6
    assert gap(model, [(prompt, ids, right), (prompt, ids, [right[0], right[1] + 0.4])]) == pytest.approx(0.1, abs=1e-5)


def test_ratio_is_taken_round_by_round() -> None:
    assert ratio([1.0, 10.0, 2.0], [2.0, 30.0, 8.0]) == "3.00 (2.00 to 4.00)×"
    assert spread([3.0, 1.0, 2.0], ".1f") == "2.0 (1.0 to 3.0)"


def test_contestants_take_turns_in_a_rotating_order() -> None:
    a, b, c = (SimpleNamespace(name=name) for name in "abc")
    order = "".join(f"{contestant.name}" for _, contestant in alternate([a, b, c], 4))
    assert order == "abcbcacababc"
