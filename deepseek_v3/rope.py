"""Positions -> cosines and sines (YaRN), and the rotation of queries and keys by them.

V3 applies YaRN to the rotary part alike in queries and keys and leaves cos and sin unscaled; the temperature of
long contexts sits in the softmax scale instead (`softmax_scale`). Only the maths is here; no state, no buffers:
inverse frequencies are a pure function of the config, so loading on the meta device needs no special case.
"""

import functools
import math

import torch
from torch import Tensor
from transformers import DeepseekV3Config


def _mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature (arXiv 2309.00071, eq. 22): 0.1·mscale·ln(factor) + 1."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


@functools.lru_cache(maxsize=32)
def yarn_ramp(dim: int, theta: float, original: int, beta_fast: float, beta_slow: float) -> tuple[int, int]:
    """First and last of the dim/2 frequencies between "kept" and "divided by factor" (10 and 23 for V3)."""

    def correction(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    return max(math.floor(correction(beta_fast)), 0), min(math.ceil(correction(beta_slow)), dim - 1)


def inverse_frequencies(config: DeepseekV3Config) -> Tensor:
    """The dim/2 rotary frequencies in radians per position, fp32 on the CPU.

    Operations come in the order of transformers and vLLM: one rounding is up to 0.008 rad at position 131,071.
    """
    rope = config.rope_parameters
    dim, theta = config.qk_rope_head_dim, float(rope["rope_theta"])
    with torch.device("cpu"):
        wavelengths = theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)  # over 2π
        kind = rope.get("rope_type", "default")
        if kind == "default":
            return 1.0 / wavelengths
        if kind != "yarn":
            raise ValueError(f"rope_parameters.rope_type={kind!r}: DeepSeek-V3 uses 'yarn' or 'default'")
        original = rope["original_max_position_embeddings"]
        low, high = yarn_ramp(dim, theta, original, rope.get("beta_fast") or 32.0, rope.get("beta_slow") or 1.0)
        ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 1e-3)).clamp(0, 1)
        kept = 1 - ramp
        return 1.0 / (rope["factor"] * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept


def softmax_scale(config: DeepseekV3Config) -> float:
    """1/√(nope + rope), times mscale² under YaRN: 0.1352338 for V3."""
    scale = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default" and rope.get("mscale_all_dim"):
        scale *= _mscale(rope["factor"], rope["mscale_all_dim"]) ** 2
    return scale


def cos_sin_scale(config: DeepseekV3Config) -> float:
    """What transformers multiplies cos and sin by: 1 for V3, because mscale equals mscale_all_dim."""
    rope = config.rope_parameters
    if rope.get("rope_type", "default") == "default":
        return 1.0
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    factor = rope["factor"]
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return _mscale(factor, rope["mscale"]) / _mscale(factor, rope["mscale_all_dim"])
    return _mscale(factor, 1.0)


def cos_sin(positions: Tensor, frequencies: Tensor, scale: float, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of position × frequency, each (*positions.shape, dim/2). Angles in fp32, whatever the dtype."""
    angles = positions[..., None].float() * frequencies
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Rotate pairs of the last dimension of x (..., dim) by cos/sin (..., dim/2, broadcast over heads).

    Released weights pair channels (2j, 2j+1): `interleaved`. Otherwise pairs are (j, j + dim/2). Either way the
    result has all first members, then all second ones: query and key agree, so scores are those of the paper.
    """
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
