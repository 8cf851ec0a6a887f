"""Rotary positions: YaRN as transformers computes it, and the two layouts of rotary channels."""

import copy

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import deepseek_v3
from deepseek_v3.config import context
from deepseek_v3.rope import cos_sin, cos_sin_scale, inverse_frequencies, rotate


@pytest.mark.parametrize("name", ["tiny", "671b"])
@pytest.mark.parametrize("fields", [{}, context(32_768, factor=8), context(131_072, factor=32)])
def test_yarn_frequencies_are_those_of_transformers_to_the_bit(name, fields):
    config = deepseek_v3.preset(name, **fields)
    expected, scale = ROPE_INIT_FUNCTIONS["yarn"](config, device=None)
    assert torch.equal(inverse_frequencies(config), expected)
    assert cos_sin_scale(config) == pytest.approx(scale) == 1.0


def test_yarn_keeps_fast_frequencies_and_divides_slow_ones():
    config = deepseek_v3.preset("671b")
    plain = 10_000.0 ** -(torch.arange(0, 64, 2) / 64)
    ratio = plain / inverse_frequencies(config)
    torch.testing.assert_close(ratio[:11], torch.ones(11))
    torch.testing.assert_close(ratio[23:], torch.full((9,), 40.0))
    assert ((ratio[11:23] > 1) & (ratio[11:23] < 40)).all()


def test_an_unknown_rope_type_is_refused():
    config = deepseek_v3.preset("tiny", rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(ValueError, match=r"rope_parameters.rope_type='linear'"):
        inverse_frequencies(config)


def test_scores_depend_on_the_distance_alone():
    frequencies = inverse_frequencies(deepseek_v3.preset("tiny"))
    q, k = torch.randn(2, 64, dtype=torch.float64)

    def score(m: int, n: int) -> torch.Tensor:
        cos, sin = cos_sin(torch.tensor([m, n]), frequencies, 1.0, dtype=torch.float64)
        return rotate(q, cos[0], sin[0], interleaved=True) @ rotate(k, cos[1], sin[1], interleaved=True)

    torch.testing.assert_close(score(9, 4), score(105, 100), atol=1e-4, rtol=0)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


def test_angles_are_fp32_in_a_bf16_model():
    frequencies = inverse_frequencies(deepseek_v3.preset("tiny"))
    cos, _ = cos_sin(torch.tensor([1001]), frequencies, 1.0, dtype=torch.bfloat16)
    assert cos.dtype == torch.bfloat16
    torch.testing.assert_close(cos.float()[0], (1001 * frequencies).cos(), atol=4e-3, rtol=0)


def half_rope_weights(model, config):
    """The interleaved model's weights, rotary channels (0, 1, 2, 3, ..) reordered to (0, 2, .., 1, 3, ..)."""
    P, N, R = config.qk_rope_head_dim, config.qk_nope_head_dim, config.kv_lora_rank
    order = torch.cat([torch.arange(0, P, 2), torch.arange(1, P, 2)])
    state = copy.deepcopy(model.state_dict())
    for name, weight in state.items():
        if "q_proj" in name or "q_b_proj" in name:
            per_head = weight.view(config.num_attention_heads, N + P, -1)
            per_head[:, N:] = per_head[:, N:][:, order]
        elif "kv_a_proj" in name:
            weight[R:] = weight[R:][order]
    return state


@pytest.mark.parametrize("q_lora_rank", [None, 20])
def test_half_rope_is_interleaved_rope_after_permuting_weights_and_not_before(make, q_lora_rank):
    model = make(q_lora_rank=q_lora_rank)
    half = make(q_lora_rank=q_lora_rank, rope_interleave=False)
    ids = torch.randint(64, (1, 40), generator=torch.Generator().manual_seed(1))
    expected = model(ids).logits
    half.load_state_dict(model.state_dict())
    assert (half(ids).logits - expected).abs().max() > 1e-2
    half.load_state_dict(half_rope_weights(model, model.config))
    torch.testing.assert_close(half(ids).logits, expected, atol=1e-5, rtol=0)
