"""A census and what is to be sampled -> what the sampler holds on a GPU, and how many sequences it decodes together.

Three samplers: a vLLM engine inside the trainer's process and our own decoder, which the recipe starts today, and vLLM
servers on the trainer's GPUs that sleep while it trains, which are to be built. Left out: servers on other machines,
what an engine needs for its own activations and CUDA graphs, and prefix caches' savings.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from runtime.planning.census import Census, latent_values, native_values
from runtime.planning.layout import GIB, USABLE, Gpu
from runtime.planning.memory import Line, constant

SAMPLING = "sampling"
ENGINE_SHARE = 0.3
"""Of a GPU's memory, for the engine inside the trainer's process (sampling/vllm_sampler.py)."""
ENGINE_CPU_CACHE = 1 * GIB
"""The same on a CPU: the cache alone."""
ENGINE_ROWS = 256
"""Sequences it decodes together at most."""
NATIVE_ROWS = 512
"""Those of our own decoder (sampling/native.py)."""
SERVER_SHARE = 1 / 4
"""Of a GPU's memory, for a server's weights; it gets more GPUs until they fit in it."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """What a step samples on one replica of the sampler."""

    prompts: int
    group: int
    """Completions a prompt."""
    prompt_tokens: int
    max_tokens: int

    @property
    def rows(self) -> int:
        """Sequences."""
        return self.prompts * self.group

    @property
    def longest(self) -> int:
        """Tokens of a sequence."""
        return self.prompt_tokens + self.max_tokens


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A way to sample."""

    name: str
    gpus: int
    """Of a replica; routed experts are spread over all of them."""
    tensor: int
    """Of those, the ones that share all else, and hold the same sequences."""
    rows: int
    """Sequences that such a group decodes together."""
    width: int
    """Bytes of a weight and of a cached value."""
    lines: list[Line]


def in_process(census: Census, kind: Gpu, rollout: Rollout, phases: Iterable[str], *, width: int) -> Sampler:
    """A vLLM engine in the trainer's process: it never sleeps, and takes its share of the memory at once."""
    weights = width * (census.total - census.mtp)
    of_token = width * latent_values(census.config) * len(census.main)
    cache = max(ENGINE_SHARE * kind.memory - weights, rollout.longest * of_token)
    if kind.name == "cpu":
        cache = ENGINE_CPU_CACHE
    share = "" if kind.name == "cpu" else f"; the engine takes {ENGINE_SHARE:.0%}"
    lines = [
        constant("sampler weights", f"vLLM, {width} B a parameter", weights, phases),
        constant("sampler cache", f"{of_token:,} B a token{share}", cache, phases),
    ]
    rows = min(rollout.rows, ENGINE_ROWS, max(int(cache // (rollout.longest * of_token)), 1))
    return Sampler(name="vLLM in the trainer's process", gpus=1, tensor=1, rows=rows, width=width, lines=lines)


def native(census: Census, rollout: Rollout, phases: Iterable[str]) -> Sampler:
    """Our decoder's copy of the model, fp32 as loaded, in every process; its caches and logits while it samples.

    Prompts are cached once a group; of every row there is room for all its tokens, and rows that leave have the others
    copied, seven in eight at the first time.
    """
    config = census.config
    waves = max(NATIVE_ROWS // rollout.group, 1)
    prompts = min(rollout.prompts, waves)
    rows = prompts * rollout.group
    of_token = 4 * native_values(config) * len(census.main)
    cache = of_token * (prompts * rollout.prompt_tokens + rows * rollout.max_tokens * 15 / 8)
    # Logits, logits over T, their exponentials (fp32), the cumulative sum (fp64); a uniform for every token to come.
    logits = rows * config.vocab_size * (4 + 4 + 4 + 8) + 8 * rows * rollout.max_tokens
    return Sampler(
        name="our own decoder in every process",
        gpus=1,
        tensor=1,
        rows=rows,
        width=4,
        lines=[
            constant("sampler weights", "our decoder's copy, fp32", 4 * census.total, phases),
            constant("sampler cache", f"{of_token:,} B a token; logits", cache + logits, [SAMPLING]),
        ],
    )


def colocated(census: Census, kind: Gpu, rollout: Rollout, *, gpus: int, resident: float) -> Sampler:
    """vLLM servers on the trainer's GPUs, bf16, asleep while it trains; `resident`: what the trainer keeps meanwhile.

    A replica is as small as its weights allow: tensor parallel in a node, where the latent cache is whole on every
    GPU (it has one head), and from then on data parallel, with the routed experts spread over all.
    """
    of_token = 2 * latent_values(census.config) * len(census.main)
    experts = sum(layer.experts for layer in census.main)
    rest = census.total - census.mtp - experts
    limit, tensor = SERVER_SHARE * kind.memory, 1
    while tensor < math.gcd(gpus, kind.per_node) and 2 * (rest + experts) / tensor > limit:
        tensor *= 2
    size = tensor
    while 2 * gpus // size % 4 == 0 and 2 * (rest / tensor + experts / size) > limit:
        size *= 2
    weights = 2 * (rest / tensor + experts / size)
    fitting = int((kind.memory * USABLE - resident - weights) // (rollout.longest * of_token))
    rows = max(min(-(-rollout.rows * tensor // gpus), ENGINE_ROWS, fitting), 1)  # `rollout` is that of all GPUs
    return Sampler(
        name=f"vLLM servers of {size} GPUs: {gpus // size}, asleep while the trainer works",
        gpus=size,
        tensor=tensor,
        rows=rows,
        width=2,
        lines=[
            constant("sampler weights", f"vLLM, bf16, over {size} GPUs", weights, [SAMPLING]),
            constant(
                "sampler cache",
                f"{of_token:,} B a token of {rows} sequences",
                rows * rollout.longest * of_token,
                [SAMPLING],
            ),
        ],
    )
