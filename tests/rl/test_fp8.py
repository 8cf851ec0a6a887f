"""The field `fp8`: a run samples, scores and trains in FP8 where it says so, and nowhere else."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import deepseek_v3
from deepseek_v3.fp8.linear import Fp8Linear, use_fp8
from recipes.tiny import make_tokenizer, tiny_config
from rl.config import (
    CheckpointConfig,
    EvaluationConfig,
    GRPOConfig,
    LoraConfig,
    LossConfig,
    OptimConfig,
    SamplingConfig,
)
from rl.policy import Policy
from rl.train import train
from runtime.distributed import World
from runtime.errors import UserError
from runtime.metrics import read_metrics
from runtime.models import load_causal_lm
from runtime.packed import score_sequences
from runtime.weights import checkpoint_tensors
from sampling.attest import make_canary, sync
from sampling.backend import make_sampler
from sampling.native import NativeSampler

SEQUENCES = [[1, 40, 50, 60, 7], [2, 70, 9], [3, 80, 90, 100, 110]]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> GRPOConfig:
    """A random tiny V3 whose answers are scored by their vowels."""
    folder = tmp_path_factory.mktemp("fp8")
    torch.manual_seed(0)
    deepseek_v3.DeepseekV3ForCausalLM(tiny_config(make_tokenizer())).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    problems = folder / "problems.jsonl"
    problems.write_text("".join(json.dumps({"prompt": f"{i} + {i}?", "answer": str(2 * i)}) + "\n" for i in range(8)))
    return GRPOConfig(
        model=str(folder / "model"),
        data=str(problems),
        steps=2,
        prompts_per_step=2,
        group_size=4,
        sampling=SamplingConfig(backend="native", max_tokens=8),
        loss=LossConfig(beta=0.01),
        optim=OptimConfig(lr=1e-3),
        checkpoint=CheckpointConfig(every=0),
        evaluation=EvaluationConfig(every=0),
    )


def run(config: GRPOConfig, folder: Path, **changes: Any) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Metrics of each step, and the weights it ends with."""

    def vowels(completions: list[str], **_: Any) -> list[float]:
        return [sum(c in "aeiou" for c in text) / 4 for text in completions]

    train(dataclasses.replace(config, run_dir=str(folder), **changes), rewards={vowels: 1.0})
    steps = [m for m in read_metrics(folder / "metrics.jsonl") if "reward" in m]
    return steps, load_file(folder / "checkpoints/final/model.safetensors")


# --- whole runs ------------------------------------------------------------------------------------------------------


def test_runs_in_fp8_learn_and_end_in_an_ordinary_checkpoint(config: GRPOConfig, tmp_path: Path) -> None:
    start = load_file(Path(config.model) / "model.safetensors")
    gaps = {}
    for mode in ("forward", "train"):
        steps, final = run(config, tmp_path / mode, fp8=mode)
        assert len(steps) == 2 and all(m["grad_norm"] > 0 for m in steps)
        gaps[mode] = max(m["sampling/logp_gap/mean"] for m in steps)
        assert {name: t.dtype for name, t in final.items()} == {name: t.dtype for name, t in start.items()}
        moved = {name for name, t in final.items() if not t.equal(start[name])}
        assert {name for name in final if "_proj" in name and ".experts." not in name} < moved
        transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path / mode / "checkpoints/final")
    # The trainer computes as the sampler does in "train", and not in "forward".
    assert 1e-3 < gaps["forward"] < 0.05
    assert gaps["train"] < gaps["forward"] / 5


def test_adapters_train_on_a_model_in_fp8(config: GRPOConfig, tmp_path: Path) -> None:
    steps, final = run(config, tmp_path / "run", fp8="train", lora=LoraConfig(rank=2), steps=1)
    assert steps[0]["grad_norm"] > 0 and steps[0]["sampling/logp_gap/mean"] < 0.05
    start = load_file(Path(config.model) / "model.safetensors")
    assert final.keys() == start.keys() and any(not t.equal(start[name]) for name, t in final.items())


# --- who computes in FP8 ---------------------------------------------------------------------------------------------


def in_fp8(config: GRPOConfig) -> list[list[float]]:
    model = load_causal_lm(config.model).requires_grad_(False)
    use_fp8(model, "forward")
    return score_sequences(model, SEQUENCES)


@pytest.mark.parametrize(("mode", "policy_in_fp8"), [("off", False), ("forward", False), ("train", True)])
def test_the_reference_is_in_fp8_and_the_policy_only_for_training(
    config: GRPOConfig, mode: Any, policy_in_fp8: bool
) -> None:
    policy = Policy(dataclasses.replace(config, fp8=mode), World())
    assert policy.reference is not None
    plain, fp8 = score_sequences(load_causal_lm(config.model), SEQUENCES), in_fp8(config)
    assert fp8 != plain
    assert policy.score(SEQUENCES) == (fp8 if policy_in_fp8 else plain)
    assert score_sequences(policy.reference.model, SEQUENCES) == (plain if mode == "off" else fp8)
    policy.replace_reference()
    assert score_sequences(policy.reference.model, SEQUENCES) == (plain if mode == "off" else fp8)


@pytest.mark.parametrize("process", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_sampler_is_in_fp8_and_attested(config: GRPOConfig, process: bool) -> None:
    model = load_causal_lm(config.model)
    sampler = make_sampler(model, backend="native", max_model_len=64, process=process, fp8=True)
    try:
        assert sampler.dtype == "float8"
        canary = make_canary(model.config.vocab_size, dtype=sampler.dtype, length=32)
        report = sync(
            sampler,
            lambda: checkpoint_tensors(model),
            version=0,
            canary=canary,
            score_trainer=lambda sequences: score_sequences(model, sequences),
        )
        assert 1e-3 < report.canary_mean < canary.mean_tolerance
        assert sampler.score(SEQUENCES) == in_fp8(config)
    finally:
        sampler.close()
    assert not any(isinstance(module, Fp8Linear) for module in model.modules())


def test_codes_the_sampler_keeps_are_of_the_weights_it_was_last_sent(config: GRPOConfig) -> None:
    model = load_causal_lm(config.model)
    sampler = NativeSampler(model, fp8=True)
    sampler.load(checkpoint_tensors(model), version=0)
    before = sampler.score(SEQUENCES)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(p)))
    sampler.load(checkpoint_tensors(model), version=1)
    assert sampler.score(SEQUENCES) == NativeSampler(model, fp8=True).score(SEQUENCES) != before


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "vllm"])
def test_a_sampler_that_cannot_is_refused(config: GRPOConfig, backend: Any) -> None:
    sampling = dataclasses.replace(config.sampling, backend=backend)
    with pytest.raises(UserError, match=f"fp8=train: .* not sampling.backend={backend}; use native"):
        dataclasses.replace(config, sampling=sampling, fp8="train")


@pytest.mark.parametrize("mode", ["forward", "train"])
def test_a_model_that_is_no_deepseek_v3_is_refused(config: GRPOConfig, tmp_path: Path, mode: Any) -> None:
    sizes = dict(vocab_size=512, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(tmp_path / "llama")
    make_tokenizer().save_pretrained(tmp_path / "llama")
    with pytest.raises(UserError, match=f"fp8={mode}: model='.*llama' is no DeepSeek-V3; use off"):
        run(config, tmp_path / "run", model=str(tmp_path / "llama"), fp8=mode)
