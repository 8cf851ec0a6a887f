"""CUDA: seconds and peak memory of the update and of the log-prob head, ours against padded rows and all logits.

Ours is `rl.update.update`: completions packed behind prompts that are computed once, FlexAttention, the head in chunks.
The other side is transformers' own V3 of the same weights with SDPA and its fastest experts: a row for every
completion, prompt and all, padded on both sides to the longest, logits of all completion tokens at once, the same loss,
clip and AdamW. bf16 autocast over fp32 weights; DeepSeek-V2-Lite's dimensions ("16b") with few layers, about 1B random
parameters. Before anything is timed, loss and gradient of one group must agree in fp32 without TF32. gpu.py runs this
and prints its table.

Left out: sampling, several GPUs, TRL (update.py compares with it on a CPU).
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from benchmarks._common import make_checkpoint, ratio, spread, timed
from benchmarks.head import full_logprobs
from benchmarks.update import LR, Case, Recorder, make_groups, make_policy, padded, with_microbatches
from rl.policy import Policy
from rl.types import Group
from rl.update import Optimizer, update
from runtime.logprobs import token_logprobs

TOLERANCE = 1e-3
"""Largest relative difference of loss and gradient in fp32."""
EXPERTS = ("grouped_mm", "batched_mm", "eager")
HEADER = ["what", "side", "seconds", "tokens/s", "ours is faster", "peak GiB"]


class Plain:
    """The other side: transformers' V3 on padded rows."""

    def __init__(self, folder: Path, inputs: dict[str, Tensor], *, rows: int, device: torch.device) -> None:
        """rows: of a micro-batch."""
        self.folder, self.device, self.rows = folder, device, rows
        self.inputs = {name: x.to(device) for name, x in inputs.items()}
        self.experts = ""
        self.model: Any = None

    def load(self, experts: str) -> None:
        import transformers

        self.experts, self.model = experts, None
        self.model = transformers.DeepseekV3ForCausalLM.from_pretrained(
            self.folder, attn_implementation="sdpa", experts_implementation=experts, dtype=torch.float32
        ).to(self.device)
        parameters = list(self.model.parameters())
        self.adamw = torch.optim.AdamW(parameters, lr=LR, betas=(0.9, 0.99), weight_decay=0.0, foreach=True)

    def backward(self) -> float:
        """Gradients of the whole update, left in the model; returns the loss."""
        x = self.inputs
        total = len(x["advantages"])
        loss = 0.0
        for start in range(0, total, self.rows):
            part = slice(start, start + self.rows)
            ids = torch.cat([x["prompt_ids"][part], x["completion_ids"][part]], dim=1)
            mask = torch.cat([x["prompt_mask"][part], x["completion_mask"][part]], dim=1)
            trained = x["completion_mask"][part].bool()
            hidden = self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            before = hidden[:, x["prompt_ids"].shape[1] - 1 : -1]
            logp, _ = full_logprobs(self.model.lm_head, before[trained], x["completion_ids"][part][trained])
            advantages = x["advantages"][part, None].expand_as(trained)[trained]
            share = (1 / (trained.sum(1, keepdim=True) * total)).expand_as(trained)[trained]
            part_loss = -((logp - logp.detach()).exp() * advantages * share).sum()
            part_loss.backward()
            loss += float(part_loss.detach())
        return loss

    def update(self) -> None:
        self.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)


def measure(args: argparse.Namespace, device: torch.device) -> list[list[str]] | None:
    """Rows for the table, or None where the sides don't compute the same."""
    case = Case(preset=args.preset, groups=args.groups, prompt=args.prompt, mean=args.mean, longest=args.longest)
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_checkpoint(Path(temporary) / "model", args.preset, num_hidden_layers=args.layers)
        lines = time_update(args, folder, case, device)
        if lines is None:
            return None
        config = AutoConfig.from_pretrained(folder)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return lines + time_head(args, config.vocab_size, config.hidden_size, device)


def measured(work: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds, and peak GiB allocated on the GPU (0 on a CPU)."""

    def finished() -> None:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    seconds, _ = timed(finished)
    return seconds, torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0


def compare(
    sides: Mapping[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, list[list[float]]]:
    """(seconds, peak GiB) of each side, by turns in an order that rotates, after a round that isn't counted."""
    results: dict[str, list[list[float]]] = {name: [[], []] for name in sides}
    for r in range(rounds + 1):
        order = list(sides)[r % 2 :] + list(sides)[: r % 2]
        for name in order:
            seconds, memory = measured(sides[name], device)
            if r:
                results[name][0].append(seconds)
                results[name][1].append(memory)
    return results


def rows(what: str, results: dict[str, list[list[float]]], tokens: int) -> list[list[str]]:
    """Lines of the table; the first side is ours."""
    (ours, _), *_ = results.values()
    return [
        [
            *(what, name, spread(seconds, ".3f"), spread([tokens / s for s in seconds], ",.0f")),
            "1" if seconds is ours else ratio(ours, seconds),
            spread(memory, ".1f"),
        ]
        for name, (seconds, memory) in results.items()
    ]


# --- the update -------------------------------------------------------------------------------------------------------


def parity(policy: Policy, groups: Sequence[Group], plain: Plain) -> tuple[float, float]:
    """Relative differences of loss and gradient, in fp32."""
    recorder = Recorder(policy)
    loss = update(policy, groups, recorder)["loss"]
    theirs = plain.backward()
    gradients = {name: p.grad for name, p in plain.model.named_parameters()}
    off = math.sqrt(sum(float((g - gradients[name]).square().sum()) for name, g in recorder.gradient.items()))
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values() if g is not None))
    plain.adamw.zero_grad(set_to_none=True)
    return abs(loss / theirs - 1), off / norm


def fastest_experts(plain: Plain, device: torch.device) -> None:
    """Load the other side with the implementation of experts that is fastest here."""
    seconds: dict[str, float] = {}
    for experts in EXPERTS:
        plain.load(experts)
        try:
            plain.update()
            seconds[experts] = measured(plain.update, device)[0]
        except (RuntimeError, NotImplementedError) as error:  # a kernel that this device or dtype lacks, or no memory
            print(f"{experts} experts: {str(error).splitlines()[0]}", file=sys.stderr)
    if not seconds:
        raise RuntimeError("none of transformers' expert implementations runs here; see above")
    plain.load(min(seconds, key=lambda experts: seconds[experts]))


def time_update(args: argparse.Namespace, folder: Path, case: Case, device: torch.device) -> list[list[str]] | None:
    """Rows of the update, or None where the sides don't compute the same."""
    policy = make_policy(folder)
    # bf16 puts the trainer's log-probs away from those of the groups, which are fp32's: not what is timed here.
    sampling = replace(policy.config.sampling, gap_limit=1e9)
    loss = replace(policy.config.loss, importance="none", importance_floor=0.0)
    policy.config = replace(policy.config, sampling=sampling, loss=loss)
    with_microbatches(policy, args.microbatch_tokens)
    groups = make_groups(policy, case)
    pad = int(policy.causal_lm.config.pad_token_id)

    few = Plain(folder, padded(groups[:1], pad), rows=args.rows, device=device)
    few.load("eager")
    differs = parity(policy, groups[:1], few)
    print(f"loss and gradient differ by {differs[0]:.1e} and {differs[1]:.1e} (≤ {TOLERANCE:g})", file=sys.stderr)
    if not max(differs) <= TOLERANCE:
        print(f"parity: loss and gradient differ by {differs}, more than {TOLERANCE:g}")
        return None
    del few

    plain = Plain(folder, padded(groups, pad), rows=args.rows, device=device)
    if args.precision == "bf16":
        policy.world.precision = "bf16"
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=args.precision == "bf16")

    def theirs() -> None:
        with autocast():
            plain.update()

    with autocast():
        fastest_experts(plain, device)
    optimizer = Optimizer(policy)
    ours = partial(update, policy, groups, optimizer)
    sides: dict[str, Callable[[], object]] = {"ours": ours, f"padded, {plain.experts} experts": theirs}
    padded_shared, packed_shared = case.ceilings
    what = f"update, {case}; ceiling {padded_shared:.2f}, packed {packed_shared:.2f}"
    return rows(what, compare(sides, args.rounds, device), case.tokens)


# --- the head ---------------------------------------------------------------------------------------------------------


def time_head(args: argparse.Namespace, vocab_size: int, hidden_size: int, device: torch.device) -> list[list[str]]:
    """Rows of the log-prob head, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(hidden_size, vocab_size, bias=False, device=device)
    hidden = torch.randn(args.head_tokens, hidden_size, generator=generator).to(device).requires_grad_()
    targets = torch.randint(vocab_size, (args.head_tokens,), generator=generator).to(device)

    def work(logprobs: Callable[..., tuple[Tensor, Tensor]], **more: Any) -> None:
        hidden.grad = head.weight.grad = None
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            logprobs(head, hidden, targets, **more)[0].sum().backward()

    sides = {
        "ours": partial(work, token_logprobs, vocab_size=vocab_size),
        "all logits": partial(work, full_logprobs),
    }
    what = f"head, {args.head_tokens} × {vocab_size}, states of {hidden_size}"
    return rows(what, compare(sides, args.rounds, device), args.head_tokens)
