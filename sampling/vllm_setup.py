"""A checkpoint's config and this machine -> vLLM engine options; vLLM as a guest in the trainer's process.

Nobody has to set anything: which attention a DeepSeek-V3 gets on a CPU follows from its latent size, the
dtype and whether the CPU has AMX. Leaves out CUDA, where vLLM's own choices stand.
"""

import logging
import os
import random
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

from runtime.environment import environment

logger = logging.getLogger(__name__)

MLA_HEAD = 576
"""kv_lora_rank + qk_rope_head_dim of DeepSeek-V2/V3: the only latent size vLLM's CPU kernels have."""

BLOCK = 32
"""Tokens per KV block where we may choose: vLLM's 128 on a CPU is longer than many prompts."""


def hf_overrides(config: dict[str, Any], *, on_cpu: bool) -> dict[str, Any]:
    """What vLLM must read differently from a `config.json` that transformers wrote."""
    if config.get("model_type") != "deepseek_v3":
        return {}
    # save_pretrained drops both; without them vLLM has no router bias.
    router = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
    overrides: dict[str, Any] = {key: value for key, value in router.items() if config.get(key) is None}
    rope = config.get("rope_parameters") or {}
    if on_cpu and rope.get("rope_type", "default") == "default" and not config.get("rope_scaling"):
        # vLLM's plain rotary embedding is wrong for MLA on a CPU (0.2 to 0.4 nats a token). YaRN by a factor
        # of 1 is the same function and takes another path.
        theta = rope.get("rope_theta", config.get("rope_theta", 10_000.0))
        length = config["max_position_embeddings"]
        yarn = {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": length}
        overrides["rope_parameters"] = {"rope_theta": theta, **yarn}
    return overrides


def cpu_attention(config: dict[str, Any], *, dtype: str, while_open: ExitStack) -> dict[str, Any]:
    """Engine options with which this model's attention runs on a CPU, with AMX or without.

    `while_open` keeps what has to be in the environment for as long as the engine lives.
    """
    if not config.get("kv_lora_rank"):
        return {"block_size": BLOCK}
    rope, nope, value = config["qk_rope_head_dim"], config["qk_nope_head_dim"], config["v_head_dim"]
    if config["kv_lora_rank"] + rope != MLA_HEAD:
        what = f"kv_lora_rank={config['kv_lora_rank']} + qk_rope_head_dim={rope} is not {MLA_HEAD}"
        if value > nope + rope:
            raise ValueError(
                f"{what}, the only size of vLLM's MLA on a CPU, and v_head_dim={value} above "
                f"qk_nope_head_dim + qk_rope_head_dim={nope + rope} rules out its plain attention: "
                "use kv_lora_rank=512 with qk_rope_head_dim=64"
            )
        logger.warning("%s: no MLA in vLLM on a CPU, plain attention instead (VLLM_MLA_DISABLE=1)", what)
        while_open.enter_context(environment("VLLM_MLA_DISABLE", "1"))
        return {"block_size": BLOCK}
    if dtype == "float32" or not has_amx():
        return {"attention_config": {"backend": "CPU_MLA"}}  # any dtype; blocks of 16 and no prefix cache
    return {"block_size": BLOCK}  # AMX_MLA, vLLM's own choice: bfloat16, with a prefix cache


def has_amx() -> bool:
    """Whether this CPU has Intel's matrix tiles, with which vLLM's bfloat16 is the fast path."""
    return bool(torch.cpu._is_amx_tile_supported())


@contextmanager
def guest() -> Iterator[None]:
    """Let vLLM work without the trainer noticing.

    It replaces torch.set_num_threads by a function that does nothing, seeds and draws from the global random
    states (a resumed run would differ from an uninterrupted one), and preloads libraries into children.
    """
    set_num_threads, python_state, numpy_state = (
        torch.set_num_threads,
        random.getstate(),
        np.random.get_state(),
    )
    preload = {name: os.environ.get(name) for name in ("LD_PRELOAD", "LD_LIBRARY_PATH")}
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        torch.set_num_threads = set_num_threads
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for name, value in preload.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
