"""Expected gradients under sampling, all groups enumerated, are the gradients they are said to be, to rounding.

The losses, corrections and KLs are rl.loss's, the advantages rl.advantage's; the truths of benchmarks/gradients.py are
sums over a table that use neither. Rewards are real numbers and all policies differ, unless a test says otherwise.
"""

import math
from dataclasses import replace
from itertools import product
from statistics import median

import pytest
import torch
from torch import Tensor

from benchmarks._enumeration import (
    COMPLETIONS,
    END,
    LENGTHS_S,
    LONGEST,
    PREFIXES,
    VOCAB,
    World,
    all_groups,
    answer_kl,
    answers,
    expected,
    gradient,
    kl_alone,
    lay_out,
    reverse_token_kl,
    reward,
    reward_per_token,
    surrogate,
    table_of,
    token_kl,
    toy,
)
from benchmarks.gradients import FREE, PAGE, TOYS, against, corrections, document, off_by, off_policy, on_policy, pay
from rl.advantage import group_advantages
from rl.config import LossConfig
from rl.loss import LossInputs, Totals, policy_loss

ROUNDING = 1e-10


@pytest.fixture(scope="module")
def world() -> World:
    """Trained, old, sampling and reference policies that all differ; real rewards."""
    generator = torch.Generator().manual_seed(5)

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(2, len(PREFIXES), VOCAB, generator=generator, dtype=torch.float64)

    old = noise(1.0)
    return World(
        policy=old + noise(0.5),
        old=old,
        sampler=old + noise(0.5),
        reference=old + noise(0.7),
        rewards=torch.randn(2, len(COMPLETIONS), generator=generator, dtype=torch.float64),
    )


@pytest.fixture(scope="module")
def on(world) -> World:
    """The same, on policy."""
    return replace(world, old=world.policy, sampler=world.policy)


@pytest.fixture(scope="module")
def off(world) -> World:
    """The same, old policy sampling."""
    return replace(world, sampler=world.old)


def config(objective: str, advantage: str = "rloo", **options) -> LossConfig:
    """Nothing clipped or capped unless asked."""
    return LossConfig(**{
        "objective": objective, "advantage": advantage, "epsilon": FREE, "importance_cap": FREE, **options
    })  # fmt: skip


def share(objective: str, sampler: Tensor) -> float:
    """What a token of an expected gradient is multiplied by, where tokens count alike."""
    mean_length = float((answers(sampler).exp() @ LENGTHS_S.double()).mean())
    return {"dr_grpo": 1 / LONGEST, "sequence": 1.0, "dapo": 1 / mean_length, "cispo": 1 / mean_length}[objective]


# --- the enumeration and the truths -----------------------------------------------------------------------------------


def test_chances_of_all_completions_and_of_all_groups_add_up(world):
    assert len(COMPLETIONS) == 15 and len(set(COMPLETIONS)) == 15
    assert all(END not in o[:-1] and (o[-1] == END or len(o) == LONGEST) for o in COMPLETIONS)
    torch.testing.assert_close(answers(world.policy).exp().sum(1), torch.ones(2).double(), rtol=1e-12, atol=0)
    for size in (2, 3, 4):
        groups, log_orders_K = all_groups(size, 1)
        assert float(log_orders_K.exp().sum()) == pytest.approx(15**size, rel=1e-12)
        chance_K = (log_orders_K + answers(world.policy)[0][groups.members_KG].sum(1)).exp()
        assert float(chance_K.sum()) == pytest.approx(1, rel=1e-12)


def test_truths_agree_where_theory_says_so(world):
    """The policy gradient theorem, and the chain rule of KL; J by products of token probabilities."""
    pi, r, reference = world.policy, world.rewards, world.reference
    assert off_gradient(gradient(surrogate, pi, r, pi), gradient(reward, pi, r)) < ROUNDING
    assert off_gradient(gradient(surrogate, pi, r, world.old), gradient(reward, pi, r)) > 0.01
    assert float(token_kl(pi, reference, pi)) == pytest.approx(float(answer_kl(pi, reference)), rel=1e-12)
    total = 0.0
    for prompt, (s, o) in product(range(2), enumerate(COMPLETIONS)):
        rows = [pi[prompt, PREFIXES.index(o[:t])].softmax(0)[o[t]] for t in range(len(o))]
        total += math.prod(float(p) for p in rows) * float(r[prompt, s]) / 2
    assert float(reward(pi, r)) == pytest.approx(total, rel=1e-12)


def off_gradient(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("objective", ["grpo", "dapo", "gspo", "sequence"])
def test_enumeration_is_the_mean_over_ordered_pairs_of_policy_loss(world, objective):
    """One group a call, whole-number totals, backward to the parameters; everything at work at once."""
    loss = LossConfig(objective=objective, beta=0.3, importance_cap=1.5)
    mean, second = torch.zeros(world.policy.numel()).double(), 0.0
    for prompt, a, b in product(range(2), range(15), range(15)):
        theta = world.policy.clone().requires_grad_()
        groups = lay_out(torch.tensor([prompt]), torch.tensor([[a, b]]))
        x = world.inputs(groups, theta[[prompt]], "grpo")
        totals = Totals(completions=2, tokens=len(x.logp), max_tokens=LONGEST)
        policy_loss(x, config=loss, totals=totals).loss.backward()
        chance = float(answers(world.sampler)[prompt, [a, b]].sum().exp()) / 2
        mean -= chance * theta.grad.flatten()
        second += chance * float(theta.grad.square().sum())
    e = expected(world, loss, size=2, per_group=True)
    torch.testing.assert_close(e.mean, mean, rtol=0, atol=1e-12)
    assert e.variance == pytest.approx(second - float(mean.square().sum()), rel=1e-10)


@pytest.mark.parametrize(
    "loss",
    [
        LossConfig(beta=0.1),
        LossConfig(objective="dapo", advantage="rloo", epsilon_high=0.28),
        LossConfig(objective="dr_grpo", advantage="rloo", importance="sequence_mask", beta=0.2, kl_gradient="direct"),
        LossConfig(objective="gspo", advantage="dr_grpo", importance="sequence_truncate"),
        LossConfig(objective="sequence", advantage="rloo", epsilon=10.0, beta=0.1),
        LossConfig(objective="cispo", epsilon_high=0.5, importance="token_mask"),
    ],
    ids=lambda loss: loss.objective,
)
def test_sampled_groups_have_the_enumerated_gradient(world, loss):
    """20,000 groups drawn token by token, in 100 minibatches: every parameter within 4 standard errors."""
    minibatches, groups, size = 100, 200, 4
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(minibatches):
        theta = world.policy.clone().requires_grad_()
        x = sampled(world, theta, groups, size, loss.advantage, generator)
        totals = Totals(completions=groups * size, tokens=len(x.logp), max_tokens=LONGEST)
        policy_loss(x, config=loss, totals=totals).loss.backward()
        found.append(-theta.grad.flatten())
    found_BD = torch.stack(found)
    exact_D = expected(world, loss).mean
    errors_D = found_BD.std(0) / minibatches**0.5
    assert float(((found_BD.mean(0) - exact_D).abs() / errors_D).max()) < 4
    assert float(errors_D.norm() / exact_D.norm()) < 0.1  # so many groups can tell


def sampled(world: World, theta: Tensor, groups: int, size: int, advantage: str, generator) -> LossInputs:
    """A minibatch drawn as a sampler draws; neither `lay_out` nor the table of completions is used."""
    next_XV = torch.tensor(
        [[PREFIXES.index((*p, v)) if (*p, v) in PREFIXES else -1 for v in range(3)] for p in PREFIXES]
    )
    prompt_N = torch.randint(2, (groups,), generator=generator).repeat_interleave(size)
    at_N, live_N = torch.zeros_like(prompt_N), torch.ones(len(prompt_N), dtype=torch.bool)
    tokens, places = [], []
    for _ in range(LONGEST):
        chance_NV = world.sampler.softmax(-1)[prompt_N, at_N]
        token_N = torch.multinomial(chance_NV, 1, generator=generator)[:, 0]
        tokens.append(torch.where(live_N, token_N, -1))
        places.append(at_N)
        at_N = next_XV[at_N, token_N]
        live_N, at_N = live_N & (at_N >= 0), at_N.clamp(min=0)
    tokens_NT, places_NT = torch.stack(tokens, 1), torch.stack(places, 1)
    real_NT = tokens_NT >= 0
    number_N = torch.tensor([COMPLETIONS.index(tuple(t for t in row if t >= 0)) for row in tokens_NT.tolist()])
    rewards_KG = world.rewards[prompt_N, number_N].view(groups, size)
    at_C = (prompt_N[:, None].expand_as(real_NT)[real_NT], places_NT[real_NT], tokens_NT[real_NT])
    old, sampler, reference = (p.log_softmax(-1)[at_C] for p in (world.old, world.sampler, world.reference))
    return LossInputs(
        logp=theta.log_softmax(-1)[at_C],
        old=old,
        sampler=sampler,
        reference=reference,
        sequence=torch.arange(len(prompt_N))[:, None].expand_as(real_NT)[real_NT],
        advantages=group_advantages(rewards_KG, advantage).flatten(),
        lengths=real_NT.sum(1),
    )


# --- the policy term --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("advantage", ["rloo", "dr_grpo"])
@pytest.mark.parametrize("objective", ["dapo", "dr_grpo", "sequence", "cispo"])
def test_on_policy_these_follow_the_true_gradient(on, objective, advantage, size):
    e = expected(on, LossConfig(objective=objective, advantage=advantage), size=size)
    part = 1.0 if advantage == "rloo" else (size - 1) / size
    assert off_by(e, gradient(reward, on.policy, on.rewards), part * share(objective, on.policy)) < ROUNDING


@pytest.mark.parametrize("advantage", ["rloo", "dr_grpo"])
@pytest.mark.parametrize("objective", ["grpo", "gspo"])
def test_on_policy_division_by_length_follows_the_reward_per_token(on, objective, advantage):
    e = expected(on, LossConfig(objective=objective, advantage=advantage), size=3)
    truth = gradient(reward_per_token, on.policy, on.rewards, on.policy)
    assert off_by(e, truth, 1.0 if advantage == "rloo" else 2 / 3) < ROUNDING
    assert against(e, gradient(reward, on.policy, on.rewards)).error > 0.1


def test_dapo_is_not_exact_over_a_single_group(on):
    e = expected(on, LossConfig(objective="dapo", advantage="rloo"), size=2, per_group=True)
    assert 0.01 < against(e, gradient(reward, on.policy, on.rewards)).error < 0.5


@pytest.mark.parametrize("size", [2, 4])
def test_z_scores_pay_each_prompt_its_own_multiple_where_rewards_are_right_or_wrong(on, size):
    world = replace(on, rewards=(on.rewards > 0.3).double())
    e = expected(world, LossConfig(objective="sequence", advantage="grpo"), size=size)
    rate_P = (answers(world.policy).exp() * world.rewards).sum(1).tolist()
    true_PD = gradient(reward, world.policy, world.rewards).view(2, -1)
    for prompt in range(2):
        multiple = pay(rate_P[prompt], size, "grpo")
        torch.testing.assert_close(e.mean.view(2, -1)[prompt], multiple * true_PD[prompt], rtol=1e-9, atol=1e-14)
    assert pay(0.3, 5, "rloo") == pytest.approx(1) and pay(0.3, 5, "dr_grpo") == pytest.approx(0.8)
    # Two answers, one of them right: ½ off the mean at a std of √½.
    assert pay(0.3, 2, "grpo") == pytest.approx(0.5 / (0.5**0.5 + 1e-4), rel=1e-12)


def test_z_scores_turn_the_gradient_where_rewards_are_graded(on):
    e = expected(on, LossConfig(objective="sequence", advantage="grpo"))
    assert against(e, gradient(reward, on.policy, on.rewards)).error > 0.05


@pytest.mark.parametrize("size", [2, 3])
def test_off_policy_the_ratio_of_whole_answers_is_exact(off, size):
    e = expected(off, config("sequence", importance="none"), size=size)
    assert off_by(e, gradient(reward, off.policy, off.rewards), 1.0) < ROUNDING


@pytest.mark.parametrize("objective", ["dr_grpo", "dapo", "cispo"])
def test_off_policy_token_ratios_follow_the_surrogate(off, objective):
    e = expected(off, config(objective, importance="none"), size=3)
    assert off_by(e, gradient(surrogate, off.policy, off.rewards, off.old), share(objective, off.old)) < ROUNDING
    assert against(e, gradient(reward, off.policy, off.rewards)).error > 0.05


def test_off_policy_gspo_follows_the_geometric_mean_of_ratios(off):
    def value(logits: Tensor) -> Tensor:
        chance_PS = answers(off.old).exp()
        baseline_P1 = (chance_PS * off.rewards).sum(1, keepdim=True)
        ratio_PS = ((answers(logits) - answers(off.old)) / LENGTHS_S).exp()
        return (chance_PS * (off.rewards - baseline_P1) * ratio_PS).sum(1).mean()

    e = expected(off, config("gspo", importance="none"), size=3)
    assert off_by(e, gradient(value, off.policy), 1.0) < ROUNDING


@pytest.mark.parametrize("objective", ["grpo", "dapo", "dr_grpo", "gspo", "cispo"])
def test_a_clip_changes_nothing_until_a_ratio_reaches_it(objective):
    t = toy(0)
    world = World(policy=t.near, old=t.start, sampler=t.start, rewards=t.rewards)
    clip, free = (expected(world, config(objective, epsilon=epsilon)) for epsilon in (0.2, FREE))
    assert torch.equal(clip.mean, free.mean) and clip.held == 0
    moved = replace(world, policy=t.far)
    clip, free = (expected(moved, config(objective, epsilon=epsilon)) for epsilon in (0.05, FREE))
    assert off_gradient(clip.mean, free.mean) > 0.01 and clip.held > 0.01


def one_token_moved(off: World, by: float) -> tuple[World, Tensor]:
    """π is π_old but for a first token that has become likelier; (S,) where answers begin with it."""
    policy = off.old.clone()
    policy[:, 0, 1] += by
    return replace(off, policy=policy), torch.tensor([float(o[0] == 1) for o in COMPLETIONS]).double()


def test_epsilon_10_holds_back_good_answers_beyond_ratio_11_and_never_bad_ones(off):
    old = off.old.clone()
    old[:, 0, 1] -= 3.0
    world, begins_S = one_token_moved(replace(off, old=old, sampler=old), 8.0)
    ratio = (table_of(world.policy) - table_of(world.old)).exp()[:, 1]
    assert bool((ratio > 11).all()), ratio
    bad, good = (replace(world, rewards=sign * begins_S.expand(2, -1)) for sign in (-1.0, 1.0))
    ten, free = (expected(bad, config("dr_grpo", epsilon=e, importance="none"), size=2) for e in (10.0, FREE))
    assert torch.equal(ten.mean, free.mean) and ten.held == 0
    # Of two answers one is held: the one that begins with the token while the other does not. Its first token.
    p_P = (answers(world.old).exp() @ begins_S)[:, None]
    tokens = 2 * float((answers(world.old).exp() @ LENGTHS_S.double()).mean())
    ten, free = (expected(good, config("dr_grpo", epsilon=e, importance="none"), size=2) for e in (10.0, FREE))
    assert ten.held == pytest.approx(float((2 * p_P * (1 - p_P)).mean()) / tokens, rel=1e-10)
    assert off_gradient(ten.mean, free.mean) > 0.1


def test_a_clip_pushes_a_good_token_back_once_it_is_too_likely(off):
    """Good answers no longer push it up; those of its answers that did worse than their siblings still push it down."""
    world, begins_S = one_token_moved(off, 2.0)
    luck = torch.linspace(-1, 1, len(COMPLETIONS), dtype=torch.float64)
    world = replace(world, rewards=(begins_S + luck).expand(2, -1).contiguous())
    push = {}
    for epsilon in (FREE, 0.2):
        e = expected(world, config("dr_grpo", epsilon=epsilon, importance="none"))
        push[epsilon] = e.mean.view_as(world.policy)[:, 0, 1]
    assert bool((push[FREE] > 0).all()) and bool((push[0.2] < 0).all())


# --- the correction for the sampler -----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["truncate", "mask"])
def test_whole_answer_weights_without_a_cap_are_exact_whoever_samples(world, how):
    fresh = replace(world, old=world.policy)
    truth = gradient(reward, world.policy, world.rewards)
    weights = f"sequence_{how}"
    assert off_by(expected(fresh, config("dr_grpo", importance=weights), size=3), truth, 1 / LONGEST) < ROUNDING
    assert off_by(expected(world, config("sequence", importance=weights), size=3), truth, 1.0) < ROUNDING
    assert off_by(expected(world, config("sequence", importance=f"token_{how}"), size=3), truth, 1.0) < ROUNDING
    stale = gradient(surrogate, world.policy, world.rewards, world.old)
    assert off_by(expected(world, config("dr_grpo", importance=weights), size=3), stale, 1 / LONGEST) < ROUNDING
    # Division by length keeps its own objective; the baseline is what the sampler earns.
    per_token = gradient(reward_per_token, world.policy, world.rewards, world.sampler)
    assert off_by(expected(fresh, config("grpo", importance=weights), size=3), per_token, 1.0) < ROUNDING


def test_token_weights_leave_the_samplers_prefixes_and_values(world):
    e = expected(world, config("dr_grpo", importance="token_truncate"), size=3)
    truth = gradient(surrogate, world.policy, world.rewards, world.sampler)
    assert off_by(e, truth, 1 / LONGEST) < ROUNDING
    assert against(e, gradient(reward, world.policy, world.rewards)).error > 0.1


@pytest.mark.parametrize("how", ["none", "sequence_truncate", "sequence_mask"])
def test_without_weights_or_with_a_cap_that_acts_there_is_a_bias(world, how):
    fresh = replace(world, old=world.policy)
    e = expected(fresh, config("dr_grpo", importance=how, importance_cap=1.5), size=3)
    assert against(e, gradient(reward, world.policy, world.rewards)).error > 0.05


def test_effective_share_of_whole_answers_is_the_sum_over_answers(world):
    """(Σw)² / (n Σw²) with Σ p_sampler w = 1."""
    e = expected(world, config("sequence", importance="sequence_truncate"), size=2)
    w2_P = (answers(world.sampler).exp() * (2 * (answers(world.old) - answers(world.sampler))).exp()).sum(1)
    assert e.kept == pytest.approx(1 / float(w2_P.mean()), rel=1e-10)


# --- KL ---------------------------------------------------------------------------------------------------------------


def kl(world: World, objective: str, **options):
    """The expected gradient of the KL term alone."""
    return expected(world, config(objective, **options), size=2, loss=kl_alone)


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
@pytest.mark.parametrize("objective", ["dapo", "dr_grpo", "cispo"])
def test_unbiased_kl_is_that_of_every_next_token_on_the_prefixes_that_were_sampled(world, on, off, objective, name):
    def check(w: World, by: Tensor, importance: str) -> float:
        truth = -gradient(token_kl, w.policy, w.reference, by)
        return off_by(kl(w, objective, kl=name, importance=importance), truth, share(objective, w.sampler))

    assert check(on, on.policy, "none") < ROUNDING
    assert check(off, off.old, "none") < ROUNDING
    assert check(world, world.sampler, "token_truncate") < ROUNDING
    assert check(world, world.old, "sequence_truncate") < ROUNDING
    assert check(world, world.sampler, "none") > 0.1


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
@pytest.mark.parametrize("importance", ["token_truncate", "sequence_truncate"])
def test_unbiased_kl_of_whole_answers_is_exact_whoever_samples(world, name, importance):
    e = kl(world, "sequence", kl=name, importance=importance)
    assert off_by(e, -gradient(answer_kl, world.policy, world.reference), 1.0) < ROUNDING


def test_a_cap_that_acts_turns_the_unbiased_kl(world):
    e = kl(world, "dr_grpo", importance="token_truncate", importance_cap=1.2)
    assert off_by(e, -gradient(token_kl, world.policy, world.reference, world.sampler), 1 / LONGEST) > 0.02


@pytest.mark.parametrize("objective", ["grpo", "gspo"])
def test_division_by_length_turns_the_kl(on, objective):
    e = kl(on, objective)
    assert against(e, -gradient(token_kl, on.policy, on.reference, on.policy)).error > 0.1
    assert against(e, -gradient(answer_kl, on.policy, on.reference)).error > 0.1


def reverse_answer_kl(logits: Tensor, reference: Tensor) -> Tensor:
    return answer_kl(reference, logits)


def test_direct_k3_is_the_reverse_kl_on_policy_and_k2_is_the_kl(on, off):
    def direct(world: World, objective: str, name: str):
        return kl(world, objective, kl=name, kl_gradient="direct")

    reverse = -gradient(reverse_token_kl, on.policy, on.reference, on.policy)
    forward = -gradient(token_kl, on.policy, on.reference, on.policy)
    assert off_by(direct(on, "dr_grpo", "k3"), reverse, 1 / LONGEST) < ROUNDING
    assert off_by(direct(on, "dr_grpo", "k2"), forward, 1 / LONGEST) < ROUNDING
    whole = -gradient(reverse_answer_kl, on.policy, on.reference)
    assert off_by(direct(on, "sequence", "k3"), whole, 1.0) < ROUNDING
    assert off_by(direct(on, "sequence", "k2"), -gradient(answer_kl, on.policy, on.reference), 1.0) < ROUNDING
    for name, value in [("k3", reverse_token_kl), ("k2", token_kl)]:
        truth = -gradient(value, off.policy, off.reference, off.old)
        assert off_by(direct(off, "dr_grpo", name), truth, 1 / LONGEST) > 0.05


@pytest.mark.parametrize("objective", ["dapo", "dr_grpo", "sequence", "cispo"])
def test_direct_k1_is_zero_on_average_on_policy(on, objective):
    e = kl(on, objective, kl="k1", kl_gradient="direct")
    assert float(e.mean.norm()) < ROUNDING and e.variance > 0.01


@pytest.mark.parametrize("objective", ["grpo", "gspo"])
def test_direct_k1_lengthens_answers_where_the_loss_divides_by_length(on, objective):
    def briefness(logits: Tensor) -> Tensor:
        return (answers(logits).exp() / LENGTHS_S).sum(1).mean()

    e = kl(on, objective, kl="k1", kl_gradient="direct")
    assert off_by(e, -gradient(briefness, on.policy), 1.0) < ROUNDING


def test_direct_k1_pushes_away_from_the_old_policy_off_policy(off):
    e = kl(off, "dr_grpo", kl="k1", kl_gradient="direct")
    assert off_by(e, gradient(reverse_token_kl, off.policy, off.old, off.old), 1 / LONGEST) < ROUNDING


@pytest.mark.parametrize("how", ["unbiased", "direct"])
@pytest.mark.parametrize("objective", ["grpo", "dapo", "sequence"])
def test_beta_adds_the_kl_to_the_loss(world, objective, how):
    loss = config(objective, kl_gradient=how)
    parts = [expected(world, c, size=2).mean for c in (replace(loss, beta=0.3), loss)]
    alone = expected(world, loss, size=2, loss=kl_alone).mean
    torch.testing.assert_close(parts[0] - parts[1], 0.3 * alone, rtol=1e-9, atol=1e-13)


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_is_what_the_code_gives_now():
    assert document() == PAGE.read_text(encoding="utf-8"), "run `python -m benchmarks.gradients --write` and read it"


def test_the_findings_hold():
    """What the page's words claim beside its figures."""
    rows = on_policy()
    exact = {labels for labels, columns in rows.items() if max(columns[0]) < ROUNDING}
    assert exact == {("dapo, cispo", "rloo"), ("dr_grpo, sequence", "rloo")}
    assert median(rows["dr_grpo, sequence", "rloo"][2]) < 1.1 * median(rows["grpo, gspo", "grpo"][2])
    stale = off_policy()
    assert {labels for labels, columns in stale.items() if max(columns[4]) < ROUNDING} == {
        ("sequence", "no clip"),
        ("sequence", "10"),
    }
    for objective in ("grpo", "dr_grpo", "sequence"):
        assert stale[objective, "10"] == stale[objective, "no clip"]  # ε = 10 never acts
        assert all(a > b for a, b in zip(stale[objective, "0.2"][4], stale[objective, "no clip"][4], strict=True))
    strong = {labels[1:]: median(columns[3]) for labels, columns in corrections().items() if labels[0] == "dr_grpo"}
    assert min(strong["token_mask", "2"], strong["sequence_mask", "2"]) > 0.95 * strong["none", ""]
    assert strong["sequence_truncate", "2"] < strong["token_truncate", "no cap"] < strong["none", ""]
    assert len(TOYS) >= 7
