"""What tests of the loop share: a tokenizer, a tiny V3 of random weights, policies on it, groups as they are, and whole
commands that can be killed."""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import deepseek_v3
from recipes.tiny import make_tokenizer, tiny_config
from rl.config import GRPOConfig, LossConfig, OptimConfig, SamplingConfig
from rl.policy import Policy
from rl.types import Group, Prompt
from runtime.distributed import World
from runtime.metrics import read_metrics
from sampling.protocol import Completion
from tests.commands import Forks


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

    def make(*, lora: Any = None, prompts: int = 4, gradient_checkpointing: bool = False, **settings: Any) -> Policy:
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
            gradient_checkpointing=gradient_checkpointing,
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


class Commands(Forks):
    """`python -m recipes.grpo` on a run of a second: a V3 of 20,000 parameters, with everything on that has a state."""

    grpo = Forks.run

    def __init__(self, folder: Path, *, disk: str | None = None) -> None:
        """folder: for model, data, settings and output; modules in it can be imported by the commands. disk: options of
        a tmpfs at folder/disk, say "size=4m"."""
        tokenizer = make_tokenizer()
        config = tiny_config(tokenizer)
        config.update(dict(
            hidden_size=16, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, intermediate_size=16,
            moe_intermediate_size=8, n_routed_experts=2, num_experts_per_tok=1, initializer_range=0.3,
        ))  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            deepseek_v3.DeepseekV3ForCausalLM(config).save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        rows = [{"prompt": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(4)]
        (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "tiny_rewards.py").write_text(
            "def parity(completion_ids, **_):\n    return [float(sum(ids) % 2) for ids in completion_ids]\n"
        )
        problems = str(folder / "problems.jsonl")
        self.settings: dict[str, Any] = dict(
            model=str(folder / "model"),
            data=problems,
            steps=3,
            prompts_per_step=2,
            group_size=3,
            rewards={"tiny_rewards.parity": 1.0},
            sampling=dict(backend="native", max_tokens=4),
            dynamic_sampling=dict(max_rounds=2),
            curriculum=dict(reward="tiny_rewards.parity"),
            loss=dict(beta=0.1, reference_every=2),
            optim=dict(lr=0.01),
            checkpoint=dict(every=1, keep=2),
            evaluation=dict(data=problems, problems=2, every=2, quick_problems=1),
        )
        (folder / "run.yaml").write_text(yaml.safe_dump(self.settings))
        super().__init__("recipes.grpo", folder, disk=disk)


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    commands = Commands(tmp_path_factory.mktemp("commands"))
    yield commands
    commands.close()


@pytest.fixture
def small_disk(tmp_path: Path, mounts: None) -> Iterator[Commands]:
    """Commands that see a disk of 4 MB."""
    commands = Commands(tmp_path, disk="size=4m")
    while not os.path.ismount(commands.disk):
        time.sleep(0.01)
    yield commands
    commands.close()


@pytest.fixture(scope="session")
def outcome() -> Callable[[Path], dict[str, Any]]:
    """All that a run of three steps came to: the bytes of its last checkpoint, of the final one and of its rollouts,
    the lines of its metrics but for times, and what must not be left lying about.

    Left out: the states of Python's and NumPy's global generators, which nothing here draws from and every process
    seeds by chance; and the manifests, whose hashes see those too.
    """

    def collect(run_dir: Path) -> dict[str, Any]:
        folders = [run_dir / "checkpoints/step-000003", run_dir / "checkpoints/final", run_dir / "rollouts"]
        files = [path for folder in folders for path in sorted(folder.iterdir())]
        found: dict[str, Any] = {
            str(path.relative_to(run_dir)): path.read_bytes()
            for path in files
            if path.name not in ("manifest.json", "trainer.json", "trainer.safetensors")
        }
        trainer = json.loads((folders[0] / "trainer.json").read_text())
        found["trainer"] = {name: value for name, value in trainer.items() if name != "rng"}
        found["metrics"] = [
            {k: v for k, v in m.items() if not k.startswith("time/") and k not in ("step_time", "tokens_per_second")}
            for m in read_metrics(run_dir / "metrics.jsonl")
        ]
        found["leftovers"] = [path.name for path in run_dir.rglob("*") if ".tmp" in path.name or ".old-" in path.name]
        return found

    return collect


@pytest.fixture(scope="session")
def whole(commands: Commands, outcome: Callable[[Path], dict[str, Any]], tmp_path_factory: Any) -> dict[str, Any]:
    """What a run comes to that nothing happens to."""
    run_dir = tmp_path_factory.mktemp("whole")
    ended = commands.grpo(run_dir)
    assert ended.code == 0, ended.output
    return outcome(run_dir)
