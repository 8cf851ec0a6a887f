"""A kind of GPU and how many of them -> how a model is spread over them: FSDP2, expert, tensor, pipeline.

What FSDP2 spreads (weights, gradients, optimizer) shrinks with every GPU added; what it can't spread doesn't: layers
gathered to be computed with, activations, the head. Degrees are chosen by the second alone, so that they don't depend
on the number of GPUs and more GPUs never need more memory each. Left out: context parallelism, uneven stages.
"""

import difflib
import math
import os
from dataclasses import dataclass

from runtime.errors import UserError
from runtime.planning.census import Census

GIB = 2**30
USABLE = 0.9
"""Of a GPU's memory: the rest is CUDA's context, NCCL's and cuBLAS's buffers and what fragmentation wastes (an
assumption; vLLM's own default is 0.92)."""
GATHERED_SHARE = 1 / 8
"""Of a GPU's memory, for two layers that FSDP2 holds whole with their gradients; experts are divided until they fit."""
PASS_SHARE = 1 / 4
"""Of a GPU's memory, for what a pass keeps; all of a layer is divided (tensor) until it fits."""


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU; figures are those of NVIDIA's data sheets, memory as torch reports it."""

    name: str
    memory: float
    """Bytes."""
    flops: float
    """A second, dense bf16."""
    flops_fp32: float
    """The same without tensor cores, which torch leaves out for fp32 unless told otherwise."""
    bandwidth: float
    """Bytes a second from its own memory."""
    link: float
    """Bytes a second to the GPUs of its node, one way."""
    network: float
    """The same to other nodes."""
    per_node: int = 8


def gpu(name: str) -> Gpu:
    """By name; UserError names the nearest."""
    if name == "cpu":
        # Measured on two AVX-512 cores (benchmarks/RESULTS.md): fp32 matmul and copy.
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        fast, slow = 0.2e12, 1e9
        return Gpu(name, memory, flops=fast, flops_fp32=fast, bandwidth=30e9, link=slow, network=slow, per_node=1)
    if name not in GPUS:
        near = difflib.get_close_matches(name.lower(), KINDS, n=1, cutoff=0)[0]
        raise UserError(f"gpu={name!r}: no such kind; did you mean {near}? Known: {', '.join(KINDS)}")
    return GPUS[name]


GPUS = {
    "h100": Gpu("h100", 79 * GIB, flops=989e12, flops_fp32=67e12, bandwidth=3.35e12, link=450e9, network=50e9),
    "h200": Gpu("h200", 139 * GIB, flops=989e12, flops_fp32=67e12, bandwidth=4.8e12, link=450e9, network=50e9),
    "b200": Gpu("b200", 178 * GIB, flops=2250e12, flops_fp32=75e12, bandwidth=8e12, link=900e9, network=50e9),
    "a100": Gpu("a100", 79 * GIB, flops=312e12, flops_fp32=19.5e12, bandwidth=2.04e12, link=300e9, network=25e9),
}
KINDS = (*GPUS, "cpu")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where everything is. Ranks of a stage share its rows' tensor parts and, whatever else they do, its weights."""

    gpus: int
    sharded: bool
    """Weights, gradients and optimizer are spread over a stage's ranks (FSDP2); otherwise whole on each."""
    launched: bool
    """A recipe launches this today; otherwise its parts are there and have to be put together."""
    expert: int = 1
    tensor: int = 1
    pipeline: int = 1

    def __post_init__(self) -> None:
        for name in ("expert", "tensor", "pipeline"):
            degree = getattr(self, name)
            if degree < 1 or self.ranks % degree or self.gpus % degree:
                raise UserError(f"{name}={degree}: must divide the {self.gpus} GPUs, {self.ranks} of them in a stage")

    @property
    def ranks(self) -> int:
        """GPUs of a pipeline stage."""
        return self.gpus // max(self.pipeline, 1)

    @property
    def shards(self) -> int:
        """In how many parts a weight lies."""
        return self.ranks if self.sharded else 1

    @property
    def data(self) -> int:
        """Ranks with rows of their own."""
        return self.ranks // self.tensor

    def __str__(self) -> str:
        if self.gpus == 1:
            return "one process"
        degrees = [("expert", self.expert), ("tensor", self.tensor), ("pipeline (DualPipe-V)", self.pipeline)]
        spread = f"FSDP2 over {self.shards}" if self.sharded else f"{self.gpus} whole copies"
        return " + ".join([spread, *(f"{name} {degree}" for name, degree in degrees if degree > 1)])


def choose(
    census: Census,
    kind: Gpu,
    *,
    gpus: int,
    tokens: int,
    kept: float,
    expert: int | None = None,
    tensor: int | None = None,
    pipeline: int = 1,
) -> Layout:
    """FSDP2 over all GPUs, and beside it expert and tensor degrees where memory asks for them.

    tokens, kept: of a pass; bytes of its activations that neither FSDP2 nor experts' ranks divide. Where experts have
    to be divided, they are until FSDP2 moves no more of them than tokens move to their experts and back. Degrees given
    are taken as they are; UserError where they don't divide the GPUs.
    """
    if pipeline > 1 and (gpus % pipeline or 2 * pipeline > census.config.num_hidden_layers):
        raise UserError(
            f"pipeline={pipeline}: must divide gpus={gpus}, and leave two of {census.config.num_hidden_layers} layers "
            "to each GPU"
        )
    ranks = gpus // pipeline
    if tensor is None:
        tensor = power_of_two(kept / (PASS_SHARE * kind.memory), limit=math.gcd(ranks, kind.per_node))
    if expert is None:
        widest = max(census.layers, key=lambda layer: layer.total)
        room = GATHERED_SHARE * kind.memory / 2  # for one layer of two
        needed = 6 * widest.experts / max(room - 6 * (widest.total - widest.experts), room / 2)
        balanced = expert_traffic(census) / token_traffic(census, tokens)
        limit = math.gcd(ranks, census.config.n_routed_experts)
        expert = 1 if 8 * widest.total <= room else power_of_two(max(needed, balanced), limit=limit)
    return Layout(
        gpus=gpus,
        sharded=gpus > 1,
        launched=expert == tensor == pipeline == 1,
        expert=expert,
        tensor=tensor,
        pipeline=pipeline,
    )


def expert_traffic(census: Census) -> float:
    """Bytes of all experts that FSDP2 moves to and from a GPU in a pass: bf16 weights twice, fp32 gradients once."""
    return 8 * census.experts


def token_traffic(census: Census, tokens: int) -> float:
    """Bytes that a GPU sends in a pass so that each token reaches its K experts and comes back: bf16 states, forward
    and backward, if all are on other GPUs."""
    layers = sum(layer.experts > 0 for layer in census.layers)
    return 2 * 2 * 2 * census.config.num_experts_per_tok * census.config.hidden_size * tokens * layers


def moving(census: Census, kind: Gpu, layout: Layout, *, tokens: int, width: int, checkpointing: bool) -> float:
    """Seconds in which a pass of so many tokens on every GPU moves what it has to, if that were all it did.

    width: bytes of a weight as FSDP2 gathers it. Between nodes, GPUs of one that gather the same get it once, each a
    part of it. A pipeline's weights stay for all passes of a step, and are left out; so are tensor parallel sums.
    """
    sent = 0.0
    if layout.expert > 1:
        sent = token_traffic(census, tokens) * (1.5 if checkpointing else 1) / layout.pipeline
    inside = outside = 0.0
    if layout.shards > 1 and layout.pipeline == 1:
        of_weight = 2 * width + 4  # gathered forward and backward; fp32 gradients sent off
        degrees = ((census.experts, max(layout.expert, layout.tensor)), (census.total - census.experts, layout.tensor))
        inside = sum(of_weight * size / degree for size, degree in degrees)
        outside = sum(of_weight * size / max(degree, kind.per_node) for size, degree in degrees)
    if layout.gpus <= kind.per_node:
        return (inside + sent) / kind.link
    return max(inside / kind.link, (outside + sent) / kind.network)


def power_of_two(needed: float, *, limit: int) -> int:
    """The smallest that is at least `needed` and divides `limit`; the largest that does, if none reaches it."""
    power = 1
    while power < needed and limit % (2 * power) == 0:
        power *= 2
    return power
