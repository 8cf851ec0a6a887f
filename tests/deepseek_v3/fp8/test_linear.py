"""Linear layers and experts in FP8 are products of what was rounded, so are gradients; and nothing else changes."""

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

from deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_v3.convert_tensors import expected_tensors
from deepseek_v3.decode import GroupDecoder
from deepseek_v3.fp8 import linear
from deepseek_v3.fp8.linear import Codes, Fp8Experts, Fp8Linear, use_fp8
from deepseek_v3.moe import Experts
from deepseek_v3.routing import recorded, replayed

WIDE = dict(hidden_size=200, kv_lora_rank=130, intermediate_size=300, moe_intermediate_size=136)
"""More than a block of everything that is summed over, and none a multiple of it."""
LOADS = {
    "any": [[0, 3, 5], [1, 2, 3], [7, 3, 0], [4, 3, 6], [5, 2, 1]],
    "most are empty": [[4, 5, 6]] * 5,
    "one token": [[2, 0, 7]],
    "no token": [],
}


def seeded(*shape: int, seed: int = 0, std: float = 1.0) -> Tensor:
    return std * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(x: Tensor, rows: int) -> Tensor:
    """What FP8 leaves of x, block by block of rows × 128; its gradient goes straight through."""
    out = torch.empty_like(x)
    for top, left in itertools.product(range(0, x.shape[0], rows), range(0, x.shape[1], 128)):
        block = slice(top, top + rows), slice(left, left + 128)
        scale = x[block].detach().abs().max().clamp(min=1e-4).double() / 448
        out[block] = (x[block].detach().double() / scale).float().to(torch.float8_e4m3fn).double() * scale
    return x + (out - x).detach()


def product(x_MK: Tensor, w_NK: Tensor) -> Tensor:
    return rounded(x_MK, 1) @ rounded(w_NK, 128).T


def in_fp8(features: tuple[int, int], **options: Any) -> Fp8Linear:
    layer = nn.Linear(*features, **options)
    with torch.no_grad():
        layer.weight.copy_(seeded(*layer.weight.shape, std=0.1))
    layer.__class__, layer.codes = Fp8Linear, Codes("train")
    return layer  # type: ignore[return-value]


@pytest.fixture
def experts(config_of: Any) -> Fp8Experts:
    experts = Experts(config_of(**WIDE))
    with torch.no_grad():
        for i, p in enumerate(experts.parameters()):
            p.copy_(seeded(*p.shape, seed=i, std=0.1))
    use_fp8(nn.ModuleList([linear.MLP(1, 1), experts]), "train")
    return experts  # type: ignore[return-value]


def sqnr(ours: Tensor, exact: Tensor) -> float:
    """Signal to quantisation noise, dB."""
    ours, exact = ours.detach(), exact.detach()
    return 20 * math.log10(exact.norm() / (ours - exact).norm())


# --- one layer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [(200, 130), (128, 576), (40, 1)])
def test_output_and_gradients_are_those_of_what_was_rounded(features: tuple[int, int], relative: Any) -> None:
    layer = in_fp8(features, bias=True)
    x, d_y = seeded(3, 7, features[0], seed=1).requires_grad_(), seeded(3, 7, features[1], seed=2)
    y = layer(x)
    y.backward(d_y)
    x_again, w = x.detach().clone().requires_grad_(), layer.weight.detach().clone().requires_grad_()
    expected = product(x_again.flatten(0, 1), w).unflatten(0, (3, 7)) + layer.bias.detach()
    expected.backward(d_y)
    assert relative(y, expected) < 1e-6
    assert relative(x.grad, x_again.grad) < 1e-6 and relative(layer.weight.grad, w.grad) < 1e-6
    assert layer.bias.grad.allclose(d_y.sum((0, 1)), atol=1e-5)


def test_gradients_are_near_those_without_fp8() -> None:
    layer = in_fp8((512, 384), bias=False)
    x, d_y = seeded(256, 512, seed=1).requires_grad_(), seeded(256, 384, seed=2)
    y = layer(x)
    y.backward(d_y)
    assert sqnr(y, x @ layer.weight.T) > 28
    assert sqnr(x.grad, d_y @ layer.weight) > 30
    assert sqnr(layer.weight.grad, d_y.T @ x) > 30


def test_weights_are_rounded_as_transformers_does(relative: Any) -> None:
    layer, x = in_fp8((384, 256), bias=False), seeded(9, 384, seed=1)
    config = SimpleNamespace(weight_block_size=(128, 128), scale_fmt="float")
    quantizer = SimpleNamespace(quantization_config=config)
    theirs = Fp8Quantize(quantizer)._quantize_one("x.weight", layer.weight.detach())
    w = Fp8Dequantize(quantizer)._dequantize_one(theirs["x.weight"], theirs["x.weight_scale_inv"], torch.float32)
    assert relative(layer(x), rounded(x, 1) @ w.T) < 1e-3  # they multiply by 1/s: one code in 2,000 is the next


def test_in_bf16_and_under_autocast_results_are_bf16_and_weights_gradients_their_own(relative: Any) -> None:
    x, d_y = seeded(7, 200, seed=1), seeded(7, 130, seed=2)
    exact = in_fp8((200, 130), bias=True)
    expected = exact(x)
    expected.backward(d_y)
    cast, plain = copy.deepcopy(exact), copy.deepcopy(exact)
    cast.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        y = cast(x)
    y.backward(d_y.bfloat16())
    assert y.dtype == torch.bfloat16 and relative(y, expected) < 5e-3
    assert cast.weight.grad.dtype == torch.float32 and relative(cast.weight.grad, exact.weight.grad) < 8e-3
    plain = plain.bfloat16()
    assert plain(x.bfloat16()).dtype == torch.bfloat16 and sqnr(plain(x.bfloat16()).float(), expected) > 25


def test_a_row_depends_on_no_other(experts: Fp8Experts) -> None:
    layer, x = in_fp8((200, 130), bias=True), seeded(150, 200, seed=1)
    chosen, gates = torch.arange(450).view(150, 3) % 7, seeded(150, 3, seed=2)
    whole, mixed = layer(x), experts(x, chosen, gates)
    for rows in (slice(0, 1), slice(70, 73), slice(149, None)):
        assert layer(x[rows]).equal(whole[rows])
        assert experts(x[rows], chosen[rows], gates[rows]).equal(mixed[rows])


# --- experts ---------------------------------------------------------------------------------------------------------


def one_by_one(x_TD: Tensor, chosen: list[list[int]], gates_TK: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    out = []
    for x, row, gates in zip(x_TD, chosen, gates_TK, strict=True):
        y = torch.zeros_like(x)
        for e, gate in zip(row, gates, strict=True):
            g, u = product(x[None], gate_up[e]).chunk(2, dim=1)
            y = y + gate * product(F.silu(g) * u, down[e])[0]
        out.append(y)
    return torch.stack(out) if out else torch.zeros_like(x_TD)


@pytest.mark.parametrize("load", LOADS)
def test_experts_are_those_of_what_was_rounded(experts: Fp8Experts, load: str, relative: Any) -> None:
    chosen = LOADS[load]
    T = len(chosen)
    inputs = [seeded(T, 200, seed=4), seeded(T, 3, seed=5), experts.gate_up_proj, experts.down_proj]
    ours, theirs = ([t.detach().clone().requires_grad_() for t in inputs] for _ in range(2))
    experts.gate_up_proj, experts.down_proj = nn.Parameter(ours[2]), nn.Parameter(ours[3])
    y = experts(ours[0], torch.tensor(chosen, dtype=torch.long).view(T, 3), ours[1])
    expected = one_by_one(theirs[0], chosen, *theirs[1:])
    d_y = seeded(T, 200, seed=6)
    y.backward(d_y)
    grads = [ours[0].grad, ours[1].grad, experts.gate_up_proj.grad, experts.down_proj.grad]
    if T == 0:
        assert y.shape == (0, 200) and not any(grad.any() for grad in grads)
        return
    expected.backward(d_y)
    # A rounding before silu may make the next code of its product.
    assert relative(y, expected) < 1e-3
    for grad, tensor in zip(grads, theirs, strict=True):
        assert relative(grad, tensor.grad) < 1e-3


def test_grouped_gradients_are_those_of_loops(
    experts: Fp8Experts, monkeypatch: pytest.MonkeyPatch, relative: Any
) -> None:
    """What CUDA does in bf16; torch's grouped product also runs on a CPU."""
    experts = experts.bfloat16()
    chosen = torch.tensor(LOADS["any"])

    def gradients() -> Iterator[Tensor]:
        x, gates = (seeded(5, n, seed=n).bfloat16().requires_grad_() for n in (200, 3))
        experts.zero_grad()
        experts(x, chosen, gates).backward(seeded(5, 200, seed=6).bfloat16())
        yield from (t.grad.clone() for t in (x, gates, experts.gate_up_proj, experts.down_proj))

    loops = list(gradients())
    seen = []
    monkeypatch.setattr(linear, "can_group", lambda *tensors: bool(seen.append(tensors)) or True)
    for grouped, looped in zip(gradients(), loops, strict=True):
        assert relative(grouped, looped) < 5e-3
    assert len(seen) == 4


# --- the model -------------------------------------------------------------------------------------------------------


def tokens(rows: int = 2, length: int = 24) -> Tensor:
    return torch.randint(64, (rows, length), generator=torch.Generator().manual_seed(0))


def test_what_is_turned_over_is_what_the_released_checkpoint_has_in_fp8(make: Any) -> None:
    model = make(num_nextn_predict_layers=1, q_lora_rank=20)
    use_fp8(model, "train")
    over = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Fp8Linear)}
    released = expected_tensors(model.config, fp8=True)
    fp8 = {name for name, tensor in released.items() if tensor.dtypes == ("F8_E4M3",)}
    assert over == {name for name in fp8 if ".experts." not in name}
    assert {type(m) for name, m in model.named_modules() if name.endswith(".experts")} == {Fp8Experts}
    assert any("layers.3.self_attn" in name for name in over) and not any("eh_proj" in name for name in over)


def test_weights_names_and_checkpoint_stay(make: Any, tmp_path: Any) -> None:
    model = make(**WIDE)
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    model.save_pretrained(tmp_path / "plain")
    use_fp8(model, "forward")
    model(tokens())
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, (p, _) in before.items()}
    assert all(p.equal(value) for p, value in before.values())
    model.save_pretrained(tmp_path / "fp8")
    plain, fp8 = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "fp8"))
    assert plain.keys() == fp8.keys() and all(plain[name].equal(fp8[name]) for name in plain)
    theirs = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path / "fp8", dtype=torch.float32)
    assert theirs(tokens()).logits.allclose(
        DeepseekV3ForCausalLM.from_pretrained(tmp_path / "plain")(tokens()).logits, atol=1e-4
    )


def test_outputs_of_the_other_layers_are_not_rounded(make: Any) -> None:
    """With every layer that is turned over at zero, the model is its embedding, router, norms and head."""
    model = make(num_nextn_predict_layers=1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "_proj" in name and "eh_proj" not in name:
                p.zero_()
    ids = tokens()
    before, mtp = model(ids).logits, model.model(ids, output_mtp=True).mtp_hidden_state
    use_fp8(model, "train")
    assert model(ids).logits.equal(before) and model.model(ids, output_mtp=True).mtp_hidden_state.equal(mtp)


def test_the_model_is_the_one_whose_products_are_of_what_was_rounded(make: Any, relative: Any) -> None:
    """The routers' choice is given: near a tie the last bit may decide it. So it may a code, and the codes after it."""
    model, ids = make(**WIDE), tokens(rows=16, length=3)
    with recorded(model) as choices:
        plain = model(ids).logits
    by_hand = copy.deepcopy(model)
    for name, module in by_hand.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.forward = lambda x, w=module.weight: product(x.flatten(0, -2), w).unflatten(0, x.shape[:-1])
        elif isinstance(module, Experts):
            module.forward = lambda x, chosen, gates, w=(module.gate_up_proj, module.down_proj): one_by_one(
                x, chosen.tolist(), gates, *w
            )
    use_fp8(model, "train")
    with replayed(model, choices.chosen_LTK), replayed(by_hand, choices.chosen_LTK):
        logits, expected = model(ids).logits, by_hand(ids).logits
    apart = ((logits - expected).norm(dim=-1) / expected.norm(dim=-1)).detach()
    assert float(apart.median()) < 1e-5
    assert relative(logits, plain) > 0.05


def test_both_modes_and_a_copy_compute_the_same(make: Any) -> None:
    model = make(**WIDE)
    use_fp8(model, "train")
    train = model(tokens()).logits
    use_fp8(model.requires_grad_(False), "forward")
    assert model(tokens()).logits.equal(train)
    assert copy.deepcopy(model)(tokens()).logits.equal(train)


def test_checkpointing_changes_no_gradient(make: Any) -> None:
    model = make(**WIDE).train()
    use_fp8(model, "train")

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(tokens()).logits.logsumexp(-1).sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert len(plain) > 20
    assert all(a.equal(b) for a, b in zip(plain, gradients(), strict=True))


def decoded(model: DeepseekV3ForCausalLM, ids: Tensor, prompt: int) -> Tensor:
    decoder = GroupDecoder(model, ids[:, :prompt].tolist(), n=1, max_tokens=ids.shape[1])
    logits = []
    for t in range(prompt, ids.shape[1]):
        logits.append(decoder.logits_BV)
        decoder.step(ids[:, t])
    assert decoder.absorbed == (model.config.num_attention_heads > 4)
    return torch.stack(logits, dim=1)


@pytest.mark.parametrize("heads", [8, 2])
def test_decoding_is_the_packed_forward_absorbed_or_not(make: Any, heads: int) -> None:
    """In most rows at every position; here and there a last bit, which is the processor's, rounds to another FP8."""
    model, ids = make(**WIDE, num_attention_heads=heads), tokens(rows=8)
    use_fp8(model, "forward")

    def assert_same(logits: Tensor, expected: Tensor) -> None:
        apart_BL = (logits - expected).norm(dim=-1) / expected.norm(dim=-1)
        same_B = (apart_BL < 1e-5).all(dim=1)
        assert same_B.sum() >= 4 and apart_BL.max() < 0.2, apart_BL

    with torch.no_grad():
        whole = model(ids).logits
        assert_same(decoded(model, ids, 9), whole[:, 8:-1])
        start = model(ids[:, :9], use_cache=True)
        rest = model(ids[:, 9:], past_key_values=start.past_key_values).logits
        assert_same(torch.cat([start.logits, rest], dim=1), whole)


# --- codes -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Weights whose codes were made."""
    made: list[Tensor] = []
    quantise: Callable[..., tuple[Tensor, Tensor]] = linear.quantise_weight
    monkeypatch.setattr(linear, "quantise_weight", lambda w: made.append(w) or quantise(w))
    return made


def test_codes_of_a_frozen_weight_are_kept_until_it_changes(made: list[Tensor], relative: Any) -> None:
    layer, x = in_fp8((40, 30), bias=False).requires_grad_(False), seeded(3, 40)
    layer.codes = Codes("forward")

    def another_of_the_same_memory_and_version() -> None:
        other = nn.Parameter(layer.weight.data, requires_grad=False)
        assert layer.weight._version > 0
        for _ in range(layer.weight._version):
            other.copy_(seeded(30, 40, seed=8))
        layer.weight = other

    changes: list[Callable[[], object]] = [
        lambda: layer.weight.detach().as_strided((10, 40), (40, 1)).copy_(seeded(10, 40, seed=4)),  # as syncs write
        another_of_the_same_memory_and_version,
        lambda: layer.load_state_dict({"weight": seeded(30, 40, seed=5)}),
        lambda: layer.load_state_dict({"weight": seeded(30, 40, seed=6)}, assign=True),
        lambda: setattr(layer.weight, "data", seeded(30, 40, seed=7)),
        lambda: setattr(layer, "weight", nn.Parameter(seeded(30, 40, seed=3), requires_grad=False)),
        lambda: layer.bfloat16().float(),
    ]
    for change in changes:
        for _ in range(3):
            layer(x)
        assert len(made) == 1
        made.clear()
        change()
        assert relative(layer(x), product(x, layer.weight)) < 1e-6
    with torch.inference_mode():
        layer(x)
    assert len(made) == 1


@pytest.mark.parametrize("mode", ["forward", "train"])
@pytest.mark.parametrize("kind", ["fused", "foreach"])
def test_codes_follow_a_weight_in_training(mode: Any, kind: str, relative: Any) -> None:
    """A fused step leaves no trace: neither a version nor another place."""
    layer, x = in_fp8((40, 30), bias=False), seeded(3, 40)
    layer.codes = Codes(mode)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, **{kind: True})
    for _ in range(2):
        layer(x).square().sum().backward()
        optimizer.step()
        assert relative(layer(x), product(x, layer.weight)) < 1e-6


def test_codes_are_made_at_every_pass_of_training(made: list[Tensor]) -> None:
    layer, x = in_fp8((40, 30), bias=False), seeded(3, 40).requires_grad_()
    layer.weight.requires_grad_(False)  # as under adapters
    layer(x).sum().backward()
    assert len(made) == 2
    layer(x)
    assert len(made) == 3


# --- what is refused -------------------------------------------------------------------------------------------------


def test_what_has_no_such_layers_is_refused(make: Any) -> None:
    import peft

    with pytest.raises(ValueError, match="use_fp8: Linear: give a DeepseekV3ForCausalLM"):
        use_fp8(nn.Linear(3, 3), "train")
    adapted = peft.get_peft_model(make(), peft.LoraConfig(target_modules=["o_proj"]))
    with pytest.raises(ValueError, match="before adapters are added"):
        use_fp8(adapted, "train")
    model = make()
    model.model.layers[1].mlp.experts = nn.Identity()
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts is a Identity: call it before"):
        use_fp8(model, "train")


def test_adapters_on_top_learn_in_higher_precision(make: Any) -> None:
    import peft

    model = make(**WIDE)
    use_fp8(model, "train")
    plain = model(tokens()).logits
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["o_proj", "kv_b_proj"]))
    assert adapted(tokens()).logits.equal(plain)
    adapted(tokens()).logits.logsumexp(-1).sum().backward()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert trained and all(p.dtype == torch.float32 for p in trained) and any(p.grad.any() for p in trained)
    assert not isinstance(adapted.base_model.model.model.layers[0].self_attn.o_proj.lora_A["default"], Fp8Linear)
