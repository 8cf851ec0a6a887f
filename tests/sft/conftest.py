"""What tests of the loop share: tiny models, tiny data, and whole commands that can be killed, also in processes."""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

import deepseek_v3
from recipes.cli import to_dict
from recipes.tiny import make_tokenizer
from runtime.metrics import read_metrics
from sft.config import CheckpointConfig, EvaluationConfig, OptimConfig, SFTConfig
from sft.mix import SourceConfig
from tests.commands import Forks


@pytest.fixture(scope="session")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def v3(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A V3 of 21,000 parameters, four experts, weights random and large."""
    config = deepseek_v3.preset(
        "tiny", hidden_size=16, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
        intermediate_size=16, moe_intermediate_size=8, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, initializer_range=0.3, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = deepseek_v3.DeepseekV3ForCausalLM(config)
    return _saved(model, tokenizer, tmp_path_factory.mktemp("v3"))


@pytest.fixture(scope="session")
def llama(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of about as many, whose head is its embedding."""
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.3, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1,
        pad_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
    return _saved(model, tokenizer, tmp_path_factory.mktemp("llama"))


def _saved(model: transformers.PreTrainedModel, tokenizer: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sources of two layouts to train on, one held out, and problems."""
    folder = tmp_path_factory.mktemp("data")

    def chat(question: str, answer: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}

    sources = {
        "sums": [chat(f"{i}+{i}?", f"<think>{i}+{i}</think>{2 * i}") for i in range(5, 12)],
        "names": [{"prompt": f"Name {i}:", "completion": " Ana" * (1 + i % 3)} for i in range(5)],
        "held": [chat(f"{i}+1?", f"{i + 1}") for i in range(20, 25)],
        "problems": [{"prompt": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(2)],
    }
    for name, rows in sources.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def config(v3: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> SFTConfig:
    """Four steps over two epochs, in rows that hold several examples, the steps' rows in no step's divisors."""
    return SFTConfig(
        model=str(v3),
        mix=(SourceConfig(path=str(data / "sums.jsonl")), SourceConfig(path=str(data / "names.jsonl"), epochs=1.5)),
        row_length=48,
        rows_per_step=3,
        rows_per_pass=2,
        token_cache=str(tmp_path_factory.mktemp("tokens")),
        optim=OptimConfig(lr=0.01, final_lr=0.001, warmup_steps=1),
        evaluation=EvaluationConfig(
            mix=(str(data / "held.jsonl"),), every=2, problems=str(data / "problems.jsonl"), samples=2, max_tokens=4
        ),
        checkpoint=CheckpointConfig(every=1, keep=2),
        workers=1,
    )


class Commands(Forks):
    """`python -m recipes.sft`."""

    sft = Forks.run

    def __init__(self, config: SFTConfig, folder: Path, *, disk: str | None = None) -> None:
        """folder: for settings and output. disk: options of a tmpfs at folder/disk, say "size=4m"."""
        self.config = config
        (folder / "run.yaml").write_text(yaml.safe_dump(to_dict(config)))
        super().__init__("recipes.sft", folder, disk=disk)


@pytest.fixture(scope="session")
def commands(config: SFTConfig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    commands = Commands(config, tmp_path_factory.mktemp("commands"))
    yield commands
    commands.close()


@pytest.fixture
def small_disk(config: SFTConfig, tmp_path: Path, mounts: None) -> Iterator[Commands]:
    """Commands that see a disk of 4 MB."""
    commands = Commands(config, tmp_path, disk="size=4m")
    while not os.path.ismount(commands.disk):
        time.sleep(0.01)
    yield commands
    commands.close()


def timeless(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of its metrics but for times."""
    return [
        {k: v for k, v in m.items() if k not in ("step_time", "tokens_per_second")}
        for m in read_metrics(run_dir / "metrics.jsonl")
    ]


@pytest.fixture(scope="session")
def outcome() -> Callable[[Path], dict[str, Any]]:
    """All that a run came to: the bytes of its newest checkpoint, of the best and of the final one, the lines of its
    metrics but for times, and what must not be left lying about.

    Left out: the states of Python's and NumPy's global generators, which nothing here draws from and every process
    seeds by chance; and the manifests, whose hashes see those too.
    """

    def collect(run_dir: Path) -> dict[str, Any]:
        checkpoints = run_dir / "checkpoints"
        newest = max(checkpoints.glob("step-*"))
        folders = [newest, *(folder for name in ("best", "final") if (folder := checkpoints / name).exists())]
        files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
        found: dict[str, Any] = {
            str(path.relative_to(run_dir)): path.read_bytes()
            for path in files
            if path.name not in ("manifest.json", "trainer.json", "trainer.safetensors")
        }
        trainer = json.loads((newest / "trainer.json").read_text())
        found["trainer"] = {name: value for name, value in trainer.items() if name != "rng"}
        found["metrics"] = timeless(run_dir)
        found["leftovers"] = [path.name for path in run_dir.rglob("*") if ".tmp" in path.name or ".old-" in path.name]
        return found

    return collect
