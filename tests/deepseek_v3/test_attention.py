"""Absorbed attention is naive attention, on a cache of kv_lora_rank + rope values a token."""

from itertools import pairwise

import peft
import pytest
import torch
from transformers import DynamicCache

import deepseek_v3
from deepseek_v3.attention import RMSNorm, packed_attention
from deepseek_v3.packing import Layout


def ids_of(length: int, rows: int = 2) -> torch.Tensor:
    return torch.randint(64, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("overrides", [{}, {"q_lora_rank": 20}, {"rope_interleave": False}])
def test_absorbed_attention_is_naive_attention(make, overrides):
    model = make(**overrides)
    mla = model.model.layers[1].self_attn
    x = torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(0))
    cos, sin = model.model.rope(torch.arange(40).expand(2, 40), torch.float32)
    naive, _ = mla(x.flatten(0, 1), cos.flatten(0, 1), sin.flatten(0, 1), Layout([0, 40, 80]))
    causal = torch.ones(40, 40, dtype=torch.bool).tril().expand(2, 40, 40)
    mla.layer_idx = 0
    absorbed = mla.cached(x, cos, sin, DynamicCache(), causal)
    assert naive.std() > 0.1
    torch.testing.assert_close(absorbed.flatten(0, 1), naive, atol=1e-5, rtol=0)


def test_the_cache_holds_576_values_per_token_and_layer():
    model = deepseek_v3.DeepseekV3ForCausalLM(deepseek_v3.preset("tiny"))
    cache = model(ids_of(7), use_cache=True).past_key_values
    for layer in cache.layers:
        assert layer.keys.numel() + layer.values.numel() == 2 * 7 * 576


def test_the_naive_form_returns_what_the_cache_would_hold(make):
    model = make()
    ids = ids_of(11, rows=1)
    cache = model(ids, use_cache=True).past_key_values
    x = model.model.embed_tokens(ids)[0]
    cos, sin = model.model.rope(torch.arange(11), torch.float32)
    block = model.model.layers[0]
    _, (c_kv, k_rope) = block.self_attn(block.input_layernorm(x), cos, sin, Layout([0, 11]))
    torch.testing.assert_close(cache.layers[0].keys[0, 0], c_kv)
    torch.testing.assert_close(cache.layers[0].values[0, 0], k_rope)


@pytest.mark.parametrize("v_size", [6, 10, 13])
@pytest.mark.parametrize("lengths", [[4, 4, 4], [1, 7, 4, 7, 1, 2]])
def test_packed_attention_is_softmax_by_hand(v_size, lengths):
    generator = torch.Generator().manual_seed(0)
    T = sum(lengths)
    q, k = torch.randn(2, T, 3, 10, generator=generator)
    v = torch.randn(T, 3, v_size, generator=generator)
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    got = packed_attention(q, k, v, Layout(bounds), 0.3)
    assert got.shape == (T, 3, v_size)
    for a, b in pairwise(bounds):
        scores = torch.einsum("qhd,khd->hqk", q[a:b], k[a:b]) * 0.3
        scores = scores.masked_fill(~torch.ones(b - a, b - a).tril().bool(), float("-inf"))
        expected = torch.einsum("hqk,khv->qhv", scores.softmax(-1), v[a:b])
        torch.testing.assert_close(got[a:b], expected, atol=1e-6, rtol=0)


def test_bf16_norms_square_in_fp32():
    x = torch.tensor([[300.0, 1.0, -2.0, 0.5]], dtype=torch.bfloat16)
    norm = RMSNorm(4).to(torch.bfloat16)
    expected = (x.float() / x.float().pow(2).mean().sqrt()).to(torch.bfloat16)
    torch.testing.assert_close(norm(x), expected, atol=0, rtol=0)


@pytest.fixture
def adapted(make):
    """LoRA with non-zero weights on every projection, kv_b_proj included."""
    model = make(q_lora_rank=20)
    targets = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets)).eval()


def wake(adapted) -> None:
    """Adapters start as zero; give them something to say."""
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3, generator=torch.Generator().manual_seed(1))


def test_an_adapted_model_decodes_as_its_full_forward(adapted):
    ids = ids_of(20)
    with torch.no_grad():
        before = adapted(input_ids=ids).logits
        wake(adapted)
        full = adapted(input_ids=ids).logits
        cached = adapted(input_ids=ids, use_cache=True).logits
    assert (full - before).abs().max() > 0.1
    torch.testing.assert_close(cached, full, atol=1e-5, rtol=0)


def test_adapters_start_as_nothing_and_survive_saving(adapted, make, tmp_path):
    ids = ids_of(12)
    with torch.no_grad():
        assert torch.equal(adapted(input_ids=ids).logits, make(q_lora_rank=20)(ids).logits)
        wake(adapted)
        adapted.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(make(q_lora_rank=20), tmp_path).eval()
        assert torch.equal(again(input_ids=ids).logits, adapted(input_ids=ids).logits)
