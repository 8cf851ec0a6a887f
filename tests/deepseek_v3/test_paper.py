"""Our model computes what the paper's equations say, written out in paper.py; also late in a long context."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek_v3.config import context
from deepseek_v3.routing import recorded
from runtime.distributed import World
from runtime.packed import pack, packed_hidden
from sft.balance import Balance

VARIANTS: dict[str, dict[str, Any]] = {
    "yarn, groups, dense prefix": {},
    "q_lora": dict(q_lora_rank=20),
    "no yarn": dict(rope_parameters={"rope_type": "default", "rope_theta": 10000.0}),
    "one group": dict(n_group=1, topk_group=1),
    "experts everywhere": dict(first_k_dense_replace=0, n_shared_experts=2),
}
CONTEXTS: dict[str, dict[str, Any]] = {
    "4K": context(4096),
    "32K": context(32_768, factor=8),
    "128K": context(131_072, factor=32),
    "V3": context(131_072),
}


def ids_of(length: int, seed: int = 0) -> Tensor:
    return torch.randint(64, (length,), generator=torch.Generator().manual_seed(seed))


def by_checkpoint_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of the model's names, in float64: experts are one parameter there and many in a checkpoint."""
    found = {}
    for name, tensor in tensors.items():
        layer, experts, kind = name.partition(".experts.")
        if not experts:
            found[name] = tensor.double()
            continue
        parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[kind]
        for e, of_expert in enumerate(tensor.double()):
            for part, weight in zip(parts, of_expert.chunk(len(parts)), strict=True):
                found[f"{layer}.experts.{e}.{part}.weight"] = weight
    return found


def leaves_of(model) -> dict[str, Tensor]:
    tensors = by_checkpoint_names(model.state_dict())
    return {name: tensor.clone().requires_grad_("bias" not in name) for name, tensor in tensors.items()}


def check_gradients(model, leaves: Mapping[str, Tensor]) -> None:
    """Each within 1e-4 of its largest value."""
    got = by_checkpoint_names({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    expected = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None and leaf.grad.any()}
    assert got.keys() >= expected.keys()
    for name, gradient in got.items():
        off = (gradient - expected.get(name, torch.zeros(()))).abs().max()
        assert off <= 1e-4 * expected.get(name, torch.zeros(())).abs().max(), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_experts_and_gradients_are_those_of_the_equations(make, paper, variant: str) -> None:
    model, ids = make(**VARIANTS[variant]), ids_of(12)
    positions = torch.randperm(128, generator=torch.Generator().manual_seed(1))[:12].sort().values
    leaves = leaves_of(model)
    expected, choices = paper.model(leaves, model.config.to_dict(), ids.tolist(), positions.tolist())
    with recorded(model) as chosen:
        got = model(ids[None], position_ids=positions[None]).logits[0]
    assert expected.std() > 0.05
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=0)
    experts = [[sorted(choice.experts) for choice in layer] for layer in choices]
    assert chosen.chosen_LTK.sort(-1).values.tolist() == experts
    for logits in (got, expected):
        F.cross_entropy(logits[:-1], ids[1:]).backward()
    check_gradients(model, leaves)


def test_the_mtp_layer_and_its_gradients_are_those_of_the_equations(make, paper) -> None:
    """The main model's gradients too: the loss reaches it through its last state and the shared embedding and head."""
    model, ids = make(num_nextn_predict_layers=1, q_lora_rank=20), ids_of(12, seed=4)
    positions = torch.arange(30, 42)  # over the end of the original context
    leaves = leaves_of(model)
    expected = paper.mtp(leaves, model.config.to_dict(), ids.tolist(), positions.tolist())
    states = model.model(ids[None], position_ids=positions[None], output_mtp=True).mtp_hidden_state[0]
    got = model.lm_head(states)[:-1]
    assert expected.std() > 0.05
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=0)
    for logits in (got, expected):
        F.cross_entropy(logits[:-1], ids[2:]).backward()
    check_gradients(model, leaves)
    assert {name for name, p in model.named_parameters() if p.grad is None} == {"model.norm.weight"}


@torch.no_grad()
@pytest.mark.parametrize("length", CONTEXTS)
def test_late_positions_are_those_of_the_equations(make, paper, length: str) -> None:
    """Frequencies are computed in float32, as transformers does: a unit in the last place of the second fastest, 0.1,
    is 0.001 rad at position 131,071."""
    model, ids = make(**CONTEXTS[length]), ids_of(8)
    end = model.config.max_position_embeddings
    positions = [0, 1, 4094, 4095, end // 2, end // 2 + 1, end - 2, end - 1]
    expected, _ = paper.model(leaves_of(model), model.config.to_dict(), ids.tolist(), positions)
    got = model(ids[None], position_ids=torch.tensor([positions])).logits[0]
    torch.testing.assert_close(got.double(), expected, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("length", CONTEXTS)
@pytest.mark.parametrize("rope", [8, 64])
def test_late_positions_are_those_of_transformers(make, twin, length: str, rope: int) -> None:
    """Also with as many rotary channels as V3 has, and absorbed over a cache."""
    model = make(**CONTEXTS[length], qk_rope_head_dim=rope)
    end = model.config.max_position_embeddings
    ids, positions = ids_of(16)[None], torch.tensor([[*range(4), *range(4092, 4096), *range(end - 8, end)]])
    expected = twin(model)(ids, position_ids=positions).logits
    for use_cache in (False, True):
        got = model(ids, position_ids=positions, use_cache=use_cache).logits
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("length", CONTEXTS)
def test_a_text_at_the_end_of_a_context_reads_as_at_its_start(make, length: str) -> None:
    """As far as angles in float32 go, and unlike the same text with its first half far away."""
    model, ids, at = make(**CONTEXTS[length]), ids_of(12)[None], torch.arange(12)
    end = model.config.max_position_embeddings
    first = model(ids, position_ids=at[None]).logits
    torch.testing.assert_close(model(ids, position_ids=at[None] + end - 12).logits, first, atol=1e-3, rtol=0)
    apart = torch.where(at < 6, at, at + end - 12)
    assert (model(ids, position_ids=apart[None]).logits - first)[0, 6:].abs().max() > 1e-2


@torch.no_grad()
def test_a_checkpoint_is_extended_by_fields_alone(make, paper, tmp_path) -> None:
    """Weights of a model of 4K, under the YaRN of another length."""
    before, ids, positions = make(**context(4096)), ids_of(8), [0, 1, 2, 3, 32_764, 32_765, 32_766, 32_767]
    before.save_pretrained(tmp_path)
    after = type(before).from_pretrained(tmp_path, **context(32_768, factor=8))
    after.save_pretrained(tmp_path)
    for model in (after, type(before).from_pretrained(tmp_path)):
        got = model(ids[None], position_ids=torch.tensor([positions])).logits[0]
        expected, _ = paper.model(leaves_of(before), make(**CONTEXTS["32K"]).config.to_dict(), ids.tolist(), positions)
        torch.testing.assert_close(got.double(), expected, atol=1e-4, rtol=0)
    assert (before(ids[None], position_ids=torch.tensor([positions])).logits[0] - got).abs().max() > 1e-2


SEQUENCES: Sequence[list[int]] = (ids_of(9, seed=2).tolist(), ids_of(4, seed=3).tolist())


def test_balance_loss_and_bias_are_those_of_the_equations(make, paper) -> None:
    """Of sequences in one pack, under groups and a bias; a layer's bias moves by the loads of the whole step."""
    model, config = make(), make().config.to_dict()
    balance, packed = Balance(model), pack(SEQUENCES)
    with balance.watching():
        packed_hidden(model, packed)
        got = balance.loss(packed.layout)
    leaves = leaves_of(model)
    layers = list(zip(*(paper.model(leaves, config, ids)[1] for ids in SEQUENCES), strict=True))
    expected = sum(paper.balance_loss(choices, config) for layer in layers for choices in layer)
    torch.testing.assert_close(got.double(), expected, atol=0, rtol=1e-5)
    got.backward()
    expected.backward()
    check_gradients(model, leaves)

    before = [router.e_score_correction_bias.tolist() for router in balance.routers]
    balance.update(0.25, World())
    for router, bias, layer in zip(balance.routers, before, layers, strict=True):
        moved = paper.moved_bias(bias, [choice for sequence in layer for choice in sequence], 0.25)
        assert router.e_score_correction_bias.tolist() == pytest.approx(moved)
        assert set(moved) != set(bias)
