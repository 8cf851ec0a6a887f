"""V3's router chooses with the bias and mixes without it; experts drop no token."""

import pytest
import torch
import torch.nn.functional as F

from deepseek_v3.moe import Experts, MoE, Router


@pytest.fixture
def config(config_of):
    return config_of(n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2)


def seeded(module: torch.nn.Module, std: float = 0.3) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(std * torch.randn(p.shape, generator=generator))
    return module


def tokens(T: int = 200) -> torch.Tensor:
    return torch.randn(T, 32, generator=torch.Generator().manual_seed(1))


def test_a_negative_bias_lets_no_expert_in_from_a_lost_group(config):
    router = seeded(Router(config))
    router.e_score_correction_bias.fill_(-10.0)
    router.e_score_correction_bias += torch.linspace(-0.2, 0.2, 16)
    chosen, gates = router(tokens())
    groups = torch.zeros(200, 4).scatter_(1, chosen // 4, 1.0)
    assert groups.sum(1).max() <= 2
    assert (chosen.sort(-1).values.diff() > 0).all()  # four different experts
    torch.testing.assert_close(gates.sum(-1), torch.full((200,), 2.5))


def test_gates_are_unbiased_scores_of_the_chosen(config):
    router = seeded(Router(config))
    chosen_before, _ = router(tokens())
    router.e_score_correction_bias.normal_(std=0.5, generator=torch.Generator().manual_seed(2))
    chosen, gates = router(tokens())
    assert (chosen.sort(-1).values != chosen_before.sort(-1).values).any()
    scores = F.linear(tokens(), router.weight).sigmoid().gather(1, chosen)
    torch.testing.assert_close(gates, 2.5 * scores / scores.sum(-1, keepdim=True))


def test_groups_are_ranked_by_their_two_best(config):
    router = Router(config)
    wanted = torch.full((16,), 0.01)
    wanted[[0, 1]] = 0.9  # group 0: 1.8
    wanted[[4, 5, 6, 7]] = 0.5  # group 1: 1.0, whatever the number of good experts
    wanted[[8, 9]] = 0.55  # group 2: 1.1
    with torch.no_grad():
        router.weight.copy_(wanted.logit()[:, None] / 32)
    chosen, _ = router(torch.ones(1, 32))
    assert chosen.sort().values.tolist() == [[0, 1, 8, 9]]


def test_the_bias_gets_no_gradient_and_the_router_does(config):
    router = seeded(Router(config))
    _, gates = router(tokens())
    gates[:, 0].sum().backward()
    assert router.weight.grad.abs().sum() > 0
    assert not router.e_score_correction_bias.requires_grad


@pytest.mark.parametrize("T", [1, 3, 200])
def test_mixed_experts_are_the_sum_by_hand(config, T):
    experts, x = seeded(Experts(config), 0.1), tokens(T)
    chosen, gates = seeded(Router(config))(x)
    expected = torch.zeros_like(x)
    for t in range(T):
        for e, g in zip(chosen[t].tolist(), gates[t], strict=True):
            gate, up = (experts.gate_up_proj[e] @ x[t]).chunk(2)
            expected[t] += g * (experts.down_proj[e] @ (F.silu(gate) * up))
    torch.testing.assert_close(experts(x, chosen, gates), expected, atol=1e-5, rtol=0)


def test_all_tokens_may_choose_one_expert(config):
    experts, x = seeded(Experts(config), 0.1), tokens(10)
    chosen = torch.tensor([[3, 5, 6, 7]]).expand(10, 4)
    out = experts(x, chosen, torch.ones(10, 4))
    alone = torch.cat([experts(row[None], chosen[:1], torch.ones(1, 4)) for row in x])
    torch.testing.assert_close(out, alone, atol=1e-6, rtol=0)


def test_the_shared_expert_is_added_unweighted(config):
    moe, x = seeded(MoE(config), 0.1), tokens(5)
    torch.testing.assert_close(moe(x), moe.experts(x, *moe.gate(x)) + moe.shared_experts(x))


def test_the_router_works_in_fp32_whatever_the_model(config):
    router = seeded(Router(config)).to(torch.bfloat16)
    x = tokens().to(torch.bfloat16)
    _, gates = router(x)
    scores = F.linear(x.float(), router.weight.float()).sigmoid()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again, _ = router(x.float())
    chosen, _ = router(x)
    assert gates.dtype == torch.float32 and torch.equal(again, chosen)
    torch.testing.assert_close(gates, 2.5 * (s := scores.gather(1, chosen)) / s.sum(-1, keepdim=True))
