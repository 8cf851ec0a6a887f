"""Recorded experts are those a forward used; replayed ones are used, with live gates, and the flips counted."""

import peft
import pytest
import torch
import torch.nn.functional as F

from deepseek_v3.moe import MLP, MoE, Router
from deepseek_v3.routing import Flips, has_routers, recorded, replayed, set_flips

IDS = torch.randint(64, (1, 30), generator=torch.Generator().manual_seed(0))
L, T, K, E = 2, 30, 3, 8


@pytest.fixture
def model(make):
    return make()


def random_choices(tokens: int = T, seed: int = 1) -> torch.Tensor:
    """(L, tokens, K) of K different experts, from any group."""
    return torch.rand(L, tokens, E, generator=torch.Generator().manual_seed(seed)).argsort(-1)[..., :K].to(torch.int16)


def left_behind(model) -> int:
    return sum(len(module.on_choice) for module in model.modules() if isinstance(module, Router))


@torch.no_grad()
def own_choices(model, ids=IDS) -> torch.Tensor:
    with recorded(model) as choices:
        model(ids)
    return choices.chosen_LTK


def by_hand(model, chosen_LTK):
    """Logits of IDS where each layer mixes the given experts, token by token."""

    def mixed(moe, x_TD, chosen_TK):
        out = []
        for x, chosen in zip(x_TD, chosen_TK.tolist(), strict=True):
            scores = (moe.gate.weight[chosen] @ x).sigmoid()
            gates = 2.5 * scores / scores.sum()
            y = moe.shared_experts(x)
            for e, gate in zip(chosen, gates, strict=True):
                g, u = (moe.experts.gate_up_proj[e] @ x).chunk(2)
                y = y + gate * (moe.experts.down_proj[e] @ (F.silu(g) * u))
            out.append(y)
        return torch.stack(out)

    moes = [module for module in model.modules() if isinstance(module, MoE)]
    plain = MoE.forward
    given = {id(moe): chosen for moe, chosen in zip(moes, chosen_LTK, strict=True)}
    try:
        MoE.forward = lambda moe, x_TD: mixed(moe, x_TD, given[id(moe)])
        return model(IDS).logits
    finally:
        MoE.forward = plain


def test_recorded_choices_are_those_the_routers_return(model):
    returned = []
    gates = [module for module in model.modules() if isinstance(module, Router)]
    handles = [gate.register_forward_hook(lambda _, __, out: returned.append(out[0])) for gate in gates]
    chosen = own_choices(model)
    for handle in handles:
        handle.remove()
    assert (chosen.shape, chosen.dtype) == ((L, T, K), torch.int16)
    assert torch.equal(chosen.long(), torch.stack(returned))


def test_forwards_are_recorded_one_after_the_other(model):
    with recorded(model) as choices:
        model(IDS[:, :12])
        model(IDS[:, 12:])
    parts = [own_choices(model, IDS[:, :12]), own_choices(model, IDS[:, 12:])]
    assert torch.equal(choices.chosen_LTK, torch.cat(parts, dim=1))


def test_replaying_its_own_choices_changes_no_bit(model):
    plain = model(IDS).logits
    with replayed(model, own_choices(model)) as flips:
        again = model(IDS).logits
    assert torch.equal(plain, again)
    assert (flips.flipped, flips.total, flips.rate) == (0, L * T, 0.0)


def test_the_order_of_recorded_experts_is_no_flip(model):
    plain = model(IDS).logits
    with replayed(model, own_choices(model).flip(-1)) as flips:
        again = model(IDS).logits
    assert flips.flipped == 0
    torch.testing.assert_close(again, plain, atol=1e-5, rtol=0)


def test_replayed_choices_are_the_experts_that_are_mixed_with_live_gates(model):
    chosen = random_choices()
    (by_hand(model, chosen).sum()).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with replayed(model, chosen):
        logits = model(IDS).logits
        logits.sum().backward()
    torch.testing.assert_close(logits, by_hand(model, chosen), atol=1e-5, rtol=1e-5)
    assert (logits - model(IDS).logits).abs().max() > 0.1  # another model than that of its own choices
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], atol=1e-4, rtol=1e-4, msg=name)
    assert all(p.grad.abs().max() > 1e-4 for name, p in model.named_parameters() if "gate.weight" in name)


def test_comparing_changes_no_bit_and_counts_the_same(model):
    plain, chosen = model(IDS).logits, random_choices()
    with replayed(model, chosen, use=False) as flips:
        again = model(IDS).logits
    assert torch.equal(plain, again)
    assert (flips.flipped, flips.total) == set_flips(own_choices(model), chosen)
    assert flips.rate > 0.5


def test_a_perturbed_router_flips_as_many_as_counted_by_hand(model):
    before = own_choices(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "gate.weight" in name:
                p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3))
    after = own_choices(model)
    differ = [set(a) != set(b) for x, y in zip(before.tolist(), after.tolist(), strict=True)
              for a, b in zip(x, y, strict=True)]  # fmt: skip
    assert 0 < sum(differ) < L * T / 2
    with replayed(model, before, use=False) as flips:
        model(IDS)
    assert (flips.flipped, flips.total) == (sum(differ), L * T)
    assert flips.rate == sum(differ) / (L * T)


def test_flips_are_differences_of_sets():
    a = torch.tensor([[[0, 1], [2, 3], [4, 5], [-1, -1], [6, 7]]])
    b = torch.tensor([[[1, 0], [2, 4], [-1, -1], [-1, -1], [6, 7]]], dtype=torch.int16)
    assert set_flips(a, b) == (1, 3)


def test_tokens_without_a_record_choose_freely_and_are_not_counted(model):
    plain, own, other = model(IDS).logits, own_choices(model), random_choices()
    mixed = own.clone()
    mixed[:, 5:] = -1
    with replayed(model, mixed) as flips:
        assert torch.equal(model(IDS).logits, plain)
    assert (flips.flipped, flips.total) == (0, 5 * L)
    mixed[0, :5] = other[0, :5]
    with replayed(model, mixed) as flips:
        used = model(IDS).logits
    assert flips.total == 5 * L and 0 < flips.flipped <= 5 * L
    assert not torch.equal(used, plain)
    with replayed(model, torch.full((L, T, K), -1)) as flips:
        assert torch.equal(model(IDS).logits, plain)
    assert (flips.total, flips.rate) == (0, 0.0)


def test_forwards_take_the_choices_in_turn(model):
    chosen = random_choices()
    with replayed(model, chosen) as flips:
        parts = [model(IDS[:, :7]).logits, model(IDS[:, 7:9]).logits, model(IDS[:, 9:]).logits]
    alone = []
    for start, end in ((0, 7), (7, 9), (9, 30)):
        with replayed(model, chosen[:, start:end]):
            alone.append(model(IDS[:, start:end]).logits)
    assert all(torch.equal(a, b) for a, b in zip(parts, alone, strict=True))
    assert flips.total == L * T


def test_counts_add_up_over_replays(model):
    flips = Flips()
    for seed in (1, 2):
        with replayed(model, random_choices(seed=seed), flips=flips) as same:
            model(IDS)
        assert same is flips
    assert flips.total == 2 * L * T


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("order", ["as one", "first to last", "last to first", "after each"])
def test_checkpointed_blocks_recompute_what_was_replayed(make, reentrant, order):
    """Two forwards of the same length, their backwards in any order, against the same without checkpointing."""
    model, chosen = make().train(), random_choices()
    model.enable_input_require_grads()
    chosen[:, 20:23] = -1

    def gradients():
        model.zero_grad()
        with replayed(model, chosen) as flips, recorded(model) as choices:
            losses = []
            for part in (IDS[:, :15], IDS[:, 15:]):
                losses.append(model(part, labels=part).loss)
                if order == "after each":
                    losses.pop().backward()
            if order == "as one":
                sum(losses).backward()
            for loss in {"first to last": losses, "last to first": losses[::-1]}.get(order, []):
                loss.backward()
        assert choices.chosen_LTK.shape == (L, T, K)  # recomputed choices aren't recorded again
        taken = torch.where(chosen < 0, choices.chosen_LTK, chosen)
        assert torch.equal(choices.chosen_LTK, taken)
        return flips, {name: p.grad.clone() for name, p in model.named_parameters()}

    flips, plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = []
    handle = model.model.layers[1].mlp.gate.register_forward_hook(lambda *_: calls.append(1))
    flips_again, recomputed = gradients()
    handle.remove()
    assert len(calls) == 4
    assert flips_again == flips and flips.total == L * (T - 3)
    assert all(torch.equal(recomputed[name], g) for name, g in plain.items())


def test_a_forward_from_outside_is_not_recomputed_with_replayed_choices(make):
    model = make().train()
    model.gradient_checkpointing_enable()
    loss = model(IDS[:, :9], labels=IDS[:, :9]).loss
    with pytest.raises(ValueError, match="recomputes 9 tokens of a forward outside the replay"):
        with replayed(model, random_choices()):
            model(IDS)
            loss.backward()


def test_nothing_is_left_behind(model):
    plain = model(IDS).logits
    state = set(model.state_dict())
    with recorded(model), replayed(model, random_choices()):
        assert left_behind(model) == 2 * L
        assert set(model.state_dict()) == state
        model(IDS)
    with pytest.raises(ZeroDivisionError):
        with recorded(model), replayed(model, random_choices()):
            raise ZeroDivisionError
    with pytest.raises(ValueError):
        with replayed(model, random_choices(5)):
            model(IDS)
    assert left_behind(model) == 0
    assert torch.equal(model(IDS).logits, plain)


def test_adapters_do_not_hide_routers(make):
    model = peft.get_peft_model(make(), peft.LoraConfig(r=2, target_modules=["q_proj", "kv_b_proj"]))
    assert has_routers(model)
    chosen = random_choices()
    with replayed(model, chosen) as flips, recorded(model) as choices:
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert torch.equal(choices.chosen_LTK, chosen) and flips.total == L * T


def test_a_model_without_routers_has_none(make):
    dense = make(first_k_dense_replace=3)
    assert not has_routers(dense) and not has_routers(MLP(4, 8))
    with pytest.raises(ValueError, match="no routers"), replayed(dense, random_choices()):
        pass


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (random_choices()[:1], r"shape \(1, 30, 3\); .* 2 MoE layers and 3 experts .* give \(2, tokens, 3\)"),
        (random_choices()[..., :2], r"shape \(2, 30, 2\)"),
        (random_choices()[0], r"shape \(30, 3\)"),
        (random_choices() + 1, r"experts 1\.\.8; the model has 0\.\.7"),
        (random_choices().clamp(min=1) - 3, r"experts -2\.\.4"),
        (torch.zeros(L, T, K, dtype=torch.int16), r"token 0 of MoE layer 0 has experts \[0, 0, 0\]: give 3 different"),
        (torch.tensor([[[0, 1, 2]], [[-1, 4, 5]]]), r"token 0 of MoE layer 1 has experts \[-1, 4, 5\]"),
    ],
)  # fmt: skip
def test_choices_that_cannot_be_are_refused_with_their_numbers(model, chosen, message):
    with pytest.raises(ValueError, match=message), replayed(model, chosen):
        pass
    assert left_behind(model) == 0


def test_too_few_or_too_many_choices_are_refused_with_their_numbers(model):
    with pytest.raises(ValueError, match=r"20 tokens given, but after 12 of them a forward brings 18"):
        with replayed(model, random_choices(20)):
            model(IDS[:, :12])
            model(IDS[:, 12:])
    with pytest.raises(ValueError, match=r"40 tokens given, forwards took 30 \(MoE layer 0\)"):
        with replayed(model, random_choices(40)):
            model(IDS)
    with pytest.raises(ValueError, match="no forward has reached all 2 routers"):
        with recorded(model) as choices:
            pass
        choices.chosen_LTK  # noqa: B018
