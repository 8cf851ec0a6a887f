"""Benchmarks run from end to end at the smallest sizes, and their gates close on what is wrong."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from benchmarks import _fp8_gpu, fp8_cost
from benchmarks._common import alternate, make_checkpoint, ratio, spread
from benchmarks.head import difference, full_logprobs
from benchmarks.learning import interval
from benchmarks.sampling import gap
from benchmarks.update import Case
from recipes.tiny import tiny_checkpoint
from runtime.logprobs import token_logprobs

ROOT = Path(__file__).resolve().parents[2]


def run(name: str, *arguments: str, rounds: bool = True, threads: bool = True) -> str:
    """The output of a benchmark; fails with its errors where it fails. rounds, threads: whether it has such options."""
    options = [*(("--rounds", "1") if rounds else ()), *(("--threads", "1") if threads else ())]
    command = [sys.executable, "-m", f"benchmarks.{name}", *options, *arguments]
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


@pytest.mark.slow
def test_update_passes_its_gate_and_prints_a_row_for_each_case() -> None:
    pytest.importorskip("trl", reason="TRL is not installed")
    sizes = ["--mean", "4", "--longest", "12", "--groups", "1"]
    printed = run("update", "--preset", "tiny", "--prompt", "8", "--equal", "4", *sizes)
    rows = printed.splitlines()[-2:]
    assert [row.split(" | ")[0] for row in rows] == ["| tiny, 1 × 8, P 8, C 4 to 12", "| tiny, 1 × 8, P 4, C 4 equal"]


@pytest.mark.slow
def test_learning_compares_curves_and_held_out_accuracy(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="TRL is not installed")
    folder = make_checkpoint(tmp_path / "model", "tiny")
    sizes = ["--steps", "2", "--prompts", "2", "--group", "2", "--tokens", "4", "--held_out", "4"]
    command = ["--model", str(folder), "--seeds", "0", *sizes]
    printed = run("learning", *command, rounds=False)
    assert printed.count("seed 0, ") == 2
    assert printed.splitlines()[-1].startswith("| native | +0.000 [-inf, +inf] | +0.000 [")  # no one is right by chance


@pytest.mark.slow
def test_sync_reports_its_share_of_a_step() -> None:
    small = ["--prompts", "2", "--group", "2", "--tokens", "4", "--steps", "1"]
    printed = run("sync", "--preset", "tiny", "--random", "--backend", "native", *small)
    assert printed.splitlines()[-1].startswith("| tiny | native | 37, 3.7 | ")


@pytest.mark.slow
def test_head_passes_its_gate_and_prints_a_row_for_each_chunk() -> None:
    printed = run("head", "--shape", "64x512", "--hidden", "16", "--chunk", "10", "12")
    assert [row.split(" | ")[1] for row in printed.splitlines()[-3:]] == ["all", "2^10", "2^12"]


@pytest.mark.slow
def test_gpu_runs_on_a_cpu_at_the_smallest_size() -> None:
    printed = run("gpu", "--device", "cpu", "--tiny", "--precision", "fp32", threads=False)
    rows = [row.split(" | ") for row in printed.splitlines() if row.startswith("| ")]
    assert [row[1] for row in rows if row[0].startswith("| head")] == ["ours", "all logits"]
    assert [row[1] for row in rows if row[0] == "| quantise 33 × 200"] == ["ours", "torch.compile", "copy (bf16)"]


@pytest.mark.slow
def test_fp8_costs_a_trained_model_little() -> None:
    """Measured: mean 0.008 and largest 1.1 nats, 1.4 % of flips; bf16 alone 0.002, 0.2 and 0.2 %."""
    costs = fp8_cost.costs(tiny_checkpoint())
    for eight, plain in (("fp8", "fp32"), ("fp8 + bf16", "bf16"), ("fp8 + bf16", "fp32")):
        cost = costs[eight, plain]
        assert 1e-3 < cost.mean < 0.025 and cost.high < 0.6 and cost.max < 4
        assert 1e-3 < cost.flips < 0.04 and cost.weight > 0.98
        assert cost.held < 1.2 * cost.mean
    assert costs["bf16", "fp32"].mean < costs["fp8", "fp32"].mean


def test_fp8_cost_is_that_of_the_sampled_tokens() -> None:
    cost = fp8_cost.cost(torch.tensor([2.0, 0.5]).log(), torch.tensor([-0.2, 0.1, 0.0]), 3, 12)
    assert (cost.mean, cost.held, cost.flips) == (pytest.approx(0.6931, abs=1e-4), pytest.approx(0.1), 0.25)
    assert cost.weight == pytest.approx(2.5**2 / (2 * 4.25))
    wide = fp8_cost.cost(torch.tensor([-3.0] + [0.1] * 199), torch.zeros(1), 0, 1)
    assert (wide.max, wide.high) == (3.0, pytest.approx(0.1))


def test_fp8_cost_of_a_model_against_itself_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint(tmp_path / "model", "tiny")
    random = fp8_cost.costs(folder, prompts=2, group=2)
    assert random["fp8", "fp32"].mean > 3 * random["bf16", "fp32"].mean > 0
    assert random["fp8", "fp32"].flips > random["bf16", "fp32"].flips > 0
    assert random["fp8", "fp32"].held != random["fp8", "fp32"].mean and 0.9 < random["fp8", "fp32"].weight < 1
    monkeypatch.setattr(fp8_cost, "use_fp8", lambda *_: None)
    none = fp8_cost.costs(folder, prompts=2, group=2)
    assert none["fp8", "fp32"] == fp8_cost.Cost(mean=0.0, high=0.0, max=0.0, flips=0.0, held=0.0, weight=1.0)
    assert none["fp8 + bf16", "fp32"] == none["bf16", "fp32"] == random["bf16", "fp32"]


def _all_codes_one_off(q: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (q.view(torch.uint8) ^ 1).view(q.dtype), scale


def _a_code_two_off(q: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    q.view(torch.uint8)[0, 0] ^= 2
    return q, scale


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("scaled_mm", lambda out: out.float() * 1.01),
        ("grouped_scaled_mm", lambda out: out.float() * 1.01),
        ("quantise_activations", lambda out: _a_code_two_off(*out)),
        ("quantise_weight", lambda out: _a_code_two_off(*out)),
        ("silu_mul_quantise", lambda out: _all_codes_one_off(*out)),
    ],
)
def test_fp8_gate_closes_on_what_is_wrong(name: str, spoil: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, right = torch.device("cpu"), getattr(_fp8_gpu.fp8, name)
    assert _fp8_gpu.measure(cpu, tiny=True, rounds=1) is not None
    monkeypatch.setattr(_fp8_gpu.fp8, name, lambda *args: spoil(right(*args)))
    assert _fp8_gpu.measure(cpu, tiny=True, rounds=1) is None


def test_fp8_rows_that_there_is_no_time_for_are_named() -> None:
    names = ["33 × 130 × 200", "3 experts × 130 × 200", "quantise 33 × 200"]
    late = [f"{name}: out of time" for name in names]
    assert _fp8_gpu.measure(torch.device("cpu"), tiny=True, rounds=1, until=0.0) == ([], late)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_says_that_there_is_none() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "no CUDA device: nothing is measured" in done.stderr and "Triton" in done.stderr


TRAINING = ["rl.train", "rl.update", "rl.evaluate", "sampling.native", "sampling.backend", "runtime.packed"]
TRAINING += ["deepseek_v3.decode", "deepseek_v3.routing", "benchmarks._update_gpu"]
NEITHER = ("vllm", "trl", "datasets")


@pytest.mark.parametrize(
    ("modules", "without"),
    [
        pytest.param(TRAINING, NEITHER, id="training"),
        pytest.param(
            ["benchmarks.gpu", "sampling.native"],
            (*NEITHER, "triton", "accelerate", "jsonargparse", "peft"),
            id="the FP8 part",
        ),
    ],
)
def test_code_for_gpus_imports_without_what_their_machine_lacks(modules: list[str], without: tuple[str, ...]) -> None:
    code = f"""
import importlib, sys

sys.modules |= dict.fromkeys({without!r})  # an import of them fails
for name in {modules!r}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_skewed_lengths_have_the_mean_and_the_longest_asked_for() -> None:
    case = Case(preset="5m", groups=4, prompt=64, mean=128, longest=512)
    assert max(case.lengths) == 512
    assert case.tokens / 32 == pytest.approx(128, abs=3)
    padded, packed = case.ceilings
    assert padded == pytest.approx(32 * 576 / (4 * 64 + case.tokens))
    assert packed == pytest.approx((32 * 64 + case.tokens) / (4 * 64 + case.tokens))
    assert set(Case(preset="5m", groups=1, prompt=16, mean=128, longest=128).lengths) == {128}


def test_full_logprobs_are_the_chunked_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(4, 10, bias=False)
    hidden, targets = torch.randn(7, 4, generator=generator), torch.tensor([0, 9, 3, 3, 1, 2, 8])
    ours = token_logprobs(head, hidden, targets, vocab_size=10, chunk_elements=20)
    theirs = full_logprobs(head, hidden, targets)
    assert difference([x.tolist() for x in ours], [x.tolist() for x in theirs]) < 1e-6
    assert difference([[1.0, 2.0]], [[1.0, 2.2]]) == pytest.approx(0.2 / (1 + 2.2**2) ** 0.5)


def test_interval_is_around_the_mean() -> None:
    mean, low, high = interval([0.1, 0.3, 0.5])
    assert (mean, (low + high) / 2) == (pytest.approx(0.3), pytest.approx(0.3))
    assert high - mean == pytest.approx(4.303 * 0.2 / 3**0.5)
    assert interval([0.3]) == (0.3, -float("inf"), float("inf"))


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
