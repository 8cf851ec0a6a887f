"""The settings of an SFT run -> its plan."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

from transformers import DeepseekV3Config

from recipes.planning.plan import (
    Fact,
    Plan,
    PlanConfig,
    advised,
    launch,
    layout_for,
    recipe_command,
    slower,
    to_build,
)
from runtime.planning.activations import Kernels
from runtime.planning.census import Census, block_flops, count, head_flops
from runtime.planning.cost import SFT_MFU, bubble, reached
from runtime.planning.layout import Layout, gpu
from runtime.planning.memory import TRAINING, Work, training
from runtime.settings import require
from sft.config import SFTConfig


def plan_sft(config: SFTConfig, model: DeepseekV3Config, options: PlanConfig, *, arguments: Sequence[str]) -> Plan:
    """Of `python -m recipes.sft` with these settings, which `arguments` gave."""
    census = count(model, config.lora)
    require(
        not config.mtp_loss or census.mtp > 0,
        f"mtp_loss={config.mtp_loss}: model={config.model!r} has no MTP layer; set it to 0",
    )
    bf16 = dataclasses.replace(config, precision="bf16")
    # A balance loss rules checkpointing out.
    checkpointing = dataclasses.replace(bf16, gradient_checkpointing=not config.balance_loss)
    changes = [
        ("precision bf16", bf16),
        ("precision bf16, gradient_checkpointing", checkpointing),
        (
            "precision bf16, gradient_checkpointing, rows_per_pass 1",
            dataclasses.replace(checkpointing, rows_per_pass=1),
        ),
    ]

    def make(config: SFTConfig, options: PlanConfig, launched: bool) -> Plan:
        kind = gpu(options.gpu)
        kernels = Kernels(bf16=config.precision == "bf16", cuda=kind.name != "cpu")
        if launched:
            layout = Layout(gpus=options.gpus, sharded=config.shard and options.gpus > 1, launched=True)
        else:
            tokens = config.rows_per_pass * config.row_length
            layout = layout_for(census, kernels, options, tokens=tokens, checkpointing=config.gradient_checkpointing)
        return _plan(config, census, options, layout, kernels, arguments)

    return advised(make, config, options, changes)


def _plan(
    config: SFTConfig, census: Census, options: PlanConfig, layout: Layout, kernels: Kernels, arguments: Sequence[str]
) -> Plan:
    kind = gpu(options.gpu)
    rows = -(-config.rows_per_step // layout.data)
    tokens = min(rows, config.rows_per_pass) * config.row_length
    work = Work(
        tokens=tokens,
        predicted=tokens,
        passes=-(-rows // config.rows_per_pass),
        summed=True,
        kernels=kernels,
        checkpointing=config.gradient_checkpointing,
        mtp=config.mtp_loss > 0,
        adapters=config.lora is not None,
        muon=config.optim.muon,
    )
    return Plan(
        recipe="sft",
        model=config.model,
        census=census,
        gpu=kind,
        layout=layout,
        phases=TRAINING,
        lines=training(census, work, layout),
        facts=_facts(config, census, options, layout, work),
        commands=launch(layout, kind, recipe_command("sft", config.model, arguments)),
        notes=[*to_build(layout), *_notes(config, layout, work)],
    )


def _facts(config: SFTConfig, census: Census, options: PlanConfig, layout: Layout, work: Work) -> list[Fact]:
    kind = gpu(options.gpu)
    speed, how = reached(kind, bf16=work.kernels.bf16, mfu=options.mfu, reported=SFT_MFU)
    context = (min(options.example_tokens, config.row_length) + 1) / 2
    backward = 1 if work.adapters else 2  # frozen weights have no gradient of their own
    forwards = 1 + backward + work.checkpointing
    heads = (1 + backward) * (1 + work.mtp)
    flops = forwards * block_flops(census, context, mtp=work.mtp) + heads * head_flops(census)
    step = config.rows_per_step * config.row_length
    steps = math.ceil(config.epochs * options.tokens / step)
    # Ranks with few rows wait for those with most, and a pipeline until it is full.
    computed = work.passes * work.tokens * layout.data * (1 + bubble(layout, work.passes))
    seconds, how = slower(computed * flops / (layout.gpus * speed), how, census, kind, layout, work, work.passes)
    return [
        Fact(
            name="tokens",
            value=config.epochs * options.tokens,
            unit="tokens",
            how=f"{config.epochs} epochs of {options.tokens:.3g} (--tokens)",
        ),
        Fact(name="steps", value=steps, unit="steps", how=f"{step:,} tokens each; passes on a GPU: {work.passes}"),
        Fact(
            name="compute",
            value=flops * steps * step,
            unit="FLOPs",
            how=f"{flops:.3g} a token: {forwards} forwards' worth, attention to {context:,.0f} tokens on average",
        ),
        Fact(name="step time", value=seconds, unit="seconds", how=how),
        Fact(name="hours", value=steps * seconds / 3600, unit="hours", how="without evaluation and saving"),
    ]


def _notes(config: SFTConfig, layout: Layout, work: Work) -> Iterator[str]:
    together = layout.data * config.rows_per_pass
    if config.rows_per_step % layout.data:
        yield (
            f"rows_per_step={config.rows_per_step} are too few, or uneven, for {layout.data} ranks, and some wait: a "
            f"multiple of {together} keeps all busy"
        )
    if layout.pipeline > 1 and work.passes < 2 * layout.pipeline:
        fewest = 2 * layout.pipeline
        yield f"DualPipe-V needs {fewest} passes a step: rows_per_step={fewest * together} at least"
    if layout.sharded and not config.shard:
        yield "shard=false: the layout to be built shards all the same"
    if layout.sharded and config.optim.muon:
        yield "optim.muon takes whole matrices: recipes.sft refuses it with sharded weights; shard=false keeps it"
    if work.adapters:
        yield "adapters: activations are those of full training, an upper bound"
