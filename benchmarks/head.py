"""Seconds and peak memory of log-probs and entropy, forward and backward: the head in chunks against all logits.

Ours is `runtime.logprobs.token_logprobs` at several sizes of a chunk, to choose `CHUNK_ELEMENTS` for a CPU by. The
other side is what one writes first: logits of every token, `log_softmax`, gather, entropy. Memory is the
resident peak of the process's first forward and backward above what it held before, by Linux's own count: gradients,
which all have alike, and what came between. Before anything is timed, log-probs, entropy and the gradients of states
and head must agree; otherwise the exit code is 1.
Left out: the model below the head, bf16, and CUDA (gpu.py).
"""

import argparse
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._common import Contestant, Turns, alternate, ratio, setting, spread, table, timed
from runtime.logprobs import CHUNK_ELEMENTS, token_logprobs

TOLERANCE = 1e-4
"""Largest relative difference of any result."""
FULL = 0
"""Chunk size that stands for all logits at once."""


def full_logprobs(head: nn.Linear, hidden_TD: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy (T,) by way of all logits."""
    logp_TV = head(hidden_TD).float().log_softmax(-1)
    with torch.no_grad():
        entropy = -(logp_TV.exp() * logp_TV).sum(-1)
    return logp_TV.gather(-1, targets_T[:, None])[:, 0], entropy


def serve(turns: Turns, chunk: int, tokens: int, vocab_size: int, hidden_size: int) -> None:
    """Forward and backward; answers with the seconds, or the first time with (results, peak MiB)."""
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(hidden_size, vocab_size, bias=False)
    with torch.no_grad():
        head.weight.copy_(0.08 * torch.randn(head.weight.shape, generator=generator))
    hidden = torch.randn(tokens, hidden_size, generator=generator).requires_grad_()
    targets = torch.randint(vocab_size, (tokens,), generator=generator)
    weights = torch.randn(tokens, generator=generator)

    def work() -> tuple[Tensor, Tensor]:
        hidden.grad = head.weight.grad = None
        if chunk == FULL:
            logprobs, entropy = full_logprobs(head, hidden, targets)
        else:
            logprobs, entropy = token_logprobs(head, hidden, targets, vocab_size=vocab_size, chunk_elements=chunk)
        (logprobs * weights).sum().backward()
        return logprobs.detach(), entropy

    turns.answer({"threads": torch.get_num_threads()})
    before = reset_peak()
    for request in turns:
        seconds, results = timed(work)
        if request == "time":
            turns.answer(seconds)
            continue
        held = (peak() - before) / 2**20
        assert hidden.grad is not None and head.weight.grad is not None
        # What is sent stays small, and the gradient is seen whole. (Its plain sum over the vocabulary is zero.)
        probe = torch.randn(vocab_size, generator=torch.Generator().manual_seed(1))
        moments = (probe @ head.weight.grad, head.weight.grad.square().sum(0))
        turns.answer(([x.tolist() for x in (*results, hidden.grad, *moments)], held))


def reset_peak() -> int:
    """Start counting the resident peak anew; returns what is resident now, bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """Largest resident size since `reset_peak`, bytes. (`getrusage` would count the parent's before exec.)"""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def difference(ours: Any, theirs: Any) -> float:
    """Largest relative difference of the results, each by its norm."""
    pairs = [(torch.tensor(a), torch.tensor(b)) for a, b in zip(ours, theirs, strict=True)]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.head", description=__doc__)
    parser.add_argument("--shape", nargs="+", default=["2048x8192", "8192x8192", "2048x129280"], help="tokens x vocab")
    parser.add_argument("--hidden", type=int, default=320, help="size of a state")
    parser.add_argument("--chunk", type=int, nargs="+", default=[19, 20, 21, 22, 23, 24], help="log2 of its elements")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    held = CHUNK_ELEMENTS["cpu"].bit_length() - 1
    print(f"{setting(args.threads, 'torch')}  \nstates of {args.hidden}; a run on a CPU holds 2^{held} logits\n")
    header = ["tokens × vocabulary", "logits held", "seconds", "times faster than all at once", "peak MiB"]
    print(table(header, []), flush=True)
    return 0 if all(compare(args, *map(int, shape.split("x"))) for shape in args.shape) else 1


def compare(args: argparse.Namespace, tokens: int, vocab_size: int) -> bool:
    """Time all chunk sizes of a shape and print their rows; False when results differ."""
    sizes = {"all": FULL, **{f"2^{power}": 1 << power for power in args.chunk}}
    contestants: list[Contestant] = []
    try:
        for name, chunk in sizes.items():
            contestants.append(Contestant(name, serve, chunk, tokens, vocab_size, args.hidden, threads=args.threads))
        first = {contestant.name: contestant.turn("check") for contestant in contestants}
        for name, (results, _) in first.items():
            if not (differs := difference(results, first["all"][0])) <= TOLERANCE:
                print(f"parity: {name} differs from all logits at once by {differs:g} > {TOLERANCE:g}")
                return False
        seconds: dict[str, list[float]] = {name: [] for name in sizes}
        for r, turns in groupby(alternate(contestants, args.rounds), key=lambda turn: turn[0]):
            for _, contestant in turns:
                seconds[contestant.name].append(contestant.turn("time"))
            print(f"round {r + 1} of {args.rounds}", file=sys.stderr)
    finally:
        for contestant in contestants:
            contestant.close()
    for name, taken in seconds.items():
        faster = "1" if name == "all" else ratio(taken, seconds["all"])
        row = [f"{tokens} × {vocab_size}", name, spread(taken, ".3f"), faster, f"{first[name][1]:,.0f}"]
        print(f"| {' | '.join(row)} |", flush=True)
    return True


if __name__ == "__main__":
    sys.exit(main())
