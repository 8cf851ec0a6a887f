"""R1-Zero's schedule scaled down: a rollout is several updates on equal shares, the reference stays for several."""

import json

import torch

import deepseek_v3
from recipes.tiny import make_tokenizer, tiny_config
from rl.config import EvaluationConfig, GRPOConfig, LossConfig, OptimConfig, SamplingConfig
from rl.policy import Policy
from rl.train import train
from rl.update import Optimizer


def test_each_update_has_its_share_of_the_rollout_and_the_reference_is_replaced_every_so_many_rollouts(
    tmp_path, monkeypatch
):
    tokenizer = make_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        deepseek_v3.DeepseekV3ForCausalLM(tiny_config(tokenizer)).save_pretrained(tmp_path / "v3")
    tokenizer.save_pretrained(tmp_path / "v3")
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps({"prompt": f"{i}+{i}?", "answer": str(2 * i)}) + "\n" for i in range(4)))
    updates, completions, replaced = 0, [], []
    step, logprobs, replace = Optimizer.step, Policy.logprobs, Policy.replace_reference

    def counted(optimizer):
        nonlocal updates
        updates += 1
        return step(optimizer)

    def seen(policy, batch):
        if torch.is_grad_enabled():
            completions.append(len(batch.lengths_N))
        return logprobs(policy, batch)

    def noted(policy):
        replaced.append(updates)
        replace(policy)

    monkeypatch.setattr(Optimizer, "step", counted)
    monkeypatch.setattr(Policy, "logprobs", seen)
    monkeypatch.setattr(Policy, "replace_reference", noted)
    config = GRPOConfig(
        model=str(tmp_path / "v3"),
        data=str(problems),
        steps=5,
        prompts_per_step=4,
        group_size=2,
        sampling=SamplingConfig(backend="native", max_tokens=3),
        optim=OptimConfig(lr=1e-5, minibatches=4),
        loss=LossConfig(beta=0.001, reference_every=2, epsilon=10),
        evaluation=EvaluationConfig(),
        run_dir=str(tmp_path / "run"),
    )

    def alternating(completions, **_):
        return [float(i % 2) for i in range(len(completions))]

    train(config, rewards={alternating: 1.0})
    assert completions == [2] * 5 * 4 and updates == 5 * 4
    assert replaced == [2 * 4, 4 * 4]
