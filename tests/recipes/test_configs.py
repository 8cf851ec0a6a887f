"""The recipes as YAML: every one parses; of the published ones, only what differs from the defaults, each with its
source, and the papers' arithmetic."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from recipes.chain.config import ChainConfig
from recipes.cli import parse, to_dict
from recipes.reward_model import RewardModelTraining
from rl.config import GRPOConfig
from sft.config import SFTConfig

FOLDER = Path(__file__).parents[2] / "recipes/configs"
OF_COMMAND = {"chain": ChainConfig, "sft": SFTConfig, "reward_model": RewardModelTraining}
"""How a file's name begins -> whose settings it holds; the others are GRPO's."""
PUBLISHED = ("r1_zero", "dapo", "dr_grpo", "gspo", "cispo")


def load(name: str) -> GRPOConfig:
    return parse(GRPOConfig, ["--config", str(FOLDER / f"{name}.yaml")], prog="grpo", description="")


def leaves(tree: dict[str, Any], defaults: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(name, value, default) of each setting given; `rewards` is one."""
    out = []
    for name, value in tree.items():
        if isinstance(value, dict) and name != "rewards":
            out += leaves(value, defaults[name], f"{prefix}{name}.")
        else:
            out.append((prefix + name, value, defaults[name]))
    return out


@pytest.mark.parametrize("name", PUBLISHED)
def test_only_what_differs_is_given_and_says_where_it_is_from(name: str) -> None:
    text = (FOLDER / f"{name}.yaml").read_text()
    given = leaves(yaml.safe_load(text), to_dict(GRPOConfig()))
    assert [setting for setting, value, default in given if value == default] == []
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    bare = [line for line in lines if not line.endswith(":") and "  # " not in line]
    assert bare == []
    assert 8 <= len(text.splitlines()) <= 20 and text.startswith("#") and "arXiv" in text


def test_r1_zero_is_the_papers_arithmetic() -> None:
    config = load("r1_zero")
    updates = config.optim.minibatches * config.optim.epochs
    assert config.prompts_per_step * config.group_size == 8192
    assert (config.prompts_per_step // updates, config.prompts_per_step * config.group_size // updates) == (32, 512)
    assert (config.steps * updates, config.loss.reference_every * updates) == (10_400, 400)
    assert (config.optim.lr, config.loss.beta, config.loss.kl, config.loss.kl_gradient) == (3e-6, 0.001, "k3", "direct")
    assert (config.sampling.temperature, config.sampling.max_tokens, config.loss.epsilon) == (1.0, 32_768, 10)


@pytest.mark.parametrize("name", ["dapo", "cispo"])
def test_dapo_and_cispo_are_the_papers_arithmetic(name: str) -> None:
    config = load(name)
    assert config.prompts_per_step * config.group_size // config.optim.minibatches == 512
    assert config.sampling.max_tokens - config.overlong_buffer == 16_384
    assert (config.dynamic_sampling.max_rounds, config.loss.beta, config.rewards) == (9, 0, {"accuracy": 2.0})
    high = {"dapo": 0.28, "cispo": 4}[name]
    assert (config.loss.objective, config.loss.epsilon, config.loss.clip_high) == (name, 0.2, high)


def test_dapos_warm_up_is_twenty_rollouts() -> None:
    config = load("dapo")
    assert config.optim.warmup_steps / config.optim.minibatches == 20


@pytest.mark.parametrize(
    ("name", "loss", "rollout"),
    [("gspo", ("gspo", "grpo", 3e-4, 4e-4), (16, 8, 4)), ("dr_grpo", ("dr_grpo", "dr_grpo", 0.2, 0.2), (128, 8, 8))],
)
def test_gspo_and_dr_grpo_are_the_papers(name: str, loss: tuple[Any, ...], rollout: tuple[int, ...]) -> None:
    config = load(name)
    assert (config.loss.objective, config.loss.advantage, config.loss.epsilon, config.loss.clip_high) == loss
    assert (config.prompts_per_step, config.group_size, config.optim.minibatches) == rollout
    assert config.loss.beta == 0


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_file_parses(path: Path) -> None:
    config = next((c for prefix, c in OF_COMMAND.items() if path.stem.startswith(prefix)), GRPOConfig)
    assert isinstance(parse(config, ["--config", str(path)], prog="", description=""), config)


def sft(name: str) -> SFTConfig:
    return parse(SFTConfig, ["--config", str(FOLDER / f"{name}.yaml")], prog="sft", description="")


def test_sft_defaults_are_v3s() -> None:
    config = SFTConfig()
    assert (config.epochs, config.optim.lr, config.optim.final_lr, config.optim.warmup_steps) == (2, 5e-6, 1e-6, 0)
    assert (config.optim.betas, config.optim.weight_decay, config.optim.max_grad_norm) == ((0.9, 0.95), 0.1, 1.0)


@pytest.mark.parametrize(
    ("name", "rows", "lr"),
    [
        ("r1", 128, 5e-5), ("distill_qwen_1.5b", 64, 1e-4), ("distill_qwen_7b", 64, 8e-5),
        ("distill_qwen_14b", 64, 7e-5), ("distill_qwen_32b", 64, 6e-5),
        ("distill_llama_8b", 64, 5e-5), ("distill_llama_70b", 64, 2e-5),
    ],
)  # fmt: skip
def test_r1s_schedules_are_the_papers(name: str, rows: int, lr: float) -> None:
    config = sft(f"sft_{name}")
    assert (config.epochs, config.row_length, config.rows_per_step) == (2, 32_768, rows)
    assert (config.optim.lr, config.optim.final_lr) == (lr, pytest.approx(lr / 10))


@pytest.mark.parametrize("gpus", [8, 64])
def test_every_gpu_has_as_many_rows(gpus: int) -> None:
    config = sft(f"sft_{gpus}_gpus")
    assert config.rows_per_step % (gpus * config.rows_per_pass) == 0
    assert (config.optim, config.epochs) == (SFTConfig().optim, 2)
