"""The command: which recipe is meant, what it says about fitting, JSON that adds up, and memory as it was measured."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import plan as benchmark
from benchmarks._common import make_checkpoint
from benchmarks.update import Case, make_groups, make_policy
from deepseek_v3 import DeepseekV3ForCausalLM, preset
from recipes.plan import main, plans
from rl.update import Optimizer, update
from runtime.packed import Targets, logprobs_to_sum, pack
from runtime.planning.census import block_flops, count
from runtime.planning.memory import total
from runtime.planning.sampler import SAMPLING, Rollout, native
from runtime.weights import checkpoint_tensors
from sampling.native import NativeSampler
from sampling.protocol import SamplingParams

FOLDER = Path(__file__).parents[2] / "recipes/configs"
SHARDED = str(FOLDER / "sft_64_gpus.yaml")
"""bf16 and gradient checkpointing."""


def page(*arguments: str) -> str:
    output = io.StringIO()
    assert main(arguments, Console(file=output, width=160)) == 0
    return output.getvalue()


def as_json(*arguments: str) -> dict[str, Any]:
    return json.loads(page("--json", *arguments))


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_file_says_which_recipe_it_is_of(path: Path) -> None:
    if path.stem.startswith(("reward_model", "chain")):
        pytest.skip("not a recipe that is planned")
    _, (plan,) = plans(["--config", str(path), "--model", "tiny"])
    assert plan.recipe == ("sft" if path.stem.startswith("sft") else "grpo")


def test_settings_that_both_have_make_two_plans() -> None:
    _, made = plans(["--model", "5m", "--precision", "bf16"])
    assert [plan.recipe for plan in made] == ["sft", "grpo"]
    _, made = plans(["--model", "5m", "--recipe", "grpo"])
    assert [plan.recipe for plan in made] == ["grpo"]


def test_671b_does_not_fit_on_8_gpus_and_says_what_does() -> None:
    text = page("--config", SHARDED, "--model", "671b", "--gpus", "8")
    assert "does not fit: " in text
    assert "• fits on 256 GPUs: FSDP2 over 256 + expert 64, to be built: no recipe launches it" in text
    enough, half = (plans(["--config", SHARDED, "--model", "671b", "--gpus", n])[1][0] for n in ("256", "128"))
    assert enough.fits and not half.fits


@pytest.mark.parametrize("arguments", [[SHARDED], [str(FOLDER / "r1_zero.yaml"), "--precision", "bf16"]])
def test_671b_fits_on_2048_gpus_by_a_layout_no_recipe_launches(arguments: list[str]) -> None:
    _, (plan,) = plans(["--model", "671b", "--gpus", "2048", "--config", *arguments])
    assert plan.fits
    assert not plan.layout.launched
    assert any("to build this: expert_parallel of deepseek_v3/parallel.py" in note for note in plan.notes)
    assert not any("-m recipes" in command for command in plan.commands)


def test_what_to_change_fits() -> None:
    arguments = ["--model", "16b", "--gpus", "8", "--recipe", "sft", "--row_length", "8192"]
    _, (plan,) = plans(arguments)
    assert not plan.fits
    assert "fits on these GPUs with precision bf16, gradient_checkpointing" in plan.notes
    _, (changed,) = plans([*arguments, "--precision", "bf16", "--gradient_checkpointing"])
    assert changed.fits


@pytest.mark.parametrize("gpus", [1, 8, 16])
def test_a_launched_layout_comes_with_the_recipes_command(gpus: int) -> None:
    _, (plan,) = plans(["--config", SHARDED, "--model", "20m", "--gpus", str(gpus), "--rows_per_pass", "2"])
    start = {1: "python", 8: "torchrun --nproc-per-node 8", 16: "torchrun --nnodes 2 --nproc-per-node 8 --rdzv"}[gpus]
    assert plan.layout.launched
    assert not any("fits" in note for note in plan.notes)
    assert plan.commands[-1].startswith(start)
    assert plan.commands[-1].endswith(f"-m recipes.sft --config {SHARDED} --rows_per_pass 2 --model CHECKPOINT")


def test_many_processes_of_grpo_are_sharded_and_sample_themselves_or_on_servers() -> None:
    arguments = ["--model", "20m", "--recipe", "grpo", "--gpus", "8"]
    _, (plan,) = plans([*arguments, "--shard", "false"])
    assert (plan.layout.launched, plan.layout.shards) == (True, 1)
    servers = ["--sampling.backend", "server", "--sampling.server_urls", '["http://a:1"]']
    _, (plan,) = plans([*arguments, *servers])
    assert not any(line.name.startswith("sampler") for line in plan.lines)
    assert "native" not in plan.commands[-1]
    _, (plan,) = plans(arguments)
    assert (plan.layout.launched, plan.layout.shards) == (True, 8)
    assert plan.commands[-1].endswith("-m recipes.grpo --sampling.backend native --model CHECKPOINT")
    names = {line.name: line.bytes for line in plan.lines}
    assert names["sampler weights"]["backward"] == 4 * plan.census.total


def test_updates_that_move_more_than_they_compute_take_that_long() -> None:
    """Two groups a rank, in one pass: weights gathered twice in bf16, fp32 gradients reduced."""
    arguments = "--recipe grpo --model 16b --gpus 8 --precision bf16".split()
    _, (plan,) = plans(arguments)
    updating = next(fact.value for fact in plan.facts if fact.name == "updating")
    assert updating == pytest.approx(8 * plan.census.total / 450e9)


def test_a_reference_is_there_only_with_a_kl_penalty() -> None:
    _, (plain,) = plans(["--model", "tiny", "--recipe", "grpo"])
    _, (held,) = plans(["--model", "tiny", "--recipe", "grpo", "--loss.beta", "0.1"])
    assert "reference" not in {line.name for line in plain.lines}
    assert {line.name: line.bytes for line in held.lines}["reference"]["sampling"] == 4 * held.census.total


@pytest.mark.parametrize("model", ["tiny", "671b"])
def test_json_adds_up(model: str) -> None:
    found = as_json("--model", model, "--gpus", "64")
    assert set(found) == {"sft", "grpo"}
    for plan in found.values():
        memory = plan["memory"]
        for phase, size in memory["totals"].items():
            assert sum(line["bytes"][phase] for line in memory["lines"]) == size
        assert plan["fits"] == (max(memory["totals"].values()) <= plan["limit"])
        assert plan["facts"]["hours"]["value"] > 0


@pytest.mark.parametrize(("precision", "peak"), [("bf16", 989e12), ("fp32", 67e12)])
def test_hours_are_flops_at_the_stated_share(precision: str, peak: float) -> None:
    arguments = ["--config", SHARDED, "--model", "671b", "--gpus", "64", "--mfu", "0.1", "--tokens", "1e9"]
    plan = as_json(*arguments, "--precision", precision)["sft"]
    facts = {name: fact["value"] for name, fact in plan["facts"].items()}
    assert facts["compute"] == pytest.approx(facts["hours"] * 3600 * 64 * peak * 0.1)
    # Of 37B activated parameters the embedding multiplies nothing and the head isn't computed again; two epochs.
    head = 129_280 * 7168
    blocks = 2 * (37_552_282_624 - 2 * head) + 2 * 61 * 128 * (192 + 128) * 4097 / 2
    assert facts["compute"] == pytest.approx(2e9 * (4 * blocks + 3 * 2 * head), rel=1e-3)


@pytest.mark.parametrize(("gpus", "passes", "speed"), [(8, 16, 450e9), (64, 2, 8 * 50e9)])
def test_a_pass_that_moves_more_than_it_computes_takes_that_long(gpus: int, passes: int, speed: float) -> None:
    """16B parameters gathered twice in fp32 and reduced once; between nodes a GPU moves an eighth of its node's."""
    plan = as_json("--config", SHARDED, "--model", "16b", "--gpus", str(gpus))["sft"]
    assert plan["facts"]["step time"]["value"] == pytest.approx(passes * 12 * plan["parameters"]["total"] / speed)
    assert "computing, at the same time, is" in plan["facts"]["step time"]["how"]


def test_a_checkpoints_config_is_read(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "model", "tiny")
    for model in (tmp_path / "model", tmp_path / "model/config.json"):
        _, (plan, _) = plans(["--model", str(model)])
        assert plan.census.total == 972_928
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="only deepseek_v3 can be planned for"):
        plans(["--model", str(tmp_path)])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "671"], "did you mean '671b'"),
        (["--gpu", "h1000"], "did you mean h100"),
        (["--gpus", "4096"], "gpus=4096: 1 to 2048"),
        (["--row_lenght", "5"], "did you mean row_length?"),
        (["--config", SHARDED, "--recipe", "grpo"], "rows_per_step is not a setting"),
        (["--gpus", "8", "--expert", "3"], "expert=3: must divide"),
    ],
)
def test_mistakes_are_told(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(arguments)
    except SystemExit as error:
        code = error.code  # type: ignore[assignment]
    assert code == 2
    assert says in capsys.readouterr().err


# --- measured ---------------------------------------------------------------------------------------------------------

TOKENS = 1024


def addmm(_: torch.Size, a: torch.Size, b: torch.Size, **kwargs: object) -> int:
    return 2 * a[0] * a[1] * b[1]


def flops_of(work: Callable[[], object]) -> float:
    # It knows neither additions in place nor the CPU's attention.
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm}) as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compute_of_sft_is_what_torch_counts(checkpointing: bool) -> None:
    model = DeepseekV3ForCausalLM(preset("tiny"))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    packed = pack([list(range(TOKENS // 2))] * 2)
    targets = Targets(torch.arange(TOKENS), packed.ids_T)
    counted = flops_of(lambda: logprobs_to_sum(model, packed, targets)[0].sum().backward())
    settings = ["--recipe", "sft", "--gradient_checkpointing", str(checkpointing).lower(), "--epochs", "1"]
    # Documents of one token, so that attention is next to nothing.
    facts = as_json(*settings, "--row_length", str(TOKENS), "--tokens", "1", "--example_tokens", "1")["sft"]["facts"]
    # rows_per_step=16. Computed again, a block stops short of its last product, large in the tiny dense one.
    assert facts["compute"]["value"] / 16 == pytest.approx(counted, rel=0.025 if checkpointing else 0.002)


@pytest.mark.parametrize("minibatches", [1, 2])
def test_compute_of_grpo_is_what_torch_counts(minibatches: int, tmp_path: Path) -> None:
    policy = make_policy(make_checkpoint(tmp_path / "model", "tiny"))
    policy.config = replace(policy.config, optim=replace(policy.config.optim, minibatches=minibatches))
    groups = make_groups(policy, Case(preset="tiny", groups=2, prompt=8, mean=100, longest=100))
    counted = flops_of(lambda: update(policy, groups, Optimizer(policy)))
    _, (plan,) = plans(
        f"--recipe grpo --steps 1 --prompts_per_step 2 --group_size 8 --optim.minibatches {minibatches} "
        "--prompt_tokens 8 --sampling.max_tokens 100 --completion_tokens 100".split()
    )
    facts = {fact.name: fact.value for fact in plan.facts}
    trained, forwards = 2 * (8 + 8 * 100), 3 + (minibatches > 1)
    attention = block_flops(plan.census, 8 + 50) - block_flops(plan.census, 0)
    # A completion's last token is predicted and not fed.
    assert facts["compute"] - trained * forwards * attention == pytest.approx(counted, rel=0.01)


CASES = (
    benchmark.Case(recipe="sft", preset="tiny", tokens=TOKENS, document=128),
    benchmark.Case(recipe="sft", preset="tiny", tokens=TOKENS, document=128, passes=2, bf16=True, checkpointing=True),
    benchmark.Case(recipe="sft", preset="tiny", tokens=128, document=64, bf16=True),
    benchmark.Case(recipe="grpo", preset="tiny", tokens=TOKENS),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_tiny_models_memory_is_as_planned(case: benchmark.Case, tmp_path: Path) -> None:
    """10 % are promised; no more than 3, so that what is a small part of them can't go missing."""
    measure = benchmark.of_sft if case.recipe == "sft" else benchmark.of_grpo
    for what, planned, measured in benchmark.compare(case, measure(make_checkpoint(tmp_path / "model", "tiny"), case)):
        assert planned == pytest.approx(measured, rel=0.03), what


def test_the_tiny_samplers_memory_is_as_planned() -> None:
    """One completion in a hundred ends at every token, so caches are copied while most are still there."""
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(preset("tiny"))

    def sample(prompts: int, max_tokens: int) -> None:
        sampler = NativeSampler(model)
        sampler.load(checkpoint_tensors(model), version=0)
        params = SamplingParams(n=8, max_tokens=max_tokens, stop_token_ids=tuple(range(5)))
        sampler.sample([[7] * 64] * prompts, params, seeds=range(prompts))

    sample(1, 2)  # what stays of the first time is not the sampler's
    measured = max(accumulate(change for _, change in benchmark.allocations(lambda: sample(16, 64))))
    rollout = Rollout(prompts=16, group=8, prompt_tokens=64, max_tokens=64)
    assert total(native(count(model.config), rollout, [SAMPLING]).lines, SAMPLING) == pytest.approx(measured, rel=0.1)
