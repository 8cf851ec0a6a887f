"""The presets are the sizes they claim to be."""

import math

import pytest
import torch

import deepseek_v3
from deepseek_v3.config import context, extended
from deepseek_v3.rope import inverse_frequencies, softmax_scale, yarn_ramp


def on_meta(name: str) -> deepseek_v3.DeepseekV3ForCausalLM:
    with torch.device("meta"):
        return deepseek_v3.DeepseekV3ForCausalLM(deepseek_v3.preset(name))


def test_671b_has_the_released_number_of_parameters():
    model = on_meta("671b")
    assert sum(p.numel() for p in model.parameters()) == 671_026_404_352
    assert sum(b.numel() for b in model.buffers()) == 14_848


@pytest.mark.parametrize(
    ("name", "low", "high"), [("tiny", 0.8e6, 1e6), ("5m", 4e6, 6e6), ("20m", 20e6, 24e6), ("16b", 15e9, 17e9)]
)
def test_presets_have_the_size_of_their_name(name, low, high):
    assert low < sum(p.numel() for p in on_meta(name).parameters()) < high


@pytest.mark.parametrize("name", deepseek_v3.PRESETS)
def test_every_preset_caches_576_values_and_scales_positions_as_vllm_assumes(name):
    config = deepseek_v3.preset(name)
    assert config.kv_lora_rank + config.qk_rope_head_dim == 576
    rope = config.rope_parameters
    assert config.max_position_embeddings == rope["factor"] * rope["original_max_position_embeddings"]
    assert config.num_key_value_heads == config.num_attention_heads
    assert (config.topk_method, config.scoring_func) == ("noaux_tc", "sigmoid")


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match=r"preset='671B-chat': .*did you mean '671b'"):
        deepseek_v3.preset("671B-chat")


def test_overrides_reach_the_config():
    config = deepseek_v3.preset("tiny", num_attention_heads=6, vocab_size=99)
    assert (config.num_attention_heads, config.num_key_value_heads, config.vocab_size) == (6, 6, 99)


def test_yarn_of_v3_ramps_from_10_to_23():
    assert yarn_ramp(64, 10_000.0, 4096, 32.0, 1.0) == (10, 23)


def test_softmax_scale_of_v3():
    scale = softmax_scale(deepseek_v3.preset("671b"))
    assert scale == pytest.approx(0.1352338, abs=5e-8)
    assert scale == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2)


def test_v3_before_its_context_was_extended_has_plain_rope():
    config = deepseek_v3.preset("671b", **context(4096))
    assert config.max_position_embeddings == 4096
    assert torch.equal(inverse_frequencies(config), 1 / 10_000.0 ** (torch.arange(0, 64, 2) / 64))
    assert softmax_scale(config) == 192**-0.5


@pytest.mark.parametrize("length", [4097, 32_768, 131_072, 163_840])
def test_any_longer_context_of_v3_is_the_released_one(length):
    released, config = deepseek_v3.preset("671b"), deepseek_v3.preset("671b", **context(length))
    assert config.to_dict() == released.to_dict()


def test_a_context_beyond_reach_names_the_factor_that_reaches_it():
    with pytest.raises(
        ValueError, match=r"length=163841 is beyond factor × original = 40 × 4096 = 163840; use factor=41"
    ):
        context(163_841)
    assert context(163_841, factor=41)["max_position_embeddings"] == 41 * 4096


def test_a_model_is_extended_by_its_own_yarn_or_by_v3s() -> None:
    before = deepseek_v3.preset("671b", **context(4096))
    to_32k = deepseek_v3.preset("671b", **extended(before, 32_768))
    assert extended(before, 32_768) == context(32_768) and extended(to_32k, 131_072) == context(131_072)
    tiny = deepseek_v3.preset("tiny")  # 1,024 × 4
    assert extended(tiny, 4096)["rope_parameters"] == tiny.rope_parameters
    assert extended(tiny, 8193) == context(8193, factor=9, original=1024)
    other = deepseek_v3.preset("tiny", **context(8192, original=1024, factor=8, theta=5e5))
    assert extended(other, 9000)["rope_parameters"]["rope_theta"] == 5e5
