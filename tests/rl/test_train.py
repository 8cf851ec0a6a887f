"""Whole runs of the loop with the native sampler, on random models of a few thousand parameters' worth of work."""

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import transformers
from safetensors.torch import load_file

import deepseek_v3
from recipes.tiny import make_tokenizer, tiny_config
from rl.config import (
    CheckpointConfig,
    CurriculumConfig,
    DynamicSamplingConfig,
    EvaluationConfig,
    GRPOConfig,
    LoraConfig,
    LossConfig,
    OptimConfig,
    SamplingConfig,
)
from rl.train import train
from rl.update import NonFinite
from runtime.errors import UserError
from runtime.metrics import read_metrics
from runtime.weights import checkpoint_tensors
from sampling.attest import WeightsMismatch

ROOT = Path(__file__).parents[2]

NAMES = {
    *("loss", "grad_norm", "learning_rate", "entropy", "clip_ratio/region_mean", "num_tokens", "step_time"),
    *("reward", "reward_std", "frac_reward_zero_std", "rewards/unknown"),
    *("completions/mean_length", "completions/min_length", "completions/max_length", "completions/clipped_ratio"),
    *("sampling/logp_gap/mean", "sampling/logp_gap/max", "sampling/effective_sample_size", "weights/version"),
    *("time/rollout", "time/reward", "time/update", "time/sync"),
}


@pytest.fixture(scope="module")
def v3(tmp_path_factory):
    """A random tiny DeepSeek-V3 with its tokenizer."""
    folder = tmp_path_factory.mktemp("v3")
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    deepseek_v3.DeepseekV3ForCausalLM(tiny_config(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "problems.jsonl"
    rows = [{"prompt": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def vowels():
    """A reward every sample gets a different value of; made inside a function so that it travels by value."""

    def count_vowels(completions, **_):
        return [sum(c in "aeiou" for c in text) / 4 for text in completions]

    return count_vowels


@pytest.fixture(scope="module")
def config(v3, problems):
    return GRPOConfig(
        model=str(v3),
        data=problems,
        steps=3,
        prompts_per_step=2,
        group_size=4,
        sampling=SamplingConfig(backend="native", max_tokens=8),
        optim=OptimConfig(lr=1e-3),
        checkpoint=CheckpointConfig(every=1, keep=2),
        evaluation=EvaluationConfig(data=problems, problems=4, every=2, quick_problems=4),
    )


def go(config, run_dir, rewards=None, **changes):
    return train(dataclasses.replace(config, run_dir=str(run_dir), **changes), rewards=rewards or {vowels(): 1.0})


def final_weights(run_dir):
    return load_file(Path(run_dir) / "checkpoints/final/model.safetensors")


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    return go(config, run_dir)


def test_run_folder_holds_what_the_design_promises(finished, config):
    run_dir = finished.run_dir
    steps = [m for m in read_metrics(run_dir / "metrics.jsonl") if "reward" in m]
    assert [m["step"] for m in steps] == [1, 2, 3]
    assert set(steps[0]) >= NAMES | {"rewards/count_vowels/mean", "rewards/count_vowels/std"}
    assert [m["weights/version"] for m in steps] == [1, 2, 3]
    assert "eval/accuracy" in read_metrics(run_dir / "metrics.jsonl")[0]
    for name in ("config.yaml", "environment.json", "report.html"):
        assert (run_dir / name).stat().st_size > 0
    table = pq.read_table(run_dir / "rollouts/step-000002.parquet").to_pylist()
    assert len(table) == config.prompts_per_step * config.group_size
    assert all(len(row["completion_ids"]) == len(row["logprobs"]) for row in table)
    assert {row["version"] for row in table} == {1}


def logprobs(run_dir, step):
    """(group, sample) -> the sampler's log-probs, of what was trained on; and the trainer's."""
    rows = pq.read_table(run_dir / f"rollouts/step-{step:06d}.parquet").to_pylist()
    trained = [row for row in rows if row["used"] and row["advantage"] is not None]
    found = pq.read_table(run_dir / f"trainer/step-{step:06d}.parquet").to_pylist()
    return [{(r["group"], r["sample"]): r["logprobs"] for r in part} for part in (trained, found)]


def test_the_trainers_log_probs_lie_beside_the_samplers(finished, config, tmp_path):
    more = go(config, tmp_path / "r", steps=2, optim=OptimConfig(lr=1e-3, minibatches=2, epochs=2, microbatch_tokens=1))
    for run_dir, step in ((finished.run_dir, 2), (more.run_dir, 2)):
        sampler, trainer = logprobs(run_dir, step)
        assert len(sampler) == config.prompts_per_step * config.group_size
        assert {key: pytest.approx(value, abs=1e-4) for key, value in sampler.items()} == trainer


def test_training_moves_the_weights_and_the_final_checkpoint_is_transformers_own(finished, v3):
    final = finished.run_dir / "checkpoints/final"
    assert not torch.equal(
        final_weights(finished.run_dir)["lm_head.weight"], load_file(v3 / "model.safetensors")["lm_head.weight"]
    )
    ids = torch.arange(20)[None]
    theirs = transformers.DeepseekV3ForCausalLM.from_pretrained(final)
    ours = deepseek_v3.DeepseekV3ForCausalLM.from_pretrained(final)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)
    assert json.loads((final / "config.json").read_text())["topk_method"] == "noaux_tc"
    assert transformers.AutoTokenizer.from_pretrained(final).chat_template


def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(finished, config, tmp_path):
    go(config, tmp_path / "run", steps=1)
    assert finished.steps == go(config, tmp_path / "run", steps=3, resume=True).steps == 3
    whole, resumed = final_weights(finished.run_dir), final_weights(tmp_path / "run")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    timeless = [
        [
            {k: v for k, v in m.items() if not k.startswith("time/") and k not in ("step_time", "tokens_per_second")}
            for m in read_metrics(run_dir / "metrics.jsonl")
            if "reward" in m
        ]
        for run_dir in (finished.run_dir, tmp_path / "run")
    ]
    assert timeless[0] == timeless[1]


def test_resume_with_several_updates_and_a_moving_reference_is_exact(config, tmp_path):
    changes = dict(
        loss=LossConfig(beta=0.1, reference_every=2),
        optim=OptimConfig(lr=1e-3, minibatches=2, epochs=2, microbatch_tokens=64),
    )
    go(config, tmp_path / "whole", steps=4, **changes)
    go(config, tmp_path / "parts", steps=3, **changes)
    go(config, tmp_path / "parts", steps=4, resume=True, **changes)
    whole, parts = final_weights(tmp_path / "whole"), final_weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    kl = [m["kl"] for m in read_metrics(tmp_path / "whole/metrics.jsonl") if "kl" in m]
    assert len(kl) == 4 and all(k > 0 for k in kl)


def test_a_used_folder_is_refused_without_resume(finished, config):
    with pytest.raises(UserError, match="--resume"):
        go(config, finished.run_dir)


def test_resume_with_another_objective_is_refused(finished, config):
    with pytest.raises(UserError, match=r"loss\.epsilon"):
        go(config, finished.run_dir, resume=True, loss=LossConfig(epsilon=0.3))


def test_lora_trains_adapters_only_and_ends_merged(config, v3, tmp_path):
    go(config, tmp_path / "run", lora=LoraConfig(rank=2), steps=2)
    before, after = load_file(v3 / "model.safetensors"), final_weights(tmp_path / "run")
    moved = {name.rsplit(".", 2)[-2] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
    assert not any("lora" in name for name in after)
    go(config, tmp_path / "parts", lora=LoraConfig(rank=2), steps=1)
    go(config, tmp_path / "parts", lora=LoraConfig(rank=2), steps=2, resume=True)
    resumed = final_weights(tmp_path / "parts")
    assert all(torch.equal(after[name], resumed[name]) for name in after)


def test_lora_reference_is_the_model_without_adapters(config, tmp_path):
    result = go(config, tmp_path / "run", lora=LoraConfig(rank=2), loss=LossConfig(beta=0.05))
    kl = [m["kl"] for m in read_metrics(result.run_dir / "metrics.jsonl") if "kl" in m]
    assert kl[0] == 0 and kl[-1] > 0


def test_bf16_keeps_fp32_weights_and_its_gap_is_rounding(config, tmp_path):
    result = go(config, tmp_path / "run", precision="bf16", steps=2)
    metrics = read_metrics(result.run_dir / "metrics.jsonl")[1]
    assert 1e-6 < metrics["sampling/logp_gap/mean"] < 0.02
    assert all(t.dtype == torch.float32 for t in final_weights(tmp_path / "run").values())


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_any_causal_lm_trains_by_path(family, config, tmp_path):
    tokenizer = make_tokenizer()
    sizes = dict(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=tokenizer.eos_token_id, max_position_embeddings=2048, head_dim=16,
    )  # fmt: skip
    kind = {"llama": transformers.LlamaConfig, "qwen3": transformers.Qwen3Config}[family]
    model = transformers.AutoModelForCausalLM.from_config(kind(**sizes, tie_word_embeddings=family == "qwen3"))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    result = go(config, tmp_path / "run", model=str(tmp_path / "model"), steps=2)
    gaps = [m["sampling/logp_gap/max"] for m in read_metrics(result.run_dir / "metrics.jsonl") if "reward" in m]
    assert max(gaps) < 1e-4
    transformers.AutoModelForCausalLM.from_pretrained(result.run_dir / "checkpoints/final")


@pytest.mark.parametrize("name", ["acuracy", "no_such_module.reward"])
def test_a_reward_that_cannot_be_loaded_is_refused_before_anything_is_sampled(config, tmp_path, name):
    with pytest.raises(UserError, match=f"rewards: reward '{name}'"):
        go(config, tmp_path / "run", rewards={name: 1.0})
    assert not list((tmp_path / "run").glob("rollouts/*"))


def test_an_unknown_reward_leaves_its_group_and_is_counted(config, tmp_path):
    def sometimes(prompts, completions, **_):
        return [None if i % 4 == 0 else float(i % 4) for i in range(len(completions))]

    result = go(config, tmp_path / "run", rewards={sometimes: 1.0}, steps=1)
    metrics = read_metrics(result.run_dir / "metrics.jsonl")[1]
    assert metrics["rewards/unknown"] == 0.25
    assert metrics["reward"] == 2.0  # of 1, 2, 3: an unknown is not a zero
    rows = pq.read_table(result.run_dir / "rollouts/step-000001.parquet").to_pylist()
    assert [row["advantage"] is None for row in rows] == [True, False, False, False] * 2


def test_a_sync_that_did_nothing_stops_the_run_before_the_next_group(config, tmp_path, monkeypatch):
    from sampling.native import NativeSampler

    load = NativeSampler.load

    def stale_after_the_first(self, weights, *, version):
        held = [(name, tensor.clone()) for name, tensor in checkpoint_tensors(self.model)]
        return load(self, weights if version == 0 else held, version=version)

    monkeypatch.setattr(NativeSampler, "load", stale_after_the_first)
    with pytest.raises(WeightsMismatch, match="is still version 0's"):
        go(config, tmp_path / "run")
    assert not (tmp_path / "run/rollouts/step-000002.parquet").exists()


def test_a_signal_between_phases_leaves_the_step_undone(config, tmp_path, monkeypatch):
    import rl.train

    def scores_and_signals(groups, scorer, **_):
        os.kill(os.getpid(), signal.SIGTERM)
        return real_score(groups, scorer)

    real_score = rl.train.score
    monkeypatch.setattr(rl.train, "score", scores_and_signals)
    result = go(config, tmp_path / "run")
    assert (result.steps, result.exit_code) == (0, 128 + signal.SIGTERM)
    monkeypatch.undo()
    assert go(config, tmp_path / "run", resume=True).steps == 3


def test_groups_that_do_not_divide_over_minibatches_are_refused(config, tmp_path):
    with pytest.raises(UserError, match="prompts_per_step=2"):
        go(config, tmp_path / "run", optim=dataclasses.replace(config.optim, minibatches=4))


def test_a_step_without_a_known_reward_moves_nothing(config, tmp_path):
    def varied_once(completions, trainer_state=None, **_):
        first = trainer_state.global_step == 0
        return [float(i % 3) if first else None for i in range(len(completions))]

    result = go(config, tmp_path / "run", rewards={varied_once: 1.0})
    saved = [load_file(result.run_dir / f"checkpoints/step-00000{n}/model.safetensors") for n in (2, 3)]
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])


def test_sampler_settings_reach_the_sampler(config, tmp_path):
    result = go(config, tmp_path / "run", steps=1, sampling=SamplingConfig(backend="native", max_tokens=3))
    rows = pq.read_table(result.run_dir / "rollouts/step-000001.parquet").to_pylist()
    assert max(len(row["completion_ids"]) for row in rows) == 3


def seldom():
    """Equal rewards for two questions of three: their groups teach nothing."""

    def seldom_varied(prompts, completions, **_):
        tells = [int(prompt.split()[2]) % 3 == 0 for prompt in prompts]
        return [len(set(text)) / 9 if tell else 0.0 for tell, text in zip(tells, completions, strict=True)]

    return seldom_varied


def rollout_rows(run_dir, step) -> list[dict]:
    return pq.read_table(Path(run_dir) / f"rollouts/step-{step:06d}.parquet").to_pylist()


def step_metrics(run_dir) -> list[dict]:
    return [m for m in read_metrics(Path(run_dir) / "metrics.jsonl") if "reward" in m]


def test_dynamic_sampling_replaces_groups_that_teach_nothing_and_accounts_for_them(config, tmp_path):
    result = go(config, tmp_path / "run", {seldom(): 1.0}, dynamic_sampling=DynamicSamplingConfig(max_rounds=8))
    taken = []
    for step, metrics in enumerate(step_metrics(result.run_dir), start=1):
        rows = rollout_rows(result.run_dir, step)
        used = {row["prompt_index"] for row in rows if row["used"]}
        spare = [row for row in rows if not row["used"]]
        assert len(used) == 2 and all(index % 3 == 0 for index in used)
        assert all(row["advantage"] == 0 for row in spare)
        assert metrics["dynamic/spare_groups"] == len(spare) / 4 == metrics["dynamic/extra_groups"]
        assert metrics["dynamic/spare_tokens"] == sum(len(row["completion_ids"]) for row in spare)
        assert metrics["dynamic/unfilled_groups"] == 0
        taken += [row["prompt_index"] for row in rows[::4]]
    # No prompt is drawn twice within an epoch, and none is passed over.
    assert sorted(taken[:12]) == list(range(12))


def test_when_the_rounds_run_out_a_step_trains_on_what_it_has(config, tmp_path):
    def equal(completions, **_):
        return [0.5] * len(completions)

    dynamic = DynamicSamplingConfig(max_rounds=2)
    result = go(config, tmp_path / "run", {equal: 1.0}, steps=1, dynamic_sampling=dynamic)
    (metrics,) = step_metrics(result.run_dir)
    assert (metrics["dynamic/unfilled_groups"], metrics["dynamic/spare_groups"]) == (2, 4)
    assert len(rollout_rows(result.run_dir, 1)) == 24 and metrics["grad_norm"] == 0


def test_resume_is_exact_with_dynamic_sampling_and_a_curriculum(config, tmp_path):
    changes = dict(
        dynamic_sampling=DynamicSamplingConfig(max_rounds=2),
        curriculum=CurriculumConfig(reward="seldom_varied", floor=0.05),
        checkpoint=CheckpointConfig(every=2),
    )
    go(config, tmp_path / "whole", {seldom(): 1.0}, steps=6, **changes)
    for steps in (1, 4, 6):
        go(config, tmp_path / "parts", {seldom(): 1.0}, steps=steps, resume=True, **changes)
    whole, parts = final_weights(tmp_path / "whole"), final_weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    for step in range(1, 7):
        assert rollout_rows(tmp_path / "whole", step) == rollout_rows(tmp_path / "parts", step)
    drawn = sum(len(rollout_rows(tmp_path / "whole", step)) // 4 for step in range(1, 7))
    about = json.loads(pq.read_schema(tmp_path / "whole/rollouts/step-000006.parquet").metadata[b"rollout"])
    assert about["cursor"] > drawn > 12  # the curriculum passed over some, once it knew them


def test_a_rollout_on_disk_is_trained_on_and_not_sampled_again(config, tmp_path):
    """Even one our sampler would never give: what counts is the file."""
    go(config, tmp_path / "run", steps=2)
    shutil.rmtree(tmp_path / "run/checkpoints/step-000002")
    (tmp_path / "run/checkpoints/latest").unlink(missing_ok=True)
    table = pq.read_table(tmp_path / "run/rollouts/step-000002.parquet")
    swapped = table["advantage"].to_numpy()[::-1].copy()
    table = table.set_column(table.schema.get_field_index("advantage"), "advantage", [swapped])
    path = tmp_path / "run/rollouts/step-000002.parquet"
    pq.write_table(table, path)
    path.with_suffix(".sha256").write_text(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n")
    go(config, tmp_path / "run", steps=2, resume=True)
    assert [row["advantage"] for row in rollout_rows(tmp_path / "run", 2)] == swapped.tolist()
    go(config, tmp_path / "other", steps=2)
    one, other = final_weights(tmp_path / "run"), final_weights(tmp_path / "other")
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


def test_overlong_completions_are_punished_in_the_last_tokens(config, tmp_path):
    result = go(config, tmp_path / "run", steps=1, overlong_buffer=4)
    for row in rollout_rows(result.run_dir, 1):
        punishment = -max(len(row["completion_ids"]) - 4, 0) / 4
        assert row["rewards/overlong"] == punishment
        assert row["reward"] == pytest.approx(row["rewards/count_vowels"] + punishment)
    assert step_metrics(result.run_dir)[0]["rewards/overlong/mean"] <= 0


@pytest.mark.parametrize("experts", ["compare", "replay"])
def test_experts_of_the_sampler_are_compared_with_or_replayed(config, tmp_path, experts):
    sampling = dataclasses.replace(config.sampling, experts=experts)
    result = go(config, tmp_path / "run", sampling=sampling, loss=LossConfig(beta=0.1))
    assert [m["router/flip_rate"] for m in step_metrics(result.run_dir)] == [0, 0, 0]  # fp32 on both sides
    assert all(row["experts"] for row in rollout_rows(result.run_dir, 1))
    plain = go(config, tmp_path / "plain", loss=LossConfig(beta=0.1))
    one, other = final_weights(result.run_dir), final_weights(plain.run_dir)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)


def test_an_engine_in_its_own_process_gives_the_same_run(finished, config, tmp_path):
    result = go(config, tmp_path / "run", sampling=dataclasses.replace(config.sampling, process=True))
    one, other = final_weights(result.run_dir), final_weights(finished.run_dir)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_gradient_that_is_not_finite_moves_nothing_and_names_its_completions(config, tmp_path, monkeypatch):
    import rl.train

    def poisoned(groups, kind):
        set_advantages(groups, kind)
        groups[1].advantages[2] = float("inf")

    set_advantages = rl.train.set_advantages
    monkeypatch.setattr(rl.train, "set_advantages", poisoned)
    with pytest.raises(NonFinite, match="3 updates in a row"):
        go(config, tmp_path / "run")
    named = [json.loads(path.read_text()) for path in sorted((tmp_path / "run").glob("skipped-*.json"))]
    assert [content["step"] for content in named] == [1, 2, 3]
    rows = rollout_rows(tmp_path / "run", 1)
    assert [group["prompt_index"] for group in named[0]["groups"]] == [rows[0]["prompt_index"], rows[4]["prompt_index"]]
    assert named[0]["groups"][1]["advantages"][2] == "inf"
    weights = [load_file(path) for path in (tmp_path / "run").glob("checkpoints/step-*/model.safetensors")]
    before = load_file(Path(config.model) / "model.safetensors")
    assert weights and all(torch.equal(saved[name], before[name]) for saved in weights for name in before)


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_resumes(tmp_path):
    command = [
        *(sys.executable, "-m", "recipes.grpo", "--config", "recipes/configs/kill_test.yaml"),
        *("--run_dir", str(tmp_path / "run")),
    ]
    process = subprocess.Popen(
        [*command, "--steps", "2000"], cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    deadline = time.monotonic() + 1200  # also makes the tiny model, if it is not in the cache
    while len(list(tmp_path.glob("run/rollouts/*.parquet"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.2)
        assert process.poll() is None, process.stderr.read()
    second = subprocess.run([*command, "--steps", "2000", "--resume"], cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == 2 and "in use" in second.stderr
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    done = max(int(p.name.removeprefix("step-")) for p in tmp_path.glob("run/checkpoints/step-*"))
    assert done >= 3
    subprocess.run([*command, "--steps", str(done + 3), "--resume"], cwd=ROOT, check=True, capture_output=True)
    steps = [m["step"] for m in read_metrics(tmp_path / "run/metrics.jsonl") if "reward" in m]
    assert steps == list(range(1, done + 4))


@pytest.mark.slow
def test_two_processes_take_the_same_step_as_one(config, tmp_path):
    import yaml

    settings = dataclasses.asdict(dataclasses.replace(config, steps=2, rewards={"format": 1.0, "accuracy": 1.0}))
    settings |= {"run_dir": None, "rewards": {"tests_reward.length": 1.0}}
    (tmp_path / "tests_reward.py").write_text(
        "def length(completion_ids, **_):\n    return [sum(i) % 7 / 7 for i in completion_ids]\n"
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(settings))))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)]), "OMP_NUM_THREADS": "1"}
    accelerate = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_machines", "1"]
    for n in (1, 2):
        command = [*accelerate, "--num_processes", str(n), "--mixed_precision", "no", "--dynamo_backend", "no"]
        subprocess.run(
            [*command, "-m", "recipes.grpo", "--config", f"{tmp_path}/run.yaml", "--run_dir", f"{tmp_path}/{n}"],
            cwd=ROOT, env=environment, check=True, capture_output=True, text=True,
        )  # fmt: skip
    one, two = final_weights(tmp_path / "1"), final_weights(tmp_path / "2")
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=2e-5, rtol=1e-4)
    rewards = [[m["reward"] for m in read_metrics(tmp_path / f"{n}/metrics.jsonl") if "reward" in m] for n in (1, 2)]
    assert rewards[0] == pytest.approx(rewards[1])
