"""What tests of the loop share: a tokenizer, a tiny V3 of random weights, policies on it, and groups as they are."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import deepseek_v3
from recipes.tiny import make_tokenizer, tiny_config
from rl.config import GRPOConfig, LossConfig, OptimConfig, SamplingConfig
from rl.policy import Policy
from rl.types import Group, Prompt
from runtime.distributed import World
from sampling.protocol import Completion


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_folder(tokenizer, tmp_path_factory) -> Path:
    """A checkpoint of the tiny V3, weights random and larger than usual so that no log-prob is uniform."""
    folder = tmp_path_factory.mktemp("tiny-random")
    config = tiny_config(tokenizer)
    config.initializer_range = 0.08
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = deepseek_v3.DeepseekV3ForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def make_policy(tiny_folder) -> Callable[..., Policy]:
    """Policy on the tiny V3: `make_policy(beta=0.1, minibatches=2, prompts=4)` puts settings where they belong."""

    def make(*, lora: Any = None, prompts: int = 4, **settings: Any) -> Policy:
        parts = {
            kind: {name: settings.pop(name) for name in list(settings) if name in kind.__dataclass_fields__}
            for kind in (SamplingConfig, LossConfig, OptimConfig)
        }
        assert not settings, f"no such settings: {settings}"
        sampling, loss, optim = (kind(**values) for kind, values in parts.items())
        config = GRPOConfig(
            model=str(tiny_folder),
            prompts_per_step=prompts,
            group_size=2,
            sampling=sampling,
            loss=loss,
            optim=optim,
            lora=lora,
        )
        return Policy(config, World())

    return make


@pytest.fixture
def make_group() -> Callable[..., Group]:
    """A group of given completions: token ids, log-probs (0 unless given), rewards and advantages."""

    def make(
        ids: Sequence[Sequence[int]],
        *,
        prompt: Sequence[int] = (1, 2),
        logprobs: Sequence[Sequence[float]] | None = None,
        rewards: Sequence[float] | None = None,
        advantages: Sequence[float] = (),
        cut: Sequence[int] = (),
        texts: Sequence[str] | None = None,
        parts: dict[str, list[float]] | None = None,
        content: Any = "question",
        columns: dict[str, Any] | None = None,
        index: int = 0,
    ) -> Group:
        return Group(
            prompt=Prompt(
                index=index, epoch=0, seed=index, content=content, ids=list(prompt), columns=columns or {"answer": "7"}
            ),
            completions=[
                Completion(
                    ids=list(row),
                    logprobs=list(logprobs[i]) if logprobs else [0.0] * len(row),
                    finish_reason="length" if i in cut else "stop",
                    version=0,
                )
                for i, row in enumerate(ids)
            ],
            texts=list(texts) if texts else ["text"] * len(ids),
            parts=parts or {},
            rewards=list(rewards or []),
            advantages=list(advantages),
        )

    return make
