"""Model sizes by name, as transformers' own `DeepseekV3Config`: one config class for us, transformers and vLLM.

Every size keeps V3's latent of 512 + 64 values a token (vLLM's MLA kernels take no other) and V3's YaRN, with
`max_position_embeddings = factor × original_max_position_embeddings` as transformers and vLLM both assume.
The presets are models after their context was extended; `context` gives other lengths, and the model before it.
"""

import difflib
import math
from typing import Any

from transformers import DeepseekV3Config


def yarn(*, factor: float, original: int, theta: float = 10000.0) -> dict[str, Any]:
    """V3's rope parameters: positions up to `original` were trained, `factor` times that are reached by YaRN."""
    return {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": float(factor),
        "original_max_position_embeddings": original,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }


def context(length: int, *, factor: float = 40.0, original: int = 4096, theta: float = 10000.0) -> dict[str, Any]:
    """Fields of a config for samples of up to `length` tokens, when positions up to `original` were pre-trained.

    For `preset(name, **fields)`; for a checkpoint see `extended`.
    Up to `original`, RoPE is left alone. Beyond it V3 extends in two phases of 1,000 steps, to 32,768 and to 131,072
    (arXiv 2412.19437, 4.3), with the same YaRN in both; they differ in the length of samples. ValueError beyond
    factor × original.
    """
    if length <= original:
        rope = {"rope_type": "default", "rope_theta": theta}
        return {"max_position_embeddings": original, "rope_parameters": rope}
    reach = round(factor * original)
    if length > reach:
        raise ValueError(
            f"context: length={length} is beyond factor × original = {factor:g} × {original} = {reach}; "
            f"use factor={math.ceil(length / original)} or more"
        )
    return {"max_position_embeddings": reach, "rope_parameters": yarn(factor=factor, original=original, theta=theta)}


def extended(config: DeepseekV3Config, length: int) -> dict[str, Any]:
    """`context` for a model that is already there: `from_pretrained(folder, **fields)`; no weight changes.

    Its positions were pre-trained as its RoPE says. Its own YaRN stays where that reaches far enough, so going on from
    32,768 to 131,072 computes the same at every position; a model without is given V3's factor 40, or what it takes.
    """
    rope = config.rope_parameters
    original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    factor = max(float(rope.get("factor", 40.0)), math.ceil(length / original))
    return context(length, factor=factor, original=original, theta=rope["rope_theta"])


# What all sizes share. transformers drops the two method names when it saves its own models; vLLM needs them.
_COMMON: dict[str, Any] = dict(
    kv_lora_rank=512,
    qk_rope_head_dim=64,
    topk_method="noaux_tc",
    scoring_func="sigmoid",
    num_nextn_predict_layers=0,
    use_cache=True,
)

_SMALL: dict[str, Any] = dict(
    q_lora_rank=None,
    qk_nope_head_dim=32,
    v_head_dim=96,  # = nope + rope: equal head sizes take SDPA's fast path on a CPU
    first_k_dense_replace=1,
    n_shared_experts=1,
    n_group=1,
    topk_group=1,
    max_position_embeddings=4096,
    rope_parameters=yarn(factor=4, original=1024),
)

_SIZES: dict[str, dict[str, Any]] = {
    # 0.97M: the demo that learns in minutes on two cores.
    "tiny": _SMALL
    | dict(
        vocab_size=512,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=384,
        moe_intermediate_size=96,
        n_routed_experts=4,
        num_experts_per_tok=2,
        routed_scaling_factor=1.0,
    ),
    # 5M and 20M: what benchmarks run on a CPU.
    "5m": _SMALL
    | dict(
        vocab_size=8192,
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=512,
        moe_intermediate_size=128,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
    ),
    "20m": _SMALL
    | dict(
        vocab_size=8192,
        hidden_size=320,
        num_hidden_layers=4,
        num_attention_heads=5,
        intermediate_size=1024,
        moe_intermediate_size=256,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
    ),
    # DeepSeek-V2-Lite's dimensions with V3's router: a research size for one node.
    "16b": dict(
        vocab_size=102400,
        hidden_size=2048,
        num_hidden_layers=27,
        num_attention_heads=16,
        q_lora_rank=None,
        qk_nope_head_dim=128,
        v_head_dim=128,
        intermediate_size=10944,
        moe_intermediate_size=1408,
        n_routed_experts=64,
        num_experts_per_tok=6,
        n_shared_experts=2,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=2.446,
        max_position_embeddings=163840,
        rope_parameters=yarn(factor=40, original=4096),
    ),
    # DeepSeek-V3 itself (config_671B.json; init std 0.006 is the paper's section 4.2, not the released config's).
    "671b": dict(
        vocab_size=129280,
        hidden_size=7168,
        num_hidden_layers=61,
        num_attention_heads=128,
        q_lora_rank=1536,
        qk_nope_head_dim=128,
        v_head_dim=128,
        intermediate_size=18432,
        moe_intermediate_size=2048,
        n_routed_experts=256,
        num_experts_per_tok=8,
        n_shared_experts=1,
        first_k_dense_replace=3,
        n_group=8,
        topk_group=4,
        routed_scaling_factor=2.5,
        initializer_range=0.006,
        max_position_embeddings=163840,
        rope_parameters=yarn(factor=40, original=4096),
    ),
}

PRESETS: tuple[str, ...] = tuple(_SIZES)


def preset(name: str, **overrides: Any) -> DeepseekV3Config:
    """The config of a named size, from "tiny" (0.97M) to "671b", with any `DeepseekV3Config` field overridden."""
    if name not in _SIZES:
        nearest = difflib.get_close_matches(name.lower(), PRESETS, n=1, cutoff=0)[0]
        raise ValueError(f"preset={name!r}: no such size; did you mean {nearest!r}? Known: {', '.join(PRESETS)}")
    fields = _COMMON | _SIZES[name] | overrides
    fields.setdefault("num_key_value_heads", fields["num_attention_heads"])
    return DeepseekV3Config(**fields)
