"""CUDA computes what the CPU computes: attention, an update, samples, a short run. Needs no vLLM, TRL or datasets."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch

from benchmarks._common import make_checkpoint
from benchmarks.update import Case, Recorder, make_groups, make_policy
from deepseek_v3.attention import packed_attention
from deepseek_v3.packing import Layout
from rl.policy import Policy
from rl.update import update
from runtime.weights import checkpoint_tensors
from sampling.native import NativeSampler
from sampling.protocol import SamplingParams

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CASE = Case(preset="tiny", groups=3, prompt=9, mean=20, longest=60)


@pytest.fixture(autouse=True)
def no_tf32() -> Iterator[None]:
    """fp32 products as on a CPU."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("gpu") / "model", "tiny")


def policy_on(folder: Path, device: str) -> Policy:
    policy = make_policy(folder)
    policy.world.device = torch.device(device)
    policy.model.to(device)
    return policy


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.cpu() - b.cpu()).norm() / b.cpu().norm())


LAYOUTS = [
    Layout([0, 17]),
    Layout([0, 4, 44, 47, 48, 57]),
    Layout([0, 5, 8, 12, 32, 33], [-1, 0, 0, 0, 0]),
    Layout([0, 300, 420, 700, 710, 1000, 1300], [-1, 0, 0, -1, 3, 3]),  # longer than a block of the mask
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("v_size", [96, 64])
def test_flex_attention_is_the_segment_path(layout: Layout, v_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    T = layout.cu_seqlens[-1]
    qkv = [torch.randn(T, 2, size, generator=generator) for size in (96, 96, v_size)]
    weight = torch.randn(T, 2, v_size, generator=generator)
    results = {}
    for device in ("cpu", "cuda"):
        q, k, v = (x.to(device).requires_grad_() for x in qkv)
        out = packed_attention(q, k, v, layout, 0.1)
        gradients = torch.autograd.grad((out * weight.to(device)).sum(), (q, k, v))
        results[device] = [out.detach(), *gradients]
    assert max(relative(a, b) for a, b in zip(results["cuda"], results["cpu"], strict=True)) < 1e-5


def test_one_update_is_the_cpus(folder: Path) -> None:
    losses, gradients = {}, {}
    groups = make_groups(policy_on(folder, "cpu"), CASE)
    for device in ("cpu", "cuda"):
        policy = policy_on(folder, device)
        recorder = Recorder(policy)
        metrics = update(policy, groups, recorder)
        losses[device], gradients[device] = metrics["loss"], recorder.gradient
        assert metrics["sampling/logp_gap/max"] < 1e-3  # log-probs are those of the CPU's policy
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-5)
    assert set(gradients["cuda"]) == set(gradients["cpu"])
    off = {name: relative(g, gradients["cpu"][name]) for name, g in gradients["cuda"].items()}
    assert max(off.values()) < 1e-3, sorted(off.items(), key=lambda item: -item[1])[:3]


def test_native_samples_have_the_trainers_logprobs_on_cuda(folder: Path) -> None:
    policy = policy_on(folder, "cuda")
    sampler = NativeSampler(policy.causal_lm)
    held = sampler.load(checkpoint_tensors(policy.model), version=0)
    cpu = NativeSampler(policy_on(folder, "cpu").causal_lm)
    assert held == cpu.load(checkpoint_tensors(policy.model), version=0)  # fingerprints don't depend on the device
    prompts = [[0, 7, 8], [0, 9, 10, 11]]
    groups = sampler.sample(prompts, SamplingParams(n=4, max_tokens=16), seeds=[1, 2])
    for prompt, completions in zip(prompts, groups, strict=True):
        for completion in completions:
            scored = policy.score([prompt + completion.ids])[0][len(prompt) - 1 :]
            assert completion.logprobs == pytest.approx(scored, abs=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_loop_runs_on_cuda(folder: Path, tmp_path: Path, precision: Literal["fp32", "bf16"]) -> None:
    pytest.importorskip("pyarrow", reason="rollouts are Parquet files")
    from rl.config import EvaluationConfig, GRPOConfig, SamplingConfig
    from rl.train import train

    result = train(
        GRPOConfig(
            model=str(folder),
            steps=2,
            prompts_per_step=2,
            group_size=4,
            precision=precision,
            run_dir=str(tmp_path / "run"),
            sampling=SamplingConfig(backend="native", max_tokens=8),
            evaluation=EvaluationConfig(problems=4, every=0),
        )
    )
    assert (result.steps, result.exit_code) == (2, 0)
