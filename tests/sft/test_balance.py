"""Balance: the sequence-wise loss is the equations', and the bias moves against the load."""

import pytest
import torch

import deepseek_v3
from deepseek_v3.moe import Router
from runtime.distributed import World
from runtime.packed import pack, packed_hidden
from sft.balance import Balance

E, K = 4, 2
SEQUENCES = [[1, 2, 3, 4, 5, 6, 7], [9, 8, 7], [5, 5, 5, 5, 5]]


@pytest.fixture
def model():
    config = deepseek_v3.preset(
        "tiny", vocab_size=16, hidden_size=16, num_hidden_layers=3, n_routed_experts=E, num_experts_per_tok=K,
        moe_intermediate_size=8, intermediate_size=16, n_group=1, topk_group=1, initializer_range=0.5,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return deepseek_v3.DeepseekV3ForCausalLM(config)


def balance_loss(model, sequences) -> torch.Tensor:
    balance, packed = Balance(model), pack(sequences)
    with balance.watching():
        packed_hidden(model, packed)
        return balance.loss(packed.layout)


def scores_of(model, ids: list[int]) -> list[torch.Tensor]:
    """s_{i,t} of one sequence alone, (T, E) for each layer with experts, by the plain definition."""
    inputs: list[torch.Tensor] = []
    routers = [m for m in model.modules() if isinstance(m, Router)]
    hooks = [r.register_forward_pre_hook(lambda _, x: inputs.append(x[0].detach())) for r in routers]
    packed_hidden(model, pack([ids]))
    for hook in hooks:
        hook.remove()
    return [torch.sigmoid(x @ r.weight.detach().T) for x, r in zip(inputs, routers, strict=True)]


@torch.no_grad()
def test_the_loss_is_that_of_equations_17_to_20_term_by_term(model):
    expected = 0.0
    for ids in SEQUENCES:
        for s in scores_of(model, ids):
            T = len(ids)
            for i in range(E):
                chosen = sum(i in s[t].topk(K).indices.tolist() for t in range(T))
                f = E / (K * T) * chosen
                P = sum(float(s[t, i] / sum(s[t, j] for j in range(E))) for t in range(T)) / T
                expected += f * P
    assert float(balance_loss(model, SEQUENCES)) == pytest.approx(expected, rel=1e-5)


def test_packed_equals_separate_in_loss_and_gradients(model):
    model.double()  # routers stay fp32; in fp32 the embedding's gradient alone has a rounding error of 1e-4

    def gradients(packs: list[list[list[int]]]) -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad()
        losses = [balance_loss(model, sequences) for sequences in packs]
        sum(losses).backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return float(sum(losses).detach()), found

    (together, packed), (apart, separate) = gradients([SEQUENCES]), gradients([[s] for s in SEQUENCES])
    assert together == pytest.approx(apart, rel=1e-5)
    assert packed.keys() == separate.keys() and "model.layers.1.mlp.gate.weight" in packed
    for name, gradient in separate.items():
        torch.testing.assert_close(packed[name], gradient, rtol=0, atol=1e-5 * max(float(gradient.abs().max()), 1e-2))


@torch.no_grad()
def test_an_even_load_is_1_a_sequence_and_layer_and_a_collapsed_one_more(model):
    routers = [m for m in model.modules() if isinstance(m, Router)]
    for router in routers:
        router.weight.zero_()  # every score is the same; the bias decides who is chosen
    assert float(balance_loss(model, SEQUENCES)) == pytest.approx(len(routers) * len(SEQUENCES))
    router = routers[0]
    router.weight.copy_(torch.tensor([1.0, 1.0, -1.0, -1.0])[:, None].expand(E, 16))
    balance = Balance(router)
    with balance.watching():
        router(torch.ones(7, 16))  # all to the first two, whose scores are nearly 1, the others' nearly 0
        assert float(balance.loss(pack([[0] * 7]).layout)) == pytest.approx(E / K, rel=1e-5)


def chosen_counts(model, sequences) -> list[torch.Tensor]:
    counts = []
    for layer in range(len(scores_of(model, sequences[0]))):
        chosen = torch.cat([scores_of(model, ids)[layer].topk(K).indices.flatten() for ids in sequences])
        counts.append(torch.bincount(chosen, minlength=E))
    return counts


@torch.no_grad()
def test_the_bias_of_experts_above_the_mean_falls_and_of_the_others_rises(model):
    balance = Balance(model)
    for sequences in (SEQUENCES[:1], SEQUENCES[1:]):  # two passes of one step
        with balance.watching():
            packed_hidden(model, pack(sequences))
    counts = chosen_counts(model, SEQUENCES)
    worst = balance.update(0.25, World())["router/max_load"]
    mean = sum(map(len, SEQUENCES)) * K / E
    for router, count in zip(balance.routers, counts, strict=True):
        assert router.e_score_correction_bias.tolist() == (0.25 * torch.sign(mean - count)).tolist()
        assert count.sum() == E * mean and (count != mean).any()
    assert worst == pytest.approx(max(float(count.max()) for count in counts) / mean)


@torch.no_grad()
def test_nothing_moves_without_speed_or_for_passes_that_dont_count_and_loads_start_afresh(model):
    balance = Balance(model)

    def run(**options: bool) -> None:
        with balance.watching(**options):
            packed_hidden(model, pack(SEQUENCES))

    run()
    assert balance.update(0.0, World())["router/max_load"] > 1
    run(counted=False)
    packed_hidden(model, pack(SEQUENCES))  # watched by nobody
    assert balance.update(0.25, World())["router/max_load"] == 0
    assert all(not router.e_score_correction_bias.any() for router in balance.routers)
    assert all(not router.on_scores for router in balance.routers)


@torch.no_grad()
def test_updates_even_out_the_load(model):
    balance, worst = Balance(model), []
    sequences = [torch.randint(0, 16, (40,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(8)]
    for _ in range(40):
        with balance.watching():
            packed_hidden(model, pack(sequences))
        worst.append(balance.update(0.02, World())["router/max_load"])
    assert worst[0] > 1.2 and worst[-1] < 1.15


@torch.no_grad()
def test_2000_updates_even_out_a_skewed_router_to_the_noise_of_sampling():
    """V3's speed, groups included; 1,024 tokens a step are 128 an expert, give or take 11."""
    config = deepseek_v3.preset("tiny", hidden_size=16, n_routed_experts=16, n_group=4, topk_group=2)
    router, generator = Router(config), torch.Generator().manual_seed(0)
    router.weight.copy_(0.1 * torch.randn(16, 16, generator=generator))
    router.weight[:, 0] = torch.linspace(-1, 1, 16)
    balance, worst = Balance(router), []
    for _ in range(2000):
        x_TD = torch.randn(1024, 16, generator=generator)
        x_TD[:, 0] = 1.0
        with balance.watching():
            router(x_TD)
        worst.append(balance.update(0.001, World())["router/max_load"])
    assert worst[0] > 5
    assert sum(worst[-100:]) / 100 < 1.25


def test_a_dense_model_has_nothing_to_balance():
    balance = Balance(torch.nn.Linear(2, 2))
    assert balance.routers == [] and balance.update(0.1, World()) == {}
