"""What we save transformers loads, bit for bit, and the reverse."""

import json

import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file

import deepseek_v3


@pytest.fixture(scope="module")
def model(make):
    return make(q_lora_rank=20)


def test_transformers_loads_what_we_save_and_we_load_what_it_saves(model, tmp_path):
    model.save_pretrained(tmp_path / "ours")
    theirs = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    back = deepseek_v3.DeepseekV3ForCausalLM.from_pretrained(tmp_path / "theirs")
    for other in (theirs, back):
        state = other.state_dict()
        assert state.keys() == model.state_dict().keys()
        for name, tensor in model.state_dict().items():
            assert torch.equal(state[name], tensor) and state[name].dtype == tensor.dtype, name
    files = [load_file(tmp_path / who / "model.safetensors") for who in ("ours", "theirs")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


def test_names_and_config_are_those_of_released_checkpoints(model, tmp_path):
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    attention = ["q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"]
    parts = [f"self_attn.{part}" for part in attention] + ["input_layernorm", "post_attention_layernorm"]
    mlp = ("gate_proj", "up_proj", "down_proj")
    routed = [
        f"mlp.{where}.{part}" for where in ["shared_experts", *(f"experts.{e}" for e in range(8))] for part in mlp
    ]
    expected = {f"model.layers.{i}.{part}.weight" for i in range(3) for part in parts}
    expected |= {f"model.layers.0.mlp.{part}.weight" for part in mlp}
    expected |= {f"model.layers.{i}.{part}.weight" for i in (1, 2) for part in [*routed, "mlp.gate"]}
    expected |= {f"model.layers.{i}.mlp.gate.e_score_correction_bias" for i in (1, 2)}
    assert names == expected | {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "deepseek_v3" and config["architectures"] == ["DeepseekV3ForCausalLM"]
    assert (config["topk_method"], config["scoring_func"]) == ("noaux_tc", "sigmoid")


def test_sharded_checkpoints_load(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    again = deepseek_v3.DeepseekV3ForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(again.state_dict()[name], t) for name, t in model.state_dict().items())


def biases(model):
    return [m.e_score_correction_bias for m in model.modules() if hasattr(m, "e_score_correction_bias")]


def test_the_routing_bias_stays_fp32(make, tmp_path):
    model = make()
    exact = [b.clone() for b in biases(model)]
    model.to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = deepseek_v3.DeepseekV3ForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.lm_head.weight.dtype == loaded.lm_head.weight.dtype == torch.bfloat16
    for held in (biases(model), biases(loaded), biases(loaded.half())):
        assert all(b.dtype == torch.float32 and torch.equal(b, e) for b, e in zip(held, exact, strict=True))


def test_a_model_built_in_bf16_has_an_fp32_bias(config_of):
    config = config_of()
    config.dtype = torch.bfloat16
    model = deepseek_v3.DeepseekV3ForCausalLM._from_config(config)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert {b.dtype for b in biases(model)} == {torch.float32}


def test_gradient_checkpointing_changes_no_gradient(make):
    model = make().train()
    ids = torch.randint(64, (1, 30), generator=torch.Generator().manual_seed(0))

    def gradients():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    plain = gradients()
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    calls = []
    hook = model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    recomputed = gradients()
    hook.remove()
    assert len(calls) == 2
    assert all(torch.equal(recomputed[name], g) for name, g in plain.items())


def test_gradient_checkpointing_reaches_adapters(make):
    model = peft.get_peft_model(make(), peft.LoraConfig(r=2, target_modules=["q_proj", "kv_b_proj"])).train()
    model.gradient_checkpointing_enable()
    ids = torch.randint(64, (1, 10), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()
    touched = [p.grad.abs().sum() > 0 for name, p in model.named_parameters() if "lora_B" in name]
    assert len(touched) == 6 and all(touched)


def test_fresh_weights_have_the_configured_spread(config_of):
    torch.manual_seed(0)
    model = deepseek_v3.DeepseekV3ForCausalLM(config_of(initializer_range=0.006))
    for name, p in model.named_parameters():
        if "norm" in name:
            assert (p == 1).all()
        else:
            assert p.std().item() == pytest.approx(0.006, rel=0.2), name
    assert all((b == 0).all() for b in biases(model))
