"""The settings of a GRPO run -> its plan: trainer and sampler share the GPUs and take turns."""

import dataclasses
import math
from collections.abc import Sequence

from transformers import DeepseekV3Config

from recipes.planning.plan import (
    Fact,
    Plan,
    PlanConfig,
    advised,
    checkpoint,
    launch,
    layout_for,
    recipe_command,
    slower,
    to_build,
)
from rl.config import GRPOConfig
from runtime.planning.activations import Kernels
from runtime.planning.census import Census, block_flops, count, head_flops
from runtime.planning.cost import DECODE_EFFICIENCY, GRPO_MFU, decoding, reached
from runtime.planning.layout import USABLE, Layout, gpu
from runtime.planning.memory import TRAINING, Line, Work, constant, total, training
from runtime.planning.sampler import SAMPLING, Rollout, Sampler, colocated, in_process, native

PHASES = (SAMPLING, *TRAINING)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Step:
    """A rollout and its updates, in tokens."""

    prompt: int
    mean: int
    """Of a completion."""
    longest: int
    rows: int
    """Completions."""
    trained: int
    """Tokens of the packed rows: each prompt once, or once for each completion."""

    @property
    def sampled(self) -> int:
        """Of all completions."""
        return self.rows * self.mean


def plan_grpo(config: GRPOConfig, model: DeepseekV3Config, options: PlanConfig, *, arguments: Sequence[str]) -> Plan:
    """Of `python -m recipes.grpo` with these settings, which `arguments` gave."""
    census, step = count(model, config.lora), _step(config, options)
    bf16 = dataclasses.replace(config, precision="bf16")
    again = dataclasses.replace(bf16, gradient_checkpointing=True)
    fewest = min(config.optim.microbatch_tokens, step.prompt + step.longest)
    fewer = dataclasses.replace(again, optim=dataclasses.replace(config.optim, microbatch_tokens=fewest))
    changes = [
        ("precision bf16", bf16),
        ("precision bf16, gradient_checkpointing", again),
        (f"precision bf16, gradient_checkpointing, optim.microbatch_tokens {fewest}", fewer),
    ]

    def make(config: GRPOConfig, options: PlanConfig, launched: bool) -> Plan:
        return _plan(config, census, options, step, arguments, launched=launched or options.gpus == 1)

    return advised(make, config, options, changes)


def _step(config: GRPOConfig, options: PlanConfig) -> _Step:
    prompt = min(options.prompt_tokens, config.sampling.max_prompt_tokens)
    longest = config.sampling.max_tokens
    mean = min(options.completion_tokens or -(-longest // 2), longest)
    rows = config.prompts_per_step * config.group_size
    prompts = config.prompts_per_step if config.optim.share_prompts else rows
    return _Step(prompt=prompt, mean=mean, longest=longest, rows=rows, trained=prompts * prompt + rows * mean)


def _plan(
    config: GRPOConfig,
    census: Census,
    options: PlanConfig,
    step: _Step,
    arguments: Sequence[str],
    *,
    launched: bool,
) -> Plan:
    """launched: what the recipe does, FSDP2 with a sampler in every process; otherwise layouts to be built, with
    vLLM servers on the trainer's GPUs."""
    kind = gpu(options.gpu)
    kernels = Kernels(bf16=config.precision == "bf16", cuda=kind.name != "cpu")
    # Micro-batches hold so many tokens, but one completion with its prompt at least.
    tokens = max(config.optim.microbatch_tokens, step.prompt + step.longest)
    family = step.prompt + config.group_size * step.longest
    tokens = min(tokens, config.prompts_per_step // config.optim.minibatches * family)
    checkpointing = config.gradient_checkpointing or not launched
    if launched:
        layout = Layout(gpus=options.gpus, sharded=config.shard and options.gpus > 1, launched=True)
    else:
        layout = layout_for(census, kernels, options, tokens=tokens, checkpointing=checkpointing)
        layout = dataclasses.replace(layout, launched=False)
    own = -(-config.prompts_per_step // layout.data)
    most = -(-own // config.optim.minibatches) * family
    work = Work(
        tokens=min(tokens, most),
        predicted=min(tokens, most) * config.group_size * step.longest // family,
        passes=-(-most // tokens),
        summed=False,
        kernels=kernels,
        checkpointing=checkpointing,
        adapters=config.lora is not None,
    )
    lines = training(census, work, layout)
    if config.loss.beta > 0 and config.lora is None:
        lines.append(constant("reference", "fp32, 4 B a parameter", 4 * census.total / layout.shards, TRAINING))
    lines = [_while_sampling(line) for line in lines]
    sampler = _sampler(config, census, options, step, layout, lines)
    facts = _facts(config, census, options, layout, step, sampler, work)
    where = "GPU" if sampler.tensor == 1 else f"{sampler.tensor} GPUs"
    notes = [
        f"sampling: {sampler.name}; {sampler.rows} sequences at a time on every {where}",
        *to_build(layout),
    ]
    if not launched:
        notes.append("to be built, too: servers that sleep on the trainer's GPUs; recipes.grpo knows those of others")
    elif layout.gpus > 1 and config.sampling.backend != "server":
        notes.append("every process samples with a whole copy; with sampling.backend=server none is held here")
    if own < config.optim.minibatches:
        notes.append(
            f"optim.minibatches={config.optim.minibatches}: a rank has groups for {own} of them, so a step has {own} "
            f"updates of {config.prompts_per_step // own} groups"
        )
    if work.adapters:
        notes.append("adapters: activations are those of full training, an upper bound")
    if config.fp8 != "off":
        notes.append("fp8: neither its faster products nor its codes, a byte a weight and copy, are in these figures")
    if config.dynamic_sampling.max_rounds:
        notes.append("dynamic_sampling: a step of one rollout; its further rounds come on top")
    return Plan(
        recipe="grpo",
        model=config.model,
        census=census,
        gpu=kind,
        layout=layout,
        phases=PHASES,
        lines=[*lines, *sampler.lines],
        facts=facts,
        commands=_commands(config, layout, sampler, options, arguments, step),
        notes=notes,
    )


def _while_sampling(line: Line) -> Line:
    """What stays when the sampler's turn comes: weights, optimizer, reference."""
    if line.name not in ("weights", "optimizer", "reference"):
        return line
    return dataclasses.replace(line, bytes={SAMPLING: line.bytes["step"], **line.bytes})


def _sampler(
    config: GRPOConfig, census: Census, options: PlanConfig, step: _Step, layout: Layout, lines: list[Line]
) -> Sampler:
    kind = gpu(options.gpu)
    whole = Rollout(
        prompts=config.prompts_per_step, group=config.group_size, prompt_tokens=step.prompt, max_tokens=step.longest
    )
    if not layout.launched:
        return colocated(census, kind, whole, gpus=layout.gpus, resident=total(lines, SAMPLING))
    own = dataclasses.replace(whole, prompts=-(-config.prompts_per_step // layout.gpus))
    if config.sampling.backend == "server":
        name = "servers, whose GPUs are not in this plan; its time is that of our own decoder on as many as here"
        return dataclasses.replace(native(census, own, PHASES), name=name, lines=[])
    if layout.gpus > 1 or config.sampling.backend == "native":
        return native(census, own, PHASES)
    fp32 = config.sampling.dtype == "float32" or (config.sampling.dtype == "auto" and kind.name == "cpu")
    return in_process(census, kind, own, PHASES, width=4 if fp32 else 2)


def _facts(
    config: GRPOConfig,
    census: Census,
    options: PlanConfig,
    layout: Layout,
    step: _Step,
    sampler: Sampler,
    work: Work,
) -> list[Fact]:
    kind = gpu(options.gpu)
    speed, how = reached(kind, bf16=work.kernels.bf16, mfu=options.mfu, reported=GRPO_MFU)
    context = step.prompt + step.mean / 2
    updates = config.optim.minibatches * config.optim.epochs
    backward = 1 if work.adapters else 2
    # Forward and backward for each epoch; π_old where a rollout takes several updates; π_ref for each epoch.
    scored = (updates > 1) + config.optim.epochs * (config.loss.beta > 0)
    blocks = config.optim.epochs * (1 + backward + work.checkpointing) + scored
    heads = config.optim.epochs * (2 + backward) + scored  # its logits are computed again in the backward pass
    flops = step.trained * blocks * block_flops(census, context) + step.sampled * heads * head_flops(census)
    # A rank's own groups, as many updates as it has groups for, each in passes of its own.
    own = -(-config.prompts_per_step // layout.data)
    full = min(own, config.optim.minibatches)
    mean = -(-own // full) * (step.prompt + config.group_size * step.mean)
    passes = config.optim.epochs * full * -(-mean // work.tokens)
    updating, how = slower(flops / (layout.gpus * speed), how, census, kind, layout, work, passes)
    decode = decoding(
        census,
        kind,
        gpus=sampler.gpus,
        tensor=sampler.tensor,
        rows=sampler.rows,
        context=step.prompt + step.mean / 2,
        width=sampler.width,
    )
    # Rows leave and others take their place; the longest one is waited for.
    sampling = max(step.sampled * sampler.tensor / (layout.gpus * sampler.rows), step.longest) * decode
    seconds = sampling + updating
    return [
        Fact(
            name="sampled",
            value=config.steps * step.sampled,
            unit="tokens",
            how=f"{step.rows:,} completions a step, {step.mean:,} tokens each on average",
        ),
        Fact(name="steps", value=config.steps, unit="steps", how=f"rollouts; updates on each: {updates}"),
        Fact(
            name="compute",
            value=config.steps * flops,
            unit="FLOPs",
            how=f"updates: {blocks} forwards' worth of {step.trained:,} tokens a step",
        ),
        Fact(
            name="sampling",
            value=sampling,
            unit="seconds a step",
            how=f"{decode * 1e3:.3g} ms a token, an estimate: weights and cache read at {DECODE_EFFICIENCY:.0%} of the "
            "bandwidth; small models wait longer",
        ),
        Fact(name="updating", value=updating, unit="seconds a step", how=how),
        Fact(
            name="hours",
            value=config.steps * seconds / 3600,
            unit="hours",
            how="without rewards, weight sync, evaluation and saving",
        ),
    ]


def _commands(
    config: GRPOConfig, layout: Layout, sampler: Sampler, options: PlanConfig, arguments: Sequence[str], step: _Step
) -> list[str]:
    kind = gpu(options.gpu)
    inside = layout.launched and layout.gpus > 1 and config.sampling.backend != "server"
    native = ["--sampling.backend", "native"] if inside else []
    trainer = launch(layout, kind, recipe_command("grpo", config.model, [*arguments, *native]))
    if layout.launched:
        return trainer
    spread = f"--tensor-parallel-size {sampler.tensor} --data-parallel-size {sampler.gpus // sampler.tensor}"
    several = sampler.gpus > kind.per_node
    share = min(math.ceil(100 * total(sampler.lines, SAMPLING) / kind.memory) / 100, USABLE)
    return [
        *trainer,
        f"# beside it, servers: {layout.gpus // sampler.gpus}" + (", on a Ray cluster of its nodes" if several else ""),
        f"vllm serve {checkpoint(config.model)} {spread}"
        + (" --data-parallel-backend ray" if several else "")
        + f" --enable-expert-parallel --dtype bfloat16 --max-model-len {step.prompt + step.longest} "
        f"--max-num-seqs {sampler.rows} --gpu-memory-utilization {share} --enable-sleep-mode",
    ]
