"""A model and a wish ("auto", "vllm", "native") -> a sampler for it; it holds no weights before the first sync."""

import importlib.util
import logging
import tempfile
from typing import Literal

from transformers import PreTrainedModel

from runtime.errors import UserError
from sampling.protocol import Sampler

log = logging.getLogger(__name__)

Backend = Literal["auto", "vllm", "native"]

CANARY_TOKENS = 128
"""Length of the sequences that attest a sync: several blocks of a prefix cache."""


def make_sampler(
    model: PreTrainedModel,
    *,
    backend: Backend = "auto",
    dtype: Literal["auto", "bfloat16", "float32"] = "auto",
    max_model_len: int,
    seed: int = 0,
    processes: int = 1,
) -> Sampler:
    """A sampler for the architecture of `model` (without adapters); "auto" is vLLM where it is installed.

    dtype: vLLM's; the native sampler computes in the model's own.
    max_model_len: longest prompt plus completion, tokens; at most what the model's positions allow.
    processes: how many processes the run has. vLLM engines inside several are refused.
    """
    if backend == "auto":
        installed = importlib.util.find_spec("vllm") is not None
        backend = "vllm" if installed and processes == 1 else "native"
        why = "" if backend == "vllm" else " (several processes)" if installed else " (vllm is not installed)"
        log.info("sampling.backend: %s%s", backend, why)
    if backend == "native":
        from sampling.native import NativeSampler

        return NativeSampler(model)
    if processes > 1:
        raise UserError(
            f"sampling.backend='vllm': an engine inside each of {processes} processes is not supported; use "
            "sampling.backend=native, or one process"
        )
    if importlib.util.find_spec("vllm") is None:
        raise UserError("sampling.backend='vllm': vllm is not installed; use native, or run: make setup")
    from sampling.vllm_sampler import VLLMSampler

    length = min(max(max_model_len, CANARY_TOKENS + 1), model.config.max_position_embeddings)
    # The engine needs the architecture only; its weights come by sync.
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        return VLLMSampler(folder, dtype=dtype, max_model_len=length, seed=seed)
