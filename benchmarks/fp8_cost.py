"""What FP8 costs RL: how far it moves the log-probs of sampled tokens, and how many tokens it sends to other experts.

The tokens are answers that the model itself samples in fp32, on held-out stories; all sides score the same. |Δ| is of
log-probs at temperature 1. A flip is a token at a layer whose set of experts differs, prompts included. "experts held"
is the mean |Δ| once the routers' choices are replayed: what is left is rounding alone. "weight" is the effective
sample size, as a share, of the importance weights that a correction for the sampler would use.

bf16 is a model of bf16 weights; FP8 is on top of it (what a cluster samples with) or of fp32 (what a CPU does).
The default model is the tiny V3 after its warm-up, whose widths are 96 to 384: at most three blocks of 128.
"""

import argparse
import copy
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks._common import setting, table
from deepseek_v3.fp8.linear import use_fp8
from deepseek_v3.routing import recorded, replayed, set_flips
from rl.prompts import make_source
from rl.rollout import stop_token_ids
from runtime.models import load_causal_lm, load_tokenizer
from runtime.packed import score_sequences
from runtime.rows import load_rows
from runtime.weights import checkpoint_tensors
from sampling.native import NativeSampler
from sampling.protocol import SamplingParams

PAIRS = [("fp8", "fp32"), ("fp8 + bf16", "bf16"), ("fp8 + bf16", "fp32"), ("bf16", "fp32")]
PARITY = 1e-3
"""Nats that the fp32 side's scores may lie from the log-probs the answers were sampled at."""
HEADER = ["of", "against", "mean Δ", "99 %", "max Δ", "flips", "mean Δ, experts held", "weight"]


@dataclass(frozen=True)
class Cost:
    """Of one side against another."""

    mean: float
    """Mean |Δ log π| over the sampled tokens, nats."""
    high: float
    """Its 99th percentile."""
    max: float
    flips: float
    """Share of (token, layer) pairs with another set of experts."""
    held: float
    """`mean`, with the other side's experts."""
    weight: float
    """(Σw)² / (n Σw²) of the tokens' weights w = π_other / π."""


def costs(folder: Path, *, prompts: int = 64, group: int = 4, seed: int = 0) -> dict[tuple[str, str], Cost]:
    """What each of PAIRS costs the model in `folder`, on its own answers to `prompts` held-out stories."""
    model = load_causal_lm(folder).eval().requires_grad_(False)
    sequences, sampled, logprobs = _answers(model, folder, prompts, group, seed)
    sides = {"fp32": model, "bf16": copy.deepcopy(model).bfloat16()}
    for name, of in (("fp8", "fp32"), ("fp8 + bf16", "bf16")):
        sides[name] = copy.deepcopy(sides[of])
        use_fp8(sides[name], "forward")
    scores = {name: _scores(side, sequences) for name, side in sides.items()}
    if not (off := float((scores["fp32"][0][sampled] - logprobs).abs().max())) <= PARITY:
        raise RuntimeError(f"parity: fp32 scores a token {off:.1e} nats from the log-prob it was sampled at")
    result = {}
    for a, b in PAIRS:
        (left, experts), (right, others) = scores[a], scores[b]
        held = _scores(sides[a], sequences, others)[0]
        result[a, b] = cost((right - left)[sampled], (right - held)[sampled], *set_flips(experts, others))
    return result


def cost(delta: Tensor, held: Tensor, flipped: int, total: int) -> Cost:
    """Of log π_other − log π of each token, both ways, and `set_flips`."""
    w = delta.exp()
    return Cost(
        mean=float(delta.abs().mean()),
        high=float(delta.abs().quantile(0.99)),
        max=float(delta.abs().max()),
        flips=flipped / total,
        held=float(held.abs().mean()),
        weight=float(w.sum() ** 2 / (len(w) * w.square().sum())),
    )


def _answers(
    model: PreTrainedModel, folder: Path, prompts: int, group: int, seed: int
) -> tuple[list[list[int]], Tensor, Tensor]:
    """Prompts with their answers, which of `_scores`' tokens are an answer's, and the log-probs of those."""
    tokenizer = load_tokenizer(folder)
    rows = load_rows("stories:heldout", limit=prompts)
    asked = make_source(rows, tokenizer, seed=seed, max_prompt_tokens=256).first(prompts)
    sampler = NativeSampler(model)
    sampler.load(checkpoint_tensors(model), version=0)
    params = SamplingParams(n=group, max_tokens=64, temperature=1.0, stop_token_ids=stop_token_ids(tokenizer, model))
    groups = sampler.sample([prompt.ids for prompt in asked], params, seeds=[prompt.seed for prompt in asked])
    pairs = [(list(p.ids), list(answer.ids)) for p, answers in zip(asked, groups, strict=True) for answer in answers]
    logprobs = [x for answers in groups for answer in answers for x in answer.logprobs]
    # `_scores` has one fewer than a sequence has tokens: none for the first.
    sampled = [in_answer for ids, answer in pairs for in_answer in [False] * (len(ids) - 1) + [True] * len(answer)]
    print(f"{len(pairs)} answers of {len(logprobs) / len(pairs):.0f} tokens", file=sys.stderr)
    return [ids + answer for ids, answer in pairs], torch.tensor(sampled), torch.tensor(logprobs)


@torch.no_grad()
def _scores(
    model: PreTrainedModel, sequences: list[list[int]], chosen_LTK: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probs of all tokens but the sequences' first, and the experts taken; with chosen_LTK, those."""
    given = nullcontext() if chosen_LTK is None else replayed(model, chosen_LTK)
    with given, recorded(model) as choices:
        scores = score_sequences(model, sequences)
    return torch.tensor([score for row in scores for score in row]), choices.chosen_LTK


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fp8_cost", description=__doc__)
    parser.add_argument("--model", type=Path, help="checkpoint of a DeepSeek-V3; unset: the tiny one, warmed up")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--group", type=int, default=4, help="answers a prompt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.model is None:
        from recipes.tiny import tiny_checkpoint

        args.model = tiny_checkpoint()
    print(f"{setting(args.threads, 'torch', 'transformers')}\n")
    rows = [
        [a, b, f"{c.mean:.1e}", f"{c.high:.1e}", f"{c.max:.2g}", f"{c.flips:.2%}", f"{c.held:.1e}", f"{c.weight:.2%}"]
        for (a, b), c in costs(args.model, prompts=args.prompts, group=args.group, seed=args.seed).items()
    ]
    print(table(HEADER, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
