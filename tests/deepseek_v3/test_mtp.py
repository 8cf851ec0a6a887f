"""The layer that predicts the token after the next is transformers' own layer, fed as the paper says."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

import deepseek_v3
from deepseek_v3.packing import Layout
from deepseek_v3.routing import recorded

LENGTH = 40
"""Beyond the 32 positions of the small model's original context."""


@pytest.fixture(scope="module")
def model(make):
    return make(num_nextn_predict_layers=1)


def random_ids(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(64, (1, length), generator=torch.Generator().manual_seed(seed))


def mtp_logits(model, ids: torch.Tensor, **options) -> torch.Tensor:
    """(tokens, vocab): row i is what is said of token i + 2."""
    return model.lm_head(model.model(ids, output_mtp=True, **options).mtp_hidden_state[0])


def theirs(model, *, swapped: bool = False):
    """ids -> the same logits by transformers' model for the states and another of one layer, fed one token at a time.

    Also returns the second model, the combining matrix and transformers' main model, to look at gradients.
    """
    mtp, config = model.model.mtp, copy.deepcopy(model.config)
    main = transformers.DeepseekV3ForCausalLM._from_config(config, attn_implementation="eager").eval()
    prefix = f"model.layers.{config.num_hidden_layers}."
    main.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith(prefix)}, strict=True)
    config = copy.deepcopy(config)
    config.num_hidden_layers, config.first_k_dense_replace = 1, 0
    one = transformers.DeepseekV3ForCausalLM._from_config(config, attn_implementation="eager").eval()
    own = ("enorm", "hnorm", "eh_proj", "shared_head")
    state = {f"model.layers.0.{k}": v for k, v in mtp.state_dict().items() if not k.startswith(own)}
    state |= {"model.norm.weight": mtp.shared_head.norm.weight, "lm_head.weight": model.lm_head.weight}
    one.load_state_dict(state | {"model.embed_tokens.weight": model.model.embed_tokens.weight}, strict=True)
    matrix = mtp.eh_proj.weight.detach().clone().requires_grad_()

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean() + model.config.rms_norm_eps).sqrt() * weight

    def logits(ids: torch.Tensor) -> torch.Tensor:
        seen = []
        hook = main.model.layers[-1].register_forward_hook(lambda *args: seen.append(args[2]))
        main(ids)
        hook.remove()
        h = seen[0][0] if not isinstance(seen[0], tuple) else seen[0][0][0]
        rows = []
        for i in range(ids.shape[1] - 1):
            parts = [
                norm(main.model.embed_tokens.weight[ids[0, i + 1]], mtp.enorm.weight.detach()),
                norm(h[i], mtp.hnorm.weight.detach()),
            ]
            rows.append(matrix @ torch.cat(parts[::-1] if swapped else parts))
        return one(inputs_embeds=torch.stack(rows)[None]).logits[0]

    return logits, one, matrix, main


def test_logits_and_gradients_are_those_of_transformers_layer(model) -> None:
    ids = random_ids(LENGTH)
    logits, one, matrix, main = theirs(model)
    got, expected = mtp_logits(model, ids)[:-1], logits(ids)
    assert expected.std() > 0.05
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    for rows in (got, expected):
        F.cross_entropy(rows[:-1], ids[0, 2:]).backward()
    pairs = [(model.model.mtp.eh_proj.weight, matrix), (model.lm_head.weight, one.lm_head.weight)]
    ours_of, theirs_of = dict(model.named_parameters()), dict(main.named_parameters())
    pairs += [(ours_of[name], theirs_of[name]) for name in theirs_of if ".layers." in name]
    assert all(float(b.grad.abs().max()) > 1e-6 for _, b in pairs[:3])
    for a, b in pairs:
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4)
    model.zero_grad()


def test_embedding_and_state_stand_in_the_order_of_the_released_weights(model) -> None:
    ids = random_ids(LENGTH)
    wrong = theirs(model, swapped=True)[0](ids)
    assert float((mtp_logits(model, ids)[:-1] - wrong).detach().abs().max()) > 0.1


@torch.no_grad()
def test_what_is_said_of_token_i_plus_2_hangs_on_all_tokens_up_to_i_plus_1_and_on_no_other(model) -> None:
    ids, i = random_ids(LENGTH), 20
    before = mtp_logits(model, ids)
    later, next_one = ids.clone(), ids.clone()
    later[0, i + 2 :] = (ids[0, i + 2 :] + 1) % 64
    next_one[0, i + 1] = (ids[0, i + 1] + 1) % 64
    assert torch.equal(mtp_logits(model, later)[: i + 1], before[: i + 1])
    changed = mtp_logits(model, next_one)
    assert torch.equal(changed[:i], before[:i]) and not torch.allclose(changed[i], before[i], atol=1e-3)


@torch.no_grad()
def test_no_sample_sees_another(model) -> None:
    samples = [random_ids(n, seed) for seed, n in enumerate((90, 50, 7))]
    packed = torch.cat(samples, dim=1)
    together = mtp_logits(model, packed, cu_seqlens=[0, 90, 140, 147])
    for sample, start in zip(samples, (0, 90, 140), strict=True):
        end = start + sample.shape[1] - 1  # of the last token nothing is said
        torch.testing.assert_close(together[start:end], mtp_logits(model, sample)[:-1], atol=1e-5, rtol=1e-5)
    other = torch.cat([random_ids(90, 7), samples[1], random_ids(7, 8)], dim=1)
    assert torch.equal(mtp_logits(model, other, cu_seqlens=[0, 90, 140, 147])[90:140], together[90:140])


@torch.no_grad()
def test_the_main_model_is_the_same_bits_with_it_without_it_and_after_leaving_it_behind(model, tmp_path) -> None:
    ids = random_ids(LENGTH)
    plain = model(ids).logits
    model.model(ids, output_mtp=True)
    model.save_pretrained(tmp_path)
    for depth in (0, 1):
        loaded, info = deepseek_v3.DeepseekV3ForCausalLM.from_pretrained(
            tmp_path, num_nextn_predict_layers=depth, output_loading_info=True
        )
        assert not info["unexpected_keys"] and not info["missing_keys"]
        assert torch.equal(loaded(ids).logits, plain)
        assert (loaded.model.mtp is None) == (depth == 0)
    assert torch.equal(mtp_logits(loaded, ids), mtp_logits(model, ids))
    other = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(other(ids).logits, plain, atol=1e-5, rtol=1e-5)


def test_names_are_the_released_ones_whose_copies_of_embedding_and_head_are_not_read(model, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    prefix = f"model.layers.{model.config.num_hidden_layers}."
    names = {name.removeprefix(prefix) for name in tensors if name.startswith(prefix)}
    experts = {f"mlp.experts.{e}.{p}_proj.weight" for e in range(8) for p in ("gate", "up", "down")}
    assert {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"} | experts < names
    assert {"mlp.gate.e_score_correction_bias", "mlp.shared_experts.up_proj.weight", "input_layernorm.weight"} < names
    for copy_of in ("embed_tokens.weight", "shared_head.head.weight"):
        tensors[prefix + copy_of] = torch.zeros(64, 32)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = deepseek_v3.DeepseekV3ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    ids = random_ids(10)
    assert torch.equal(mtp_logits(loaded, ids), mtp_logits(model, ids))


def test_the_released_layer_has_11_610_068_224_parameters_of_its_own() -> None:
    with torch.device("meta"):
        model = deepseek_v3.DeepseekV3ForCausalLM(deepseek_v3.preset("671b", num_nextn_predict_layers=1))
    state = model.model.mtp.state_dict()
    assert sum(tensor.numel() for tensor in state.values()) == 11_610_068_224
    main = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in model.model.mtp.parameters())
    assert main == 671_026_404_352


@torch.no_grad()
def test_the_parts_over_a_cache_say_the_same_token_by_token(model) -> None:
    """How a decoder runs the layer: h and the next token come in one at a time."""
    ids = random_ids(LENGTH)
    inputs: list[torch.Tensor] = []
    hook = model.model.norm.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    expected = model.model(ids, output_mtp=True).mtp_hidden_state[0]
    hook.remove()
    block, cache, states = model.model.mtp, DynamicCache(), []
    for i in range(LENGTH - 1):
        x_11D = block.combine(inputs[0][i], model.model.embed_tokens(ids[0, i + 1]))[None, None]
        cos, sin = model.model.rope(torch.tensor([[i]]), x_11D.dtype)
        x_11D = block.cached(x_11D, cos, sin, cache, torch.ones(1, 1, i + 1, dtype=torch.bool))
        states.append(block.shared_head["norm"](x_11D)[0, 0])
    torch.testing.assert_close(torch.stack(states), expected[:-1], atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model, side: str) -> None:
    ids = torch.cat([random_ids(20, 5), random_ids(20, 6)])
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    if side == "right":
        mask = mask.flip(1)
    padded = model.model(ids, attention_mask=mask, output_mtp=True).mtp_hidden_state
    for row, real in zip(range(2), mask.bool(), strict=True):
        alone = model.model(ids[row, real][None], output_mtp=True).mtp_hidden_state[0]
        torch.testing.assert_close(padded[row, real][:-1], alone[:-1], atol=1e-5, rtol=0)


def test_activations_computed_again_give_the_same_gradients(model) -> None:
    ids = random_ids(LENGTH)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        F.cross_entropy(mtp_logits(model, ids)[:-2], ids[0, 2:]).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = gradients()
    model.gradient_checkpointing_disable()
    model.eval()
    model.zero_grad()
    assert plain.keys() == again.keys() and all(torch.equal(again[name], g) for name, g in plain.items())


@torch.no_grad()
def test_records_of_experts_are_the_main_layers(model) -> None:
    with recorded(model) as choices:
        model(random_ids(5))
    assert choices.chosen_LTK.shape == (2, 5, 3)


def test_what_has_no_meaning_is_refused(model, make) -> None:
    with pytest.raises(ValueError, match="no MTP layer"):
        make().model(random_ids(4), output_mtp=True)
    with pytest.raises(ValueError, match="num_nextn_predict_layers=2"):
        make(num_nextn_predict_layers=2)
    with pytest.raises(ValueError, match="segment that others continue"):
        model.model(random_ids(6), layout=Layout([0, 2, 4, 6], [-1, 0, 0]), output_mtp=True)
