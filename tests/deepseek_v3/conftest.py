"""Small random models for the tests of the model, ours and transformers' with the same weights."""

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from transformers import DeepseekV3Config

import deepseek_v3
from deepseek_v3.config import yarn

VOCAB = 64


def small(**overrides: Any) -> DeepseekV3Config:
    """A V3 of three layers that uses everything: dense prefix, groups, YaRN with both ends of its ramp."""
    fields: dict[str, Any] = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        kv_lora_rank=24,
        qk_rope_head_dim=8,
        qk_nope_head_dim=12,
        v_head_dim=16,
        intermediate_size=48,
        moe_intermediate_size=16,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        max_position_embeddings=128,
        rope_parameters=yarn(factor=4, original=32),
        eos_token_id=None,
    )
    return deepseek_v3.preset("tiny", **fields | overrides)


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights that matter: at the usual std of 0.02 most mistakes are too small to see."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
        if "inv_freq" in name:
            continue
        mean = 1.0 if "norm" in name else 0.0
        std = 0.3 if "gate.weight" in name or "correction_bias" in name else 0.12
        tensor.copy_(mean + std * torch.randn(tensor.shape, generator=generator))


def ours(config: DeepseekV3Config | None = None, *, seed: int = 0) -> deepseek_v3.DeepseekV3ForCausalLM:
    model = deepseek_v3.DeepseekV3ForCausalLM(config or small()).eval()
    randomize(model, seed)
    return model


def theirs_like(model: deepseek_v3.DeepseekV3ForCausalLM, attention: str = "eager") -> transformers.PreTrainedModel:
    """transformers' own model with the weights of ours."""
    config = copy.deepcopy(model.config)
    config.dtype = torch.float32
    theirs = transformers.DeepseekV3ForCausalLM._from_config(config, attn_implementation=attention).eval()
    theirs.load_state_dict(model.state_dict(), strict=True)
    return theirs


@pytest.fixture(scope="module")
def make() -> Callable[..., deepseek_v3.DeepseekV3ForCausalLM]:
    """make(**config overrides) -> our model with random weights."""
    return lambda **overrides: ours(small(**overrides))


@pytest.fixture(scope="module")
def twin() -> Callable[..., transformers.PreTrainedModel]:
    """twin(model, attention="eager") -> transformers' model with the same weights."""
    return theirs_like


@pytest.fixture(scope="module")
def config_of() -> Callable[..., DeepseekV3Config]:
    return small


@pytest.fixture(scope="session")
def paper() -> ModuleType:
    """paper.py: the model written out from its equations."""
    spec = importlib.util.spec_from_file_location("paper", Path(__file__).with_name("paper.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
