"""Milliseconds of a mixture-of-experts layer, forward and backward: ours against transformers' with each of its ways.

The layers of presets 5m and 20m (16 experts, 4 a token, in 4 groups) in fp32 on a CPU: router, experts and shared
expert, the same random weights and tokens. The peer is transformers' `DeepseekV3MoE` with the `experts_implementation`
that takes least. `batched_mm`, which copies weights for every token, is out: it took 30 to 98 times as long as ours.
Before anything is timed, outputs and all gradients must agree; otherwise the exit code is 1.
Left out: the rest of a block, bf16, CUDA, and adding to gradients of earlier micro-batches.
"""

import argparse
import statistics
import sys
import time
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

from benchmarks._common import STD, Contestant, Turns, alternate, ratio, setting, spread, table
from deepseek_v3 import preset
from deepseek_v3.moe import MoE

PEERS = ("eager", "grouped_mm")
TOLERANCE = 1e-5
"""Largest relative difference, by norm, of the output or of a gradient."""
TURN = 0.5
"""Seconds of a turn at least: passes are repeated until then."""


def make_layer(size: str, experts: str) -> tuple[nn.Module, DeepseekV3Config]:
    """Ours, or transformers' with the named experts, with the same weights."""
    config = preset(size)
    torch.manual_seed(0)
    ours = MoE(config)
    for p in ours.parameters():
        nn.init.normal_(p, std=STD)
    if experts == "ours":
        return ours, config
    config._experts_implementation = experts
    theirs = DeepseekV3MoE(config)
    theirs.load_state_dict(ours.state_dict())
    return theirs, config


def serve(turns: Turns, size: str, tokens: int, experts: str) -> None:
    """Forwards and backwards; answers with the seconds of one, or the first time with its output and gradients."""
    layer, config = make_layer(size, experts)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, config.hidden_size, generator=generator).requires_grad_()
    gradient = torch.randn(tokens, config.hidden_size, generator=generator)

    def work() -> Tensor:
        x.grad = None
        layer.zero_grad()
        out = layer(x if experts == "ours" else x[None]).view_as(x)
        out.backward(gradient)
        return out

    turns.answer({"threads": torch.get_num_threads()})
    for request in turns:
        if request == "check":
            results = {"output": work(), "input": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}
            turns.answer({name: tensor.detach().numpy() for name, tensor in results.items() if tensor is not None})
            continue
        began, passes = time.perf_counter(), 0
        while (taken := time.perf_counter() - began) < TURN or passes == 0:
            work()
            passes += 1
        turns.answer(taken / passes)


def differences(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> dict[str, float]:
    """Relative, by norm; of what only one side has, infinite."""

    def difference(name: str) -> float:
        if name not in ours or name not in theirs:
            return float("inf")
        return float(np.linalg.norm(ours[name] - theirs[name]) / np.linalg.norm(theirs[name]))

    return {name: difference(name) for name in sorted(ours.keys() | theirs.keys())}


def compare(args: argparse.Namespace, size: str, tokens: int) -> bool:
    """Time a layer and print its rows; False when results differ."""
    contestants: list[Contestant] = []
    try:
        for name in ("ours", *PEERS):
            contestants.append(Contestant(name, serve, size, tokens, name, threads=args.threads))
        results: dict[str, Any] = {contestant.name: contestant.turn("check") for contestant in contestants}
        for peer in PEERS:
            off = differences(results["ours"], results[peer])
            worst = max(off, key=lambda name: off[name])
            if not off[worst] <= TOLERANCE:
                print(f"parity: {worst} differs from that of {peer} by {off[worst]:.1e}, more than {TOLERANCE:g}")
                return False
        seconds: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
        for r, turns in groupby(alternate(contestants, args.rounds), key=lambda turn: turn[0]):
            for _, contestant in turns:
                seconds[contestant.name].append(contestant.turn("time"))
            print(f"round {r + 1} of {args.rounds}", file=sys.stderr)
    finally:
        for contestant in contestants:
            contestant.close()
    best = min(PEERS, key=lambda peer: statistics.median(seconds[peer]))
    for name, taken in seconds.items():
        named = f"{name} (its best)" if name == best else name
        times = "1" if name == "ours" else ratio(seconds["ours"], taken)
        print(f"| {size}, {tokens} | {named} | {spread([1000 * s for s in taken], '.1f')} | {times} |", flush=True)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.moe", description=__doc__)
    parser.add_argument("--preset", nargs="+", default=["5m", "20m"], help="model sizes")
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096, 256])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{setting(args.threads, 'torch', 'transformers')}\n")
    print(table(["layer, tokens", "experts", "ms", "times as long as ours"], []), flush=True)
    agree = [compare(args, size, tokens) for size in args.preset for tokens in args.tokens]
    return 0 if all(agree) else 1


if __name__ == "__main__":
    sys.exit(main())
