"""What samplers are loaded with is what a checkpoint would hold, and exporting it leaves the model alone."""

import copy

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import deepseek_v3
from runtime.weights import checkpoint_tensors, checkpoint_views

PLAIN = dict(
    vocab_size=60,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
ROUTED = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)


def v3():
    config = deepseek_v3.preset(
        "tiny", vocab_size=60, hidden_size=32, intermediate_size=48, kv_lora_rank=16, n_routed_experts=5
    )
    return deepseek_v3.DeepseekV3ForCausalLM(config)


MODELS = {
    "v3": v3,
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**PLAIN)),
    "qwen3_tied": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**PLAIN, tie_word_embeddings=True)),
    "qwen3_moe": lambda: transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**PLAIN, **ROUTED)),
    "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**PLAIN, num_local_experts=4)),
}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    model = MODELS[request.param]().eval()
    with torch.no_grad():
        for tensor in [*model.parameters(), *(b for n, b in model.named_buffers() if "inv_freq" not in n)]:
            tensor.copy_(torch.randn_like(tensor) * 0.1)
    return model


def saved(model, folder) -> dict[str, torch.Tensor]:
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def bits(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_tensors_are_those_of_the_file_save_pretrained_writes(model, tmp_path):
    expected, got = saved(model, tmp_path), dict(checkpoint_tensors(model))
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor) and got[name].dtype == tensor.dtype, name


def test_the_same_after_loading_from_a_folder(model, tmp_path):
    """transformers then remembers the conversions it did on the way in."""
    expected = saved(model, tmp_path)
    got = dict(checkpoint_tensors(type(model).from_pretrained(tmp_path)))
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def test_views_share_the_models_storage(model):
    views = checkpoint_views(model)
    storages = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
    assert {view.untyped_storage().data_ptr() for view in views.values()} == storages
    with torch.no_grad():
        for i, view in enumerate(views.values()):
            view.fill_(i + 1.0)
    held = torch.cat([tensor.flatten() for tensor in model.state_dict().values()])
    assert (held >= 1).all()  # nothing was left out
    assert sorted({int(x) for x in held}) == list(range(1, len(views) + 1))


def test_writing_all_views_makes_the_other_model(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randn_like(p))
        theirs = checkpoint_views(other)
        for name, view in checkpoint_views(model).items():
            view.copy_(theirs[name])
    ids = torch.randint(60, (2, 9))
    assert torch.equal(model(ids).logits, other(ids).logits)


def test_a_model_that_moved_its_storage_is_followed():
    model = v3()
    checkpoint_views(model)
    model.to(torch.float64)
    with torch.no_grad():
        checkpoint_views(model)["lm_head.weight"].fill_(3)
    assert (model.lm_head.weight == 3).all() and model.lm_head.weight.dtype == torch.float64


def adapted(model, **options):
    torch.manual_seed(1)
    adapters = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=5, **options)).eval()
    with torch.no_grad():
        for name, p in adapters.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.2)
    return adapters


LORAS = [
    ("v3", dict(target_modules=["q_proj", "kv_b_proj", "o_proj"])),
    ("v3", dict(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])),
    ("v3", dict(target_modules=["q_proj", "embed_tokens"], use_rslora=True)),
    ("qwen3_tied", dict(target_modules=["q_proj", "v_proj"])),
    ("qwen3_moe", dict(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])),
]


@pytest.mark.parametrize(("model", "lora"), LORAS, indirect=["model"])
def test_merged_export_is_pefts_and_leaves_the_base_alone(model, lora, tmp_path):
    policy = adapted(model, **lora)
    before = bits(policy)
    for _ in range(100):
        got = dict(checkpoint_tensors(policy))
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.state_dict().items())
    expected = saved(copy.deepcopy(policy).merge_and_unload(), tmp_path)
    assert got.keys() == expected.keys()
    moved = 0
    plain = {name.removeprefix("base_model.model.").replace(".base_layer", ""): t for name, t in before.items()}
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, atol=1e-6, rtol=0)
        moved += name in plain and not torch.allclose(tensor, plain[name], atol=1e-3)
    assert moved >= 1


@pytest.mark.parametrize("model", ["v3"], indirect=True)
def test_exports_follow_the_adapters(model):
    policy = adapted(model, target_modules=["kv_b_proj"])
    name = "model.layers.0.self_attn.kv_b_proj.weight"
    before = dict(checkpoint_tensors(policy))
    with torch.no_grad():
        policy.get_submodule("base_model.model.model.layers.0.self_attn.kv_b_proj").lora_B["default"].weight.mul_(2)
    after = dict(checkpoint_tensors(policy))
    assert [n for n in before if not torch.equal(before[n], after[n])] == [name]


@pytest.mark.parametrize("model", ["v3"], indirect=True)
def test_adapters_that_are_more_than_a_sum_are_refused(model):
    policy = adapted(model, target_modules=["q_proj"], use_dora=True)
    with pytest.raises(ValueError, match=r"q_proj: DoRA .* plain LoRA"):
        dict(checkpoint_tensors(policy))
