"""Tokens a second of our native sampler with the MTP layer drafting and without, and the share of drafts accepted.

The tiny V3 is first trained as `python -m recipes.sft` does, with the MTP loss at V3's weight 0.3 from the first step;
that takes minutes, and `--keep FOLDER` keeps the model for another time. Both then answer the same held-out problems,
with stop tokens, at the temperatures of a rollout and of a greedy evaluation. Answers of one temperature above 0 differ
between them, so it is tokens a second that are compared.

Before anything is timed, greedy answers must be the same and log-probs those of the model on the finished text;
otherwise the exit code is 1. Both work in one process, taking turns: they are one library.
How much is to be gained hangs on what the layer costs beside the others: of the tiny model's two it is a half more, of
V3's 61 a sixtieth. `--layers` makes the model deeper. Left out: GPUs, and drafting engines other than ours.
"""

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

from benchmarks._common import ratio, setting, spread, table, timed
from deepseek_v3 import DeepseekV3ForCausalLM
from recipes.tiny import make_tokenizer, tiny_config, warm_up
from runtime.models import end_token_ids, load_causal_lm, load_tokenizer
from runtime.stories import stories
from runtime.weights import checkpoint_tensors, save_pretrained
from sampling.native import NativeSampler
from sampling.protocol import Completion, SamplingParams
from sft.chat import encode_prompt

MTP_LOSS = 0.3
TOLERANCE = 1e-4
"""Largest |Δ log-prob| of a sample and of the model on the finished text, nats."""
Groups = list[list[Completion]]


def trained(folder: Path, layers: int) -> Path:
    """The tiny model with an MTP layer, after SFT."""
    if (folder / "checkpoints/final/config.json").exists():
        return folder / "checkpoints/final"
    tokenizer = make_tokenizer()
    config = tiny_config(tokenizer)
    config.update(dict(num_nextn_predict_layers=1, num_hidden_layers=layers))
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as fresh:
        save_pretrained(Path(fresh), DeepseekV3ForCausalLM(config), tokenizer)
        warm_up(seed=0, run_dir=folder, model=fresh, mtp_loss=MTP_LOSS)
    return folder / "checkpoints/final"


def gap(sampler: NativeSampler, prompts: list[list[int]], groups: Groups) -> float:
    """Largest |Δ log-prob| of samples drawn at temperature 1."""
    answers = [(prompt, c) for prompt, group in zip(prompts, groups, strict=True) for c in group]
    scores = sampler.score([prompt + c.ids for prompt, c in answers])
    pairs = [(c.logprobs, row[len(p) - 1 :]) for (p, c), row in zip(answers, scores, strict=True)]
    return max(abs(a - b) for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speculate", description=__doc__)
    parser.add_argument("--layers", type=int, default=2, help="main layers of the model")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 256], help="sequences sampled together")
    parser.add_argument("--temperature", type=float, nargs="+", default=[1.0, 0.0])
    parser.add_argument("--tokens", type=int, default=64, help="most new tokens a sequence")
    parser.add_argument("--group", type=int, default=8, help="sequences a problem, where there are as many")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--keep", type=Path, help="folder of the trained model, made if it isn't there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as temporary:
        return compare(args, trained(args.keep or Path(temporary) / "run", args.layers))


def compare(args: argparse.Namespace, folder: Path) -> int:
    heading = setting(args.threads, "torch", "transformers")
    tokenizer, model = load_tokenizer(folder), load_causal_lm(folder)
    sampler = NativeSampler(model)
    sampler.load(checkpoint_tensors(model), version=0)
    stops = tuple(end_token_ids(folder, tokenizer))

    def answers(rows: int, temperature: float, seed: int, speculate: bool) -> tuple[list[list[int]], Groups, float]:
        """Prompts, what was sampled, and the seconds it took."""
        n = min(rows, args.group)
        problems = stories(rows // n, split="heldout", seed=seed)
        prompts = [encode_prompt(tokenizer, problem["prompt"]) for problem in problems]
        params = SamplingParams(
            n=n, max_tokens=args.tokens, temperature=temperature, stop_token_ids=stops, speculate=speculate
        )
        seeds = [seed * 10_000 + i for i in range(len(prompts))]
        seconds, groups = timed(partial(sampler.sample, prompts, params, seeds=seeds))
        return prompts, groups, seconds

    most = max(args.rows)
    ids = [[c.ids for group in answers(most, 0.0, 0, speculate)[1] for c in group] for speculate in (True, False)]
    differing = sum(a != b for a, b in zip(*ids, strict=True))
    prompts, groups, _ = answers(most, 1.0, 0, True)
    largest = gap(sampler, prompts, groups)
    print(f"greedy answers that differ: {differing}; log-probs differ by up to {largest:.1e} (≤ {TOLERANCE:g})")
    if differing or not largest <= TOLERANCE:
        return 1

    lines = []
    for temperature in args.temperature:
        for rows in args.rows:
            speeds: dict[bool, list[float]] = {True: [], False: []}
            drafts = torch.zeros(2, dtype=torch.long)
            for r in range(-1, args.rounds):
                for speculate in (True, False) if r % 2 else (False, True):
                    _, groups, seconds = answers(rows, temperature, r + 1, speculate)
                    completions = [c for group in groups for c in group]
                    if r >= 0:  # the first is the warm-up
                        speeds[speculate].append(sum(len(c.ids) for c in completions) / seconds)
                        drafts += torch.tensor([c.drafts or (0, 0) for c in completions]).sum(0)
            share = float(drafts[1]) / max(int(drafts[0]), 1)
            cells = [spread(speeds[speculate], ",.0f") for speculate in (True, False)]
            lines.append([f"{temperature:g}", str(rows), f"{share:.1%}", *cells, ratio(speeds[False], speeds[True])])
    print(f"\n{heading}  \ntiny with {args.layers} layers and the MTP layer, trained with mtp_loss={MTP_LOSS}\n")
    print(table(["temperature", "rows", "drafts accepted", "drafting", "plain", "drafting / plain"], lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
