"""Prompt ids -> sampled groups, by a vLLM engine inside this process.

vLLM shares the process, and with it threads and random state, with the trainer; `vllm_setup.guest` puts back
what a trainer would feel.

Leaves out: engines in another process or on another machine, adapters, and sampling that the trainer cannot
correct for (top-p, top-k, penalties). vLLM is imported when a sampler is made, never with this module.
"""

import gc
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch

from runtime.environment import environment
from sampling import vllm_reload
from sampling.protocol import Completion, Fingerprints, FinishReason, SamplingParams, Weights, check_seeds
from sampling.vllm_setup import cpu_attention, guest, has_amx, hf_overrides

CPU_BATCH_TOKENS = 4096
"""Tokens of a forward pass on a CPU, unless a single sequence may be longer."""

Dtype = Literal["auto", "bfloat16", "float16", "float32"]


class VLLMSampler:
    """A `Sampler` over vLLM's offline engine.

    model_dir: folder with config.json; its weights are not read, `load` brings them.
    dtype: "bfloat16", "float16" or "float32"; "auto" is float32 on a CPU without AMX, else bfloat16. For a tiny model
    on such a CPU float32 is as fast, and agrees with a float32 trainer to 1e-6 where bfloat16 leaves 0.013 nats.
    max_model_len: longest prompt plus completion, tokens.
    gpu_memory_utilization: share of the GPU's memory for weights and KV cache (CUDA).
    kv_cache_gib: size of the KV cache (CPU).
    enforce_eager: False compiles the model: a minute more at the start for 10-25 % more tokens a second.
    max_num_seqs: sequences decoded together; more wait their turn.
    record_experts: let requests ask for the experts of a DeepSeek-V3's tokens (CUDA); other models return none.
    """

    def __init__(
        self,
        model_dir: str | Path,
        *,
        dtype: Dtype = "auto",
        max_model_len: int,
        gpu_memory_utilization: float = 0.3,
        kv_cache_gib: float = 1,
        enforce_eager: bool = True,
        max_num_seqs: int = 256,
        seed: int = 0,
        record_experts: bool = False,
    ) -> None:
        config = json.loads((Path(model_dir) / "config.json").read_text())
        self.version = -1
        self.max_model_len = max_model_len
        self.eager = enforce_eager
        self.record_experts = record_experts
        ours = config.get("model_type") == "deepseek_v3"
        self.dense_layers: int | None = config["first_k_dense_replace"] if ours else None
        self._llm: Any = None
        self._cleanup = ExitStack()
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        # The first modules vLLM imports log before it reads the line above.
        logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
        with self._cleanup, guest():
            # In this process, so that weights are handed over by reference.
            self._cleanup.enter_context(environment("VLLM_ENABLE_V1_MULTIPROCESSING", "0"))
            from vllm import LLM
            from vllm.platforms import current_platform

            on_cpu = current_platform.is_cpu()
            if dtype == "auto":
                dtype = "float32" if on_cpu and not has_amx() else "bfloat16"
            self.dtype: str = dtype
            if record_experts and on_cpu:
                raise ValueError("record_experts=True: on a CPU vLLM returns no experts; use sampling.backend=native")
            options: dict[str, Any] = {"gpu_memory_utilization": gpu_memory_utilization}
            if record_experts and self.dense_layers is not None:
                options["enable_return_routed_experts"] = True
            if on_cpu:
                options = cpu_attention(config, dtype=dtype, while_open=self._cleanup)
                options["kv_cache_memory_bytes"] = int(kv_cache_gib * 2**30)
                # A prompt in two parts draws a token that is thrown away, and vLLM then winds the request's generator
                # back, which a CPU's can't be: RuntimeError("CPU Generator does not use offset").
                options["enable_chunked_prefill"] = False
                options["max_num_batched_tokens"] = max(max_model_len, CPU_BATCH_TOKENS)
            self._llm = LLM(
                str(model_dir),
                dtype=dtype,
                max_model_len=max_model_len,
                enforce_eager=enforce_eager,
                max_num_seqs=max_num_seqs,
                seed=seed,
                load_format="dummy",
                skip_tokenizer_init=True,
                hf_overrides=hf_overrides(config, on_cpu=on_cpu),
                # The model's own sampling defaults (top-p and the like) must not leak in, and log-probs must
                # be those of the distribution that is sampled from.
                generation_config="vllm",
                logprobs_mode="processed_logprobs",
                **options,
            )
            self.vocab_size: int = self._llm.llm_engine.model_config.get_vocab_size()
            self._cleanup = self._cleanup.pop_all()

    def load(self, weights: Weights, *, version: int) -> Fingerprints:
        """Take these weights (any float dtype, vLLM converts); fingerprints of the tensors as sent."""
        self.version = -1
        with guest():
            received = vllm_reload.load_into(self._engine(), weights)
        self.version = version
        return received

    def sample(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, seeds: Sequence[int]
    ) -> list[list[Completion]]:
        """`params.n` completions per prompt; the same batch and seeds give the same tokens."""
        check_seeds(prompts, seeds)
        if 0 < params.temperature < 0.01:
            raise ValueError(f"temperature={params.temperature}: vLLM would raise it to 0.01; use that, or 0 (greedy)")
        if params.speculate:
            raise ValueError("speculate=True: only our own sampler drafts; use sampling.backend=native")
        if params.record_experts and not self.record_experts:
            raise ValueError("record_experts=True: this engine can't; make it by VLLMSampler(..., record_experts=True)")
        self._check(prompts, room=params.max_tokens, what="prompt")
        # Or a prompt that an earlier call left in the cache would be rounded another way than one computed now.
        self._engine().reset_prefix_cache()
        requests = [self._request(params, seed=_stream_seed(seed, i)) for seed in seeds for i in range(params.n)]
        outputs = self._generate([prompt for prompt in prompts for _ in range(params.n)], requests)
        completions = [self._completion(output, record=params.record_experts) for output in outputs]
        return [completions[i : i + params.n] for i in range(0, len(completions), params.n)]

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probs of each token but the first, at temperature 1; sequences shorter than max_model_len."""
        from vllm import SamplingParams as Request

        self._check(sequences, room=1, what="sequence")
        request = Request(max_tokens=1, temperature=0, prompt_logprobs=0, flat_logprobs=True, detokenize=False)
        return [list(output.prompt_logprobs.logprobs) for output in self._generate(sequences, request)]

    def cached_prompt_tokens(self, prompt: Sequence[int]) -> int:
        """Run `prompt`, leave it in the prefix cache, and return how many of its tokens came from there.

        0 for a model that vLLM runs without a prefix cache (MLA on a CPU without AMX).
        """
        from vllm import SamplingParams as Request

        cache = self._engine().llm_engine.vllm_config.cache_config
        if not cache.enable_prefix_caching:
            return 0
        if len(prompt) <= 2 * cache.block_size:
            raise ValueError(
                f"prompt of {len(prompt)} tokens: the cache holds whole blocks of {cache.block_size} and the "
                f"check needs two; give {2 * cache.block_size + 1} tokens or more"
            )
        self._check([prompt], room=1, what="prompt")
        (output,) = self._generate([prompt], Request(max_tokens=1, temperature=0, detokenize=False))
        return int(output.num_cached_tokens or 0)

    def close(self) -> None:
        """Free the engine; another sampler can then be made in this process."""
        if self._llm is None:
            return
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self.version = -1
        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        gc.collect()
        cleanup_dist_env_and_memory()
        self._cleanup.close()

    def _engine(self) -> Any:
        if self._llm is None:
            raise RuntimeError("this sampler is closed")
        return self._llm

    def _generate(self, prompts: Sequence[Sequence[int]], requests: Any) -> list[Any]:
        llm = self._engine()
        if self.version < 0:
            raise RuntimeError("this sampler holds no attested weights: run sampling.attest.sync first")
        if not prompts:
            return []
        inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        # Eager: else vLLM compiles, at the first token (3 to 30 s), a rank count nobody here reads.
        with guest(), torch.compiler.set_stance("force_eager" if self.eager else "default"):
            try:
                return cast(list[Any], llm.generate(inputs, requests, use_tqdm=False))
            except BaseException:  # an interrupt too: what is left would run with the next call
                engine = llm.llm_engine
                engine.abort_request(list(engine.output_processor.request_states), internal=True)
                raise

    def _request(self, params: SamplingParams, *, seed: int) -> Any:
        from vllm import SamplingParams as Request
        from vllm.sampling_params import RequestOutputKind

        return Request(
            n=1,
            seed=seed,
            temperature=params.temperature,
            max_tokens=params.max_tokens,
            stop_token_ids=list(params.stop_token_ids),
            ignore_eos=True,  # only the stop tokens asked for
            logprobs=0,  # of the sampled token alone
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _completion(self, request: Any, *, record: bool) -> Completion:
        (output,) = request.outputs
        if output.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"vLLM ended a completion with {output.finish_reason!r}")
        experts = None
        if record and self.dense_layers is not None:
            fed = len(request.prompt_token_ids) + len(output.token_ids) - 1
            experts = moe_experts(output.routed_experts, tokens=fed, dense_layers=self.dense_layers)
        return Completion(
            ids=list(output.token_ids),
            logprobs=list(output.logprobs.logprobs),
            finish_reason=cast(FinishReason, output.finish_reason),
            version=self.version,
            experts=experts,
        )

    def _check(self, prompts: Sequence[Sequence[int]], *, room: int, what: str) -> None:
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"{what} {i} is empty")
            if len(prompt) + room > self.max_model_len:
                raise ValueError(
                    f"{what} {i}: {len(prompt)} tokens + {room} new exceed max_model_len="
                    f"{self.max_model_len}: shorten it, lower max_tokens, or raise max_model_len"
                )
            if min(prompt) < 0 or max(prompt) >= self.vocab_size:
                raise ValueError(f"{what} {i}: token ids outside 0..{self.vocab_size - 1}")


def moe_experts(routed_TLK: np.ndarray | None, *, tokens: int, dense_layers: int) -> np.ndarray:
    """vLLM's record of a request, a row for every token it was fed and in it every layer (dense ones hold zeros) ->
    int16 (tokens, MoE layers, K), as `Completion.experts`."""
    if routed_TLK is None or len(routed_TLK) != tokens:
        held = "none" if routed_TLK is None else len(routed_TLK)
        raise RuntimeError(f"vLLM returned the experts of {held} of {tokens} tokens")
    return routed_TLK[:, dense_layers:].astype(np.int16)


def _stream_seed(seed: int, index: int) -> int:
    """A seed of its own for completion `index` of a group; seed + index would repeat across groups."""
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
