"""A model and a wish ("auto", "vllm", "native") -> a sampler for it; it holds no weights before the first sync."""

import functools
import importlib.util
import logging
import tempfile
from collections.abc import Callable
from typing import Any, Literal

import torch
from transformers import PretrainedConfig, PreTrainedModel

from runtime.errors import UserError
from sampling.process import ProcessSampler
from sampling.protocol import Sampler

log = logging.getLogger(__name__)

Backend = Literal["auto", "vllm", "native"]

CANARY_TOKENS = 128
"""Length of the sequences that attest a sync: several blocks of a prefix cache."""


def make_sampler(
    model: PreTrainedModel,
    *,
    backend: Backend | Literal["server"] = "auto",
    dtype: Literal["auto", "bfloat16", "float32"] = "auto",
    max_model_len: int,
    seed: int = 0,
    processes: int = 1,
    process: bool = False,
    time_limit: float = 600.0,
    record_experts: bool = False,
    fp8: bool = False,
) -> Sampler:
    """A sampler for the architecture of `model` (without adapters); "auto" is vLLM where it is installed.

    dtype: vLLM's; the native sampler computes in the model's own.
    max_model_len: longest prompt plus completion, tokens; at most what the model's positions allow.
    processes: how many processes the run has. vLLM engines inside several are refused.
    process: run it in a child process (a `ProcessSampler`), which can hang or crash and be started again.
    time_limit: seconds one call of that child may take.
    record_experts: it must be able to say which experts each token was sent to; vLLM can on CUDA only.
    fp8: the native sampler's linear layers compute in FP8.
    Raises UserError for "server" (sampling/server.py): only a trainer brings servers their weights.
    """
    if backend == "server":
        raise UserError("sampling.backend='server': only GRPO brings servers their weights; use auto, vllm or native")
    if backend == "auto":
        installed = importlib.util.find_spec("vllm") is not None
        recordable = torch.cuda.is_available() or not record_experts
        backend = "vllm" if installed and processes == 1 and recordable else "native"
        why = " (vllm is not installed)" if not installed else " (several processes)" if processes > 1 else ""
        why = why or ("" if recordable else " (vllm records no experts on a CPU)")
        log.info("sampling.backend: %s%s", backend, why)
    make: Callable[[], Sampler]
    if backend == "native":
        if not process:
            from sampling.native import NativeSampler

            return NativeSampler(model, fp8=fp8)
        make = functools.partial(_native, type(model), model.config, dtype=model.dtype, device=model.device, fp8=fp8)
        return ProcessSampler(make, time_limit=time_limit)
    if processes > 1:
        raise UserError(
            f"sampling.backend='vllm': an engine inside each of {processes} processes is not supported; use "
            "sampling.backend=native, or one process"
        )
    if importlib.util.find_spec("vllm") is None:
        raise UserError("sampling.backend='vllm': vllm is not installed; use native, or run: make setup")
    length = min(max(max_model_len, CANARY_TOKENS + 1), model.config.max_position_embeddings)
    make = functools.partial(
        _vllm, model.config, dtype=dtype, max_model_len=length, seed=seed, record_experts=record_experts
    )
    return ProcessSampler(make, time_limit=time_limit) if process else make()


def _native(
    kind: type[PreTrainedModel], config: PretrainedConfig, *, dtype: torch.dtype, device: torch.device, fp8: bool
) -> Sampler:
    """Our sampler from an architecture alone, in the process it is to work in."""
    from sampling.native import NativeSampler

    return NativeSampler(kind._from_config(config, dtype=dtype).to(device), fp8=fp8)


def _vllm(config: PretrainedConfig, **options: Any) -> Sampler:
    """vLLM from an architecture alone: its weights come by sync."""
    from sampling.vllm_sampler import VLLMSampler

    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return VLLMSampler(folder, **options)
