"""A census, a piece of training and a layout -> bytes on the fullest GPU, line by line, in every phase of a step.

States are counted from what sft/optimizer.py and rl/update.py hold, FSDP2's from runtime/sharding.py and torch's
implementation of it, activations from runtime/planning/activations.py. A backward pass frees activations while
gradients come up, so its peak is looked for block by block. Left out: fragmentation and libraries' own buffers, which
`USABLE` leaves room for, evaluation and saving.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from runtime.planning.activations import (
    Kernels,
    attending,
    block_input,
    block_keeps,
    final_norm,
    head,
    mixing,
    mtp_inputs,
    outside_blocks,
    working,
)
from runtime.planning.census import Census, Layer
from runtime.planning.layout import Layout

TRAINING = ("forward", "backward", "step")
"""Phases of a step: its last pass, and the optimizer."""

FORMULAS = {
    "weights": "fp32, 4 B a parameter",
    "optimizer": "AdamW, 8 B a trained parameter",
    "gradients": "fp32, of the layers done",
    "gathered": "FSDP2: two layers, embedding, head",
    "bf16 copies": "autocast, 2 B a weight in use",
    "activations": "kept for the backward pass",
    "working": "of the operation that runs",
    "head": "a chunk's logits, gradients",
}
"""What each line is."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One thing that takes memory."""

    name: str
    formula: str
    bytes: Mapping[str, float]
    """By phase; absent: nothing."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a trainer does in a step, in numbers."""

    tokens: int
    """T, of one pass on one rank."""
    predicted: int
    """C, those of them that go through the head."""
    passes: int
    """Forward and backward passes on one rank."""
    summed: bool
    """The head takes its gradients in the forward pass (SFT); otherwise logits are computed twice (GRPO)."""
    kernels: Kernels
    checkpointing: bool
    mtp: bool = False
    """The MTP layer is trained."""
    adapters: bool = False
    """LoRA: all else is frozen."""
    muon: bool = False


def total(lines: Iterable[Line], phase: str) -> float:
    """Bytes of a phase."""
    return sum(line.bytes.get(phase, 0) for line in lines)


def constant(name: str, formula: str, size: float, phases: Iterable[str]) -> Line:
    """The same in every phase."""
    return Line(name=name, formula=formula, bytes=dict.fromkeys(phases, size))


def training(census: Census, work: Work, layout: Layout) -> list[Line]:
    """Lines of forward, backward and optimizer step."""
    rank = _Rank(census, work, layout)
    phases: dict[str, dict[str, float]] = {
        "forward": _fullest([rank.end_of_forward(), *(rank.last_block_of_forward() if work.checkpointing else ())]),
        "backward": _fullest(rank.moments_of_backward()),
        "step": {"gradients": rank.gradients},
    }
    for moment in phases.values():
        moment |= {"weights": rank.weights, "optimizer": rank.optimizer}
    return [
        Line(name=name, formula=formula, bytes={phase: moment.get(name, 0) for phase, moment in phases.items()})
        for name, formula in FORMULAS.items()
    ]


def gathered_width(kernels: Kernels, layout: Layout) -> int:
    """Bytes of a weight that FSDP2 gathered: fp32 in the recipes; what is computed with, in a layout to be built."""
    return 4 if layout.launched else kernels.width


def _fullest(moments: Iterable[dict[str, float]]) -> dict[str, float]:
    return max(moments, key=lambda moment: sum(moment.values()))


class _Rank:
    """The fullest GPU: under DualPipe-V the one with the first and the last layers, embedding and head among them."""

    def __init__(self, census: Census, work: Work, layout: Layout) -> None:
        self.census, self.work, self.layout = census, work, layout
        self.layers = census.layers if work.mtp else census.main
        if layout.pipeline > 1:
            own = -(-len(self.layers) // layout.pipeline)
            self.layers = self.layers[-own:]  # the fullest: the first ones are dense
        held = census.embedding + census.head + census.norm + sum(layer.total for layer in self.layers)
        if not work.mtp:
            held += census.mtp
        self.weights = 4 * (held + census.adapters) / layout.shards + 4 * census.bias
        trained = census.adapters if work.adapters else held - (0 if work.mtp else census.mtp)
        self.gradients = 4 * trained / layout.shards
        self.optimizer = (8 * trained - (4 * census.muon if work.muon else 0)) / layout.shards
        config, tokens = census.config, work.tokens / layout.tensor
        keeps = {dense: tokens * block_keeps(config, work.kernels, dense=dense) for dense in (True, False)}
        self.keeps = [keeps[not layer.experts] for layer in self.layers]
        self.input = tokens * block_input(config)
        self.outside = tokens * outside_blocks(config)
        self.final = tokens * (final_norm(config) + (mtp_inputs(config, work.kernels) if work.mtp else 0))
        self.working = tokens * working(config, work.kernels, checkpointing=work.checkpointing)
        self.attending, self.mixing = (tokens * f(config, work.kernels) for f in (attending, mixing))
        self.states = tokens * block_input(config) if work.summed else 0  # all of them, until the head is done
        self.head = head(
            config,
            work.kernels,
            predicted=work.predicted // layout.tensor,
            summed=work.summed,
            frozen=work.adapters,
            times=1 + work.mtp,
        )
        self.head_gradient = 0 if work.adapters else 4 * census.embedding / layout.tensor

    # --- weights ------------------------------------------------------------------------------------------------------

    def whole(self, layer: Layer) -> float:
        """Parameters of a layer as this GPU computes with them."""
        experts = layer.experts / max(self.layout.expert, self.layout.tensor)
        return (layer.matrices + layer.router) / self.layout.tensor + layer.vectors + experts

    @property
    def root(self) -> float:
        """Parameters outside the layers."""
        return (self.census.embedding + self.census.head) / self.layout.tensor + self.census.norm

    def gathered(self, *, gradients: bool) -> float:
        """FSDP2's: the root's for the whole pass, a layer's and the next one's. A pipeline's stage is gathered once a
        step and adds up whole gradients over its passes. Embedding and head have theirs in other lines."""
        if not self.layout.sharded:
            return 0
        width = gathered_width(self.work.kernels, self.layout)
        sizes = sorted(map(self.whole, self.layers))
        whole = self.root + sum(sizes if self.layout.pipeline > 1 else sizes[-2:])
        if not gradients or self.work.adapters:
            return width * whole
        # On a GPU one layer's gradients are sent off while the next one's come up.
        learning = sizes if self.layout.pipeline > 1 else sizes[-2 if self.work.kernels.cuda else -1 :]
        return width * whole + 4 * sum(learning)

    def copies(self, layers: Iterable[Layer]) -> float:
        """Of weights that `F.linear` met under autocast."""
        if not self.work.kernels.bf16 or (self.layout.sharded and not self.layout.launched):
            return 0
        return 2 * sum(layer.matrices + layer.experts for layer in layers)

    # --- phases -------------------------------------------------------------------------------------------------------

    def end_of_forward(self) -> dict[str, float]:
        """All layers done, the head at its last chunk."""
        kept = self.input * len(self.keeps) if self.work.checkpointing else sum(self.keeps)
        return {
            "gradients": self.earlier,
            "gathered": self.gathered(gradients=False),
            "bf16 copies": 0 if self.work.checkpointing else self.copies(self.layers),
            "activations": self.flying * kept + self.outside + self.final,
            "head": self.head.kept + self.head.forward + self.states,
        }

    def last_block_of_forward(self) -> Iterator[dict[str, float]]:
        """Where blocks keep nothing, what one needs while it runs may be more than the head needs."""
        before = self.end_of_forward() | {"head": 0}
        before["activations"] -= self.final
        yield before | {"working": self.attending}
        yield before | {"working": self.mixing, "bf16 copies": self.copies(self.layers[-1:])}

    def moments_of_backward(self) -> Iterator[dict[str, float]]:
        """The head's, the widest of each block from the last to the first, and the embedding's at the end."""
        work, done = self.work, self.earlier
        yield self.end_of_forward() | {
            "head": self.head.kept + self.head.backward,
        }
        # The head's gradient is one more until it is added to those of earlier passes, or reduced with the root's.
        head_gradient = self.head_gradient if self.layout.sharded or not self.earlier else 0
        for i in reversed(range(len(self.layers))):
            kept = self.input * i if work.checkpointing else sum(self.keeps[:i])
            # Its experts' gradients come at once, before they are added to those of earlier passes, or sent off.
            new = 0 if work.adapters or self.layout.sharded else 4 * self.layers[i].experts
            yield {
                "gradients": done + new,
                "gathered": self.gathered(gradients=True),
                "bf16 copies": self.copies(self.layers[i : i + 1] if work.checkpointing else self.layers[: i + 1]),
                "activations": self.flying * kept + self.keeps[i] + self.outside + self.final,
                "working": self.working,
                "head": head_gradient,
            }
            if not self.earlier and not work.adapters:
                done += 4 * self.layers[i].total / self.layout.shards
        embedding = 0 if work.adapters else 4 * self.census.embedding / self.layout.tensor
        yield {
            "gradients": self.gradients if self.earlier else done + embedding,
            "gathered": self.gathered(gradients=True),
            "working": embedding if self.earlier else 0,
            "head": head_gradient,
        }

    @property
    def earlier(self) -> float:
        """Gradients of the passes before."""
        return self.gradients if self.work.passes > 1 else 0

    @property
    def flying(self) -> float:
        """Rows whose activations wait in a pipeline: of 2 p halves of stages a GPU has two, and at most 2 p + 1 rows'
        activations of one (DualPipe's table for its V form)."""
        p = self.layout.pipeline
        return p + 1 / 2 if p > 1 else 1
