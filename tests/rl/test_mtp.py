"""GRPO on a V3 with an MTP layer: samplers take its weights, nothing trains it, and it is saved as it was.

Neither does anything move the bias of a router.
"""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file

import deepseek_v3
from recipes.tiny import make_tokenizer, tiny_config
from rl.config import EvaluationConfig, GRPOConfig, OptimConfig, SamplingConfig
from rl.policy import Policy
from rl.train import train
from runtime.distributed import World
from runtime.metrics import read_metrics
from runtime.models import mtp_layer

LAYER = "model.layers.2."


@pytest.fixture(scope="module")
def mtp(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mtp")
    tokenizer = make_tokenizer()
    config = tiny_config(tokenizer)
    config.num_nextn_predict_layers = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        deepseek_v3.DeepseekV3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("backend", "experts"),
    [
        ("native", "replay"),
        pytest.param(
            "vllm",
            "ignore",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM"),
            ],
        ),
    ],
)
def test_the_layer_is_handed_over_and_saved_as_it_was(mtp, tmp_path, backend, experts):
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps({"prompt": f"{i}+{i}?", "answer": str(2 * i)}) + "\n" for i in range(4)))
    config = GRPOConfig(
        model=str(mtp),
        data=str(problems),
        steps=2,
        prompts_per_step=2,
        group_size=2,
        sampling=SamplingConfig(backend=backend, max_tokens=4, experts=experts, speculate=backend == "native"),
        optim=OptimConfig(lr=1e-2, weight_decay=0.5),
        evaluation=EvaluationConfig(),
        run_dir=str(tmp_path / "run"),
    )

    def whatever(completions, **_):
        return [float(sum(map(ord, text)) % 5) for text in completions]

    # Where processes add gradients up, one that is absent counts zero, and weight decay would move the layer.
    layer = mtp_layer(Policy(config, World()).model)
    assert layer is not None and not any(p.requires_grad for p in layer.parameters())
    train(config, rewards={whatever: 1.0})
    before = load_file(mtp / "model.safetensors")
    after = load_file(tmp_path / "run/checkpoints/final/model.safetensors")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(moved) > 20 and not any(name.startswith(LAYER) or name.endswith("correction_bias") for name in moved)
    steps = [m for m in read_metrics(tmp_path / "run/metrics.jsonl") if "reward" in m]
    assert all(m["sampling/logp_gap/max"] < 1.0 for m in steps)
    if experts == "replay":
        assert all(m["router/flip_rate"] == 0 for m in steps)
        assert all(0 <= m["sampling/acceptance"] <= 1 for m in steps)
