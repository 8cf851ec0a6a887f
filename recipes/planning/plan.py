"""What a plan is, what it can be asked, what to change where it doesn't fit, and the commands that go with it.

Memory is the worst case that settings allow (full rows, longest completions), time the mean one.
"""

import dataclasses
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from deepseek_v3 import PRESETS
from runtime.planning.activations import Kernels, block_input, block_keeps
from runtime.planning.census import Census
from runtime.planning.layout import USABLE, Gpu, Layout, choose, gpu, moving
from runtime.planning.memory import Line, Work, gathered_width, total
from runtime.settings import require

C = TypeVar("C")
MOST_GPUS = 2048


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What a recipe's settings don't say."""

    recipe: Literal["sft", "grpo"] | None = None
    """Unset: the one that takes all the settings given, or both."""
    gpus: int = 1
    """GPUs, 1 to 2,048."""
    gpu: str = "h100"
    """Kind: h100, h200, b200, a100 or cpu."""
    expert: int | None = None
    """GPUs that share a layer's routed experts; unset: as many as memory needs."""
    tensor: int | None = None
    """GPUs that share a layer's matrices; unset: as many as memory needs."""
    pipeline: int = 1
    """GPUs a row passes through, by DualPipe-V."""
    tokens: float = 804_745 * 5_355
    """SFT: tokens of the mix. Default: R1's 800k examples (arXiv 2501.12948v2, table 5)."""
    example_tokens: int = 5_355
    """SFT: mean tokens of an example, at most a row's. Default: of those."""
    prompt_tokens: int = 256
    """GRPO: mean tokens of a prompt, at most sampling.max_prompt_tokens."""
    completion_tokens: int | None = None
    """GRPO: mean tokens of a completion; unset: half of sampling.max_tokens."""
    mfu: float | None = None
    """Model FLOPs utilisation of training; unset: what others report (runtime/planning/cost.py)."""
    json: bool = False
    """Print JSON: bytes, FLOPs and seconds, unrounded."""

    def __post_init__(self) -> None:
        require(1 <= self.gpus <= MOST_GPUS, f"gpus={self.gpus}: 1 to {MOST_GPUS}")
        gpu(self.gpu)
        require(self.mfu is None or 0 < self.mfu <= 1, f"mfu={self.mfu}: a share, say 0.3")
        for name in ("tokens", "example_tokens", "prompt_tokens", "pipeline", "expert", "tensor", "completion_tokens"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name}={value}: at least 1")


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One figure of a run."""

    name: str
    value: float
    unit: str
    how: str
    """What it is made of."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will take."""

    recipe: str
    model: str
    census: Census
    gpu: Gpu
    layout: Layout
    phases: tuple[str, ...]
    lines: list[Line]
    facts: list[Fact]
    commands: list[str]
    notes: list[str]
    """What is assumed, missing, or to be changed."""

    @property
    def status(self) -> str:
        """Whether a recipe does this."""
        return f"which recipes.{self.recipe} launches" if self.layout.launched else "to be built: no recipe launches it"

    @property
    def peak(self) -> tuple[str, float]:
        """The phase that takes most, and its bytes on the fullest GPU."""
        phase = max(self.phases, key=lambda phase: total(self.lines, phase))
        return phase, total(self.lines, phase)

    @property
    def limit(self) -> float:
        """Bytes of a GPU that a run can count on."""
        return self.gpu.memory * USABLE

    @property
    def fits(self) -> bool:
        """Whether every phase does."""
        return self.peak[1] <= self.limit


def layout_for(census: Census, kernels: Kernels, options: PlanConfig, *, tokens: int, checkpointing: bool) -> Layout:
    """That of the options, or the smallest that a pass of so many tokens asks for."""
    config = census.config
    blocks = {dense: block_keeps(config, kernels, dense=dense) for dense in (True, False)}
    if checkpointing:
        kept = max(blocks.values()) + block_input(config) * len(census.main)
    else:
        kept = sum(blocks[not layer.experts] for layer in census.main)
    return choose(
        census,
        gpu(options.gpu),
        gpus=options.gpus,
        tokens=tokens,
        kept=kept * tokens,
        expert=options.expert,
        tensor=options.tensor,
        pipeline=options.pipeline,
    )


def advised(
    make: Callable[[C, PlanConfig, bool], Plan], config: C, options: PlanConfig, changes: Sequence[tuple[str, C]]
) -> Plan:
    """The plan of what the recipe launches if that fits, be it with changes; otherwise of a layout to be built, unless
    the options ask for one anyhow. Notes say what would fit: other settings, more GPUs, or both.

    make: settings, options, and whether the recipe has to launch it -> a plan.
    changes: what to change, and the settings with that and all changes before it.
    """
    settings = [("", config), *changes]
    asked = max(options.expert or 1, options.tensor or 1, options.pipeline) > 1
    notes: list[str] = []
    if not asked:
        plan = make(config, options, True)
        if plan.fits:
            return plan
        if found := next((change for change, changed in changes if make(changed, options, True).fits), None):
            return dataclasses.replace(plan, notes=[f"fits on these GPUs with {found}", *plan.notes])
        notes += _ways(make, settings, options, launched=True)
    plan = make(config, options, False)
    if not plan.fits:
        notes += [way for way in _ways(make, settings, options, launched=False) if way not in notes]
        notes = notes or [f"nothing up to {MOST_GPUS} {options.gpu} fits: take fewer tokens a pass"]
    return dataclasses.replace(plan, notes=[*notes, *plan.notes])


def _ways(
    make: Callable[[C, PlanConfig, bool], Plan],
    settings: Sequence[tuple[str, C]],
    options: PlanConfig,
    *,
    launched: bool,
) -> Iterator[str]:
    """What fits: for each of the settings the fewest GPUs, doubled from those asked for, if fewer than before."""
    most = MOST_GPUS
    for change, changed in settings:
        counts = [options.gpus << i for i in range(MOST_GPUS.bit_length()) if options.gpus << i <= most]
        plans = (make(changed, dataclasses.replace(options, gpus=gpus), launched) for gpus in counts)
        if found := next((plan for plan in plans if plan.fits), None):
            together = f" with {change}" if change else ""
            yield f"fits{together} on {found.layout.gpus} GPUs: {found.layout}, {found.status}"
            most = found.layout.gpus - 1


def launch(layout: Layout, kind: Gpu, what: str) -> list[str]:
    """The command that starts `what` on these GPUs; for a layout that no recipe launches, what you have built."""
    if not layout.launched:
        what = "yours.py"
    if layout.gpus == 1:
        return [f"python {what}"]
    fewest = -(-layout.gpus // kind.per_node)
    nodes = next(n for n in range(fewest, layout.gpus + 1) if layout.gpus % n == 0)
    each = layout.gpus // nodes
    if nodes == 1:
        return [f"torchrun --nproc-per-node {each} {what}"]
    meet = "--rdzv-backend c10d --rdzv-endpoint HOST:29500"
    return [
        f"# on each of {nodes} nodes, HOST being one of them:",
        f"torchrun --nnodes {nodes} --nproc-per-node {each} {meet} {what}",
    ]


def checkpoint(model: str) -> str:
    """What a recipe is to be given for it: presets have no weights, but for the tiny one."""
    return "CHECKPOINT" if model in PRESETS and model != "tiny" else model


def recipe_command(recipe: str, model: str, arguments: Sequence[str]) -> str:
    """-m recipes.x with its arguments, those given for the plan."""
    own, skipped = list[str](), False
    if checkpoint(model) != model:
        for argument in arguments:  # --model NAME, or --model=NAME
            if not skipped and argument.partition("=")[0] != "--model":
                own.append(argument)
            skipped = argument == "--model"
        arguments = [*own, "--model", checkpoint(model)]
    return shlex.join(["-m", f"recipes.{recipe}", *arguments])


def slower(
    computing: float, how: str, census: Census, kind: Gpu, layout: Layout, work: Work, passes: int
) -> tuple[float, str]:
    """Seconds of so many passes, and why: the longer of computing them and moving what they need."""
    moved = passes * moving(
        census,
        kind,
        layout,
        tokens=work.tokens // layout.tensor,
        width=gathered_width(work.kernels, layout),
        checkpointing=work.checkpointing,
    )
    if moved <= computing:
        return computing, how
    return moved, f"for moving weights, gradients, tokens; computing, at the same time, is {computing:.3g} s {how}"


def to_build(layout: Layout) -> Iterator[str]:
    """What has to be put together for a layout that no recipe launches."""
    if layout.launched:
        return
    parts = []
    if layout.expert > 1:
        parts.append("expert_parallel")
    if layout.pipeline > 1:
        parts.append("stages and Pipeline (DualPipe-V)")
    pieces = [f"{' and '.join(parts)} of deepseek_v3/parallel.py"] if parts else []
    pieces.append("fully_shard with its mixed precision")
    if layout.tensor > 1:
        pieces.append("torch's parallelize_module")
    yield f"recipes launch one process, or FSDP2 alone; to build this: {', '.join(pieces)}"
