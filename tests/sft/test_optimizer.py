"""Gradients -> a step: the schedule, who is decayed and who is Muon's, and what a bad gradient does."""

import math
from typing import Any

import pytest
import torch
import transformers

from runtime.distributed import World
from runtime.models import load_causal_lm
from sft.config import LoraConfig, OptimConfig, SFTConfig
from sft.optimizer import Optimizer, learning_rate
from sft.trainee import Trainee


@pytest.fixture
def trainee(v3, tokenizer) -> Trainee:
    return Trainee(load_causal_lm(v3), tokenizer, SFTConfig(model=str(v3)), World())


def names_of(trainee: Trainee, groups: list[dict[str, Any]]) -> list[str]:
    names = {id(p): name for name, p in trainee.named_parameters()}
    return [names[id(p)] for group in groups for p in group["params"]]


def weights(trainee: Trainee) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainee.named_parameters()}


def give_gradients(trainee: Trainee, value: float = 1.0) -> None:
    for p in trainee.trained:
        p.grad = torch.full_like(p, value)


# The schedule.


@pytest.mark.parametrize(("peak", "end"), [(5e-6, 1e-6), (5e-5, 5e-6), (4e-3, 0.0)])
def test_the_cosine_starts_at_the_peak_and_ends_where_it_should(peak, end):
    config = OptimConfig(lr=peak, final_lr=end)
    rates = [learning_rate(step, 101, config) for step in range(101)]
    assert rates[0] == pytest.approx(peak, rel=1e-12) and rates[100] == end
    assert rates[50] == pytest.approx((peak + end) / 2, rel=1e-12)
    assert rates[25] == pytest.approx(end + (peak - end) * (1 + math.sqrt(0.5)) / 2, rel=1e-12)
    assert rates == sorted(rates, reverse=True)


def test_warm_up_is_a_line_to_the_peak_and_the_last_step_still_has_the_final_rate():
    config = OptimConfig(lr=1.0, final_lr=0.1, warmup_steps=4)
    assert [learning_rate(step, 100, config) for step in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert learning_rate(99, 100, config) == pytest.approx(0.1, abs=1e-15)


@pytest.mark.parametrize("steps", [1, 2, 20, 21])
def test_a_run_no_longer_than_its_warm_up_has_a_rate_for_every_step(steps):
    config = OptimConfig(warmup_steps=20)
    assert all(0 < learning_rate(step, steps, config) <= config.lr for step in range(steps))


@pytest.mark.parametrize("warmup", [0, 5])
def test_the_rates_are_those_of_transformers_cosine_with_min_lr(warmup):
    """Its warm-up starts at 0 and its cosine ends one step behind the last; ours starts and ends with a step."""
    config = OptimConfig(lr=3e-4, final_lr=2e-5, warmup_steps=warmup)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=config.lr)
    scheduler = transformers.get_scheduler(
        "cosine_with_min_lr",
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=29,
        scheduler_specific_kwargs={"min_lr": config.final_lr},
    )
    theirs = []
    for _ in range(30):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    ours = [learning_rate(step, 30, config) for step in range(30)]
    assert ours[warmup:] == pytest.approx(theirs[warmup:], rel=1e-9)
    assert ours[:warmup] == pytest.approx(theirs[1 : warmup + 1], rel=1e-9)


def test_a_step_is_taken_at_its_own_rate(trainee):
    optimizer = Optimizer(trainee, OptimConfig(lr=0.1, final_lr=0.01, weight_decay=0.0, muon=True), steps=3)
    for step in range(3):
        before = weights(trainee)
        give_gradients(trainee)
        optimizer.step(step)
        rates = {group["lr"] for o in optimizer.optimizers for group in o.param_groups}
        assert rates == {learning_rate(step, 3, optimizer.config)}
        moved = trainee.model.model.norm.weight - before["model.model.norm.weight"]
        torch.testing.assert_close(moved, torch.full_like(moved, -rates.pop()), rtol=1e-4, atol=0)  # Adam on ones


# Groups.


def test_matrices_are_decayed_norms_are_not_and_nobody_is_left_out(trainee):
    config = OptimConfig(betas=(0.9, 0.95), weight_decay=0.1)
    (adamw,) = Optimizer(trainee, config, steps=1).optimizers
    decayed, others = adamw.param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert decayed["betas"] == others["betas"] == (0.9, 0.95)
    assert sorted(names_of(trainee, [decayed, others])) == sorted(name for name, _ in trainee.named_parameters())
    assert all("norm" in name for name in names_of(trainee, [others]))
    assert not [name for name in names_of(trainee, [decayed]) if "norm" in name]


def test_muon_has_the_inner_matrices_and_adamw_the_rest(trainee):
    adamw, muon = Optimizer(trainee, OptimConfig(muon=True), steps=1).optimizers
    by_muon, by_adamw = (names_of(trainee, o.param_groups) for o in (muon, adamw))
    assert sorted(by_muon + by_adamw) == sorted(name for name, _ in trainee.named_parameters())
    assert "model.model.layers.0.self_attn.o_proj.weight" in by_muon
    assert "model.model.layers.1.mlp.shared_experts.up_proj.weight" in by_muon
    outside = ("embed", "lm_head", "norm", "mlp.gate.weight", "experts.down_proj", "experts.gate_up_proj")
    assert not [name for name in by_muon if name.endswith(outside) or "embed" in name or "norm" in name]


def test_with_adapters_only_they_are_stepped(v3, tokenizer):
    config = SFTConfig(model=str(v3), lora=LoraConfig(rank=2))
    trainee = Trainee(load_causal_lm(v3), tokenizer, config, World())
    (adamw,) = Optimizer(trainee, config.optim, steps=1).optimizers
    names = names_of(trainee, adamw.param_groups)
    assert names and all(".lora_" in name for name in names)


# Gradients.


def test_the_norm_is_the_one_before_clipping_and_the_step_is_taken_after(trainee):
    count = sum(p.numel() for p in trainee.trained)
    norms, moments = [], []
    for max_norm in (1e9, 1.0):
        optimizer = Optimizer(trainee, OptimConfig(lr=1e-9, final_lr=0.0, max_grad_norm=max_norm), steps=1)
        give_gradients(trainee, 2.0)
        norms.append(optimizer.step(0))
        moments.append(optimizer.optimizers[0].state[trainee.model.lm_head.weight]["exp_avg"][0, 0])
    assert norms == pytest.approx([2 * math.sqrt(count)] * 2, rel=1e-5)
    assert float(moments[0]) == pytest.approx(0.1 * 2, rel=1e-5)
    assert float(moments[1]) == pytest.approx(0.1 / math.sqrt(count), rel=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("muon", [False, True])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(trainee, bad, muon):
    optimizer = Optimizer(trainee, OptimConfig(lr=0.1, final_lr=0.1, muon=muon), steps=9)
    give_gradients(trainee)
    optimizer.step(0)
    before, state = weights(trainee), optimizer.state()
    for count in (1, 2):
        give_gradients(trainee)
        trainee.trained[3].grad[0] = bad
        assert not math.isfinite(optimizer.step(count)) and optimizer.skipped == count
        assert all(p.grad is None for p in trainee.trained)
    assert all(torch.equal(t, before[name]) for name, t in weights(trainee).items())
    after = optimizer.state()
    for name, moments in state["0"]["state"].items():
        assert all(torch.equal(t, after["0"]["state"][name][key]) for key, t in moments.items())
    give_gradients(trainee)
    optimizer.step(3)
    assert optimizer.skipped == 0
    assert not torch.equal(trainee.model.lm_head.weight, before["model.lm_head.weight"])


# State.


@pytest.mark.parametrize("muon", [False, True])
def test_a_state_put_back_goes_on_bit_for_bit(v3, tokenizer, muon):
    def make() -> tuple[Trainee, Optimizer]:
        trainee = Trainee(load_causal_lm(v3), tokenizer, SFTConfig(model=str(v3)), World())
        return trainee, Optimizer(trainee, OptimConfig(lr=0.01, muon=muon), steps=6)

    def steps(trainee: Trainee, optimizer: Optimizer, numbers: range) -> None:
        for step in numbers:
            for p in trainee.trained:
                p.grad = torch.sin(p.detach() * (step + 1))
            optimizer.step(step)

    whole, parts, resumed = make(), make(), make()
    steps(*whole, range(6))
    steps(*parts, range(3))
    resumed[0].load_state_dict(parts[0].state_dict())
    resumed[1].load(parts[1].state())
    steps(*resumed, range(3, 6))
    assert all(torch.equal(t, weights(whole[0])[name]) for name, t in weights(resumed[0]).items())


def test_asking_for_the_state_before_the_first_step_leaves_it_the_first(v3, tokenizer):
    """torch takes a step of zeros to have a state: what follows would be corrected for one step too many."""
    moments = []
    for asked in (False, True):
        trainee = Trainee(load_causal_lm(v3), tokenizer, SFTConfig(model=str(v3)), World())
        optimizer = Optimizer(trainee, OptimConfig(), steps=2)
        if asked:
            optimizer.load(optimizer.state())
        give_gradients(trainee)
        optimizer.step(0)
        moments.append(optimizer.optimizers[0].state[trainee.model.lm_head.weight])
    assert all(torch.equal(t, moments[1][key]) for key, t in moments[0].items())
