"""V3's router chooses with the bias and mixes without it; experts drop no token."""

from collections.abc import Sequence

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek_v3.moe import MANY_TOKENS, Experts, MoE, Router, can_group, mixed_in_groups


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
    c_TGe = (F.linear(tokens(), router.weight).sigmoid() + router.e_score_correction_bias).view(-1, 4, 4)
    kept = c_TGe.topk(2).values.sum(-1).topk(2).indices
    assert c_TGe.max() < 0
    assert (chosen[..., None] // 4 == kept[:, None]).any(-1).all()
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
    wanted[12] = 0.95  # group 3: 0.96, though it has the best of all
    with torch.no_grad():
        router.weight.copy_(wanted.logit()[:, None] / 32)
    chosen, _ = router(torch.ones(1, 32))
    assert chosen.sort().values.tolist() == [[0, 1, 8, 9]]


@pytest.mark.parametrize(
    "groups",
    [dict(n_group=8, topk_group=1), dict(n_group=5), dict(n_group=4, topk_group=5), dict(n_group=16, topk_group=8)],
)
def test_groups_that_cannot_hold_a_choice_are_refused(config_of, groups):
    with pytest.raises(
        ValueError, match=r"n_group=\d+, topk_group=\d: 16 experts .*num_experts_per_tok=4 .*lower n_group"
    ):
        Router(config_of(n_routed_experts=16, num_experts_per_tok=4, **groups))


def test_the_bias_gets_no_gradient_and_the_router_does(config):
    router = seeded(Router(config))
    _, gates = router(tokens())
    gates[:, 0].sum().backward()
    assert router.weight.grad.abs().sum() > 0
    assert not router.e_score_correction_bias.requires_grad


def one_by_one(experts: Experts, *routed: Tensor) -> Tensor:
    return experts(*routed)


def in_groups(experts: Experts, *routed: Tensor) -> Tensor:
    """What CUDA does in bf16; torch's grouped product also runs on a CPU."""
    return mixed_in_groups(*routed, experts.gate_up_proj, experts.down_proj)


def by_hand(experts: Experts, x_TD: Tensor, chosen_TK: Tensor, gates_TK: Tensor) -> Tensor:
    out = []
    for x, chosen, gates in zip(x_TD, chosen_TK.tolist(), gates_TK, strict=True):
        y = torch.zeros_like(x)
        for e, gate in zip(chosen, gates, strict=True):
            g, u = (experts.gate_up_proj[e] @ x).chunk(2)
            y = y + gate * (experts.down_proj[e] @ (F.silu(g) * u))
        out.append(y)
    return torch.stack(out)


def some(T: int, of: Sequence[int]) -> Tensor:
    """4 different ones of `of` for each token."""
    order = torch.rand(T, len(of), generator=torch.Generator().manual_seed(2)).argsort(-1)[:, :4]
    return torch.tensor(of)[order]


# What tokens choose among 16 experts.
LOADS = {
    "one token": some(1, range(16)),
    "three tokens": some(3, range(16)),
    "any": some(150, range(16)),
    "half are empty": some(150, range(0, 16, 2)),
    "all the same": torch.tensor([[3, 5, 6, 7]]).expand(150, 4),
    "one is in every choice": torch.cat([torch.full((150, 1), 9), some(150, [0, 1, 2, 3, 4, 5])[:, :3]], dim=1),
    "few for most": torch.cat([some(140, [0, 1, 2, 3]), some(10, range(4, 16))]),
    "no token": some(0, range(16)),
}


def outputs_and_gradients(way, experts: Experts, chosen_TK: Tensor, device: str = "cpu") -> dict[str, Tensor]:
    x, gates = tokens(len(chosen_TK)), torch.rand(chosen_TK.shape, generator=torch.Generator().manual_seed(3))
    x, gates = (t.to(device, experts.down_proj.dtype).requires_grad_() for t in (x, gates))
    experts.zero_grad()
    out = way(experts, x, chosen_TK.to(device), gates)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).to(out)
    (out * weight).sum().backward()
    gradients = {name: p.grad for name, p in experts.named_parameters()}
    return {"output": out.detach(), "input": x.grad, "gates": gates.grad, **gradients}


@pytest.mark.parametrize("way", [one_by_one, in_groups])
@pytest.mark.parametrize("load", [load for load in LOADS if load != "no token"])
def test_outputs_and_gradients_are_the_sums_by_hand(config, way, load: str) -> None:
    experts = seeded(Experts(config), 0.1)
    got = outputs_and_gradients(way, experts, LOADS[load])
    expected = outputs_and_gradients(by_hand, seeded(Experts(config), 0.1).double(), LOADS[load])
    for name, tensor in expected.items():
        tensor = torch.zeros_like(got[name]) if tensor is None else tensor
        assert (got[name] - tensor).abs().max() <= 1e-5 * tensor.abs().max(), name


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("rows", [1, 50])
def test_experts_one_a_block_or_several_give_the_same_bits(config, monkeypatch, rows: int, load: str) -> None:
    experts = seeded(Experts(config), 0.1)
    together = outputs_and_gradients(one_by_one, experts, LOADS[load])
    monkeypatch.setattr("deepseek_v3.moe._BLOCK_ROWS", rows)
    apart = outputs_and_gradients(one_by_one, experts, LOADS[load])
    assert all(torch.equal(apart[name], tensor) for name, tensor in together.items())


def test_no_token_at_all_has_gradients_of_zero(config) -> None:
    """A rank of an expert-parallel group may get none."""
    got = outputs_and_gradients(one_by_one, seeded(Experts(config)), LOADS["no token"])
    assert got["output"].shape == (0, 32)
    assert not got["gate_up_proj"].any() and not got["down_proj"].any()


@torch.no_grad()
def test_a_tokens_output_has_the_same_bits_however_few_tokens_share_its_experts(config) -> None:
    experts, x, gates = seeded(Experts(config), 0.1), tokens(MANY_TOKENS), torch.full((MANY_TOKENS, 4), 0.25)
    outputs = set()
    for sharing in (0, 1, 2, 7, 14, 15, 16, 17, 60, MANY_TOKENS - 1):
        chosen = torch.tensor([[8, 9, 10, 11]]).repeat(MANY_TOKENS, 1)
        chosen[: sharing + 1] = torch.tensor([0, 1, 2, 3])
        outputs.add(experts(x, chosen, gates)[0].numpy().tobytes())
    assert len(outputs) == 1


def test_frozen_weights_get_no_gradient_and_the_input_the_same(config) -> None:
    free = outputs_and_gradients(one_by_one, seeded(Experts(config), 0.1), LOADS["any"])
    frozen = outputs_and_gradients(one_by_one, seeded(Experts(config), 0.1).requires_grad_(False), LOADS["any"])
    assert frozen["gate_up_proj"] is frozen["down_proj"] is None
    assert torch.equal(frozen["input"], free["input"]) and torch.equal(frozen["gates"], free["gates"])


def test_bf16_adds_up_in_fp32(config) -> None:
    """Outputs and the input's gradient are the sums over a token's experts, one after the other alone, rounded once."""
    experts, gates = seeded(Experts(config), 0.1).bfloat16(), torch.full((150, 4), 0.25, dtype=torch.bfloat16)
    weight = torch.randn(150, 32, generator=torch.Generator().manual_seed(4)).bfloat16()

    def run(k: slice) -> Tensor:
        x = tokens(150).bfloat16().requires_grad_()
        out = experts(x, LOADS["any"][:, k], gates[:, k])
        out.backward(weight)
        return torch.stack([out.detach(), x.grad])

    parts = sum(run(slice(k, k + 1)).float() for k in range(4))
    for got, expected in zip(run(slice(4)), parts.bfloat16(), strict=True):
        assert (got == expected).float().mean() > 0.99


def test_bf16_is_as_near_to_fp32_as_its_roundings_allow(config) -> None:
    experts = seeded(Experts(config), 0.1).bfloat16()
    got = outputs_and_gradients(one_by_one, experts, LOADS["any"])
    expected = outputs_and_gradients(one_by_one, experts.float(), LOADS["any"])
    for name, tensor in expected.items():
        assert (got[name].float() - tensor).norm() <= 8e-3 * tensor.norm(), name


def test_autocast_multiplies_in_bf16_and_leaves_gradients_in_fp32(config) -> None:
    def under_autocast(experts: Experts, *routed: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = experts(*routed)
        assert out.dtype == torch.bfloat16
        return out

    experts = seeded(Experts(config), 0.1)
    got = outputs_and_gradients(under_autocast, experts, LOADS["any"])
    expected = outputs_and_gradients(one_by_one, experts, LOADS["any"])
    for name, tensor in expected.items():
        assert name == "output" or got[name].dtype == torch.float32
        assert 1e-4 * tensor.norm() < (got[name].float() - tensor).norm() <= 1e-2 * tensor.norm(), name


def test_adapters_on_experts_change_outputs_and_learn(config) -> None:
    moe, x = seeded(MoE(config), 0.1), tokens(50)
    before = moe(x).detach()
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    adapted = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=[], target_parameters=targets), moe)
    adapters = {name: p for name, p in adapted.named_parameters() if "lora_" in name}
    torch.testing.assert_close(adapted(x), before)
    with torch.no_grad():
        for p in adapters.values():
            p.normal_(std=0.3, generator=torch.Generator().manual_seed(5))
    assert (adapted(x) - before).abs().max() > 0.01
    adapted(x).square().sum().backward()
    assert len(adapters) == 4
    assert all(p.grad is not None and p.grad.any() for p in adapters.values())


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


cuda = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("dtype", [pytest.param(torch.bfloat16, marks=cuda), pytest.param(torch.float32, marks=cuda)])
def test_cuda_computes_what_the_cpu_does(config, dtype: torch.dtype, load: str) -> None:
    """bf16 in groups, fp32 expert by expert."""
    torch.set_float32_matmul_precision("highest")
    experts = seeded(Experts(config), 0.1).to(dtype)
    expected = outputs_and_gradients(one_by_one, experts.float(), LOADS[load])
    experts = experts.to("cuda", dtype)
    assert can_group(experts.down_proj[0], experts.gate_up_proj) == (dtype == torch.bfloat16)
    got = outputs_and_gradients(one_by_one, experts, LOADS[load], "cuda")
    for name, tensor in expected.items():
        limit = 1e-2 if dtype == torch.bfloat16 else 1e-5
        assert (got[name].cpu().float() - tensor).norm() <= limit * tensor.norm(), name


@pytest.mark.parametrize("dtype", [pytest.param(torch.bfloat16, marks=cuda)])
def test_on_cuda_nothing_waits_for_the_host_and_again_is_the_same(config, dtype: torch.dtype) -> None:
    experts = seeded(Experts(config), 0.1).to("cuda", dtype)
    x, chosen = tokens(150).to("cuda", dtype).requires_grad_(), LOADS["any"].cuda()
    gates = torch.full((150, 4), 0.25, device="cuda", dtype=dtype)
    results = []
    for mode in ("default", "error"):  # the first time, kernels are chosen
        torch.cuda.set_sync_debug_mode(mode)
        try:
            out = experts(x, chosen, gates)
            results.append([out, *torch.autograd.grad(out, [x, *experts.parameters()], torch.ones_like(out))])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
