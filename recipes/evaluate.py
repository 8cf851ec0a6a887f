"""`python -m recipes.evaluate`: pass@1 and pass@k with 95 % intervals, for any checkpoint on any problems.

python -m recipes.evaluate --model runs/NAME/checkpoints/final --data test.jsonl --samples 8 --k 1,4,8
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.text import Text

from recipes.cli import main
from recipes.grpo import show_samples, tiny_model
from rl.config import SamplingConfig
from rl.evaluate import Evaluation, evaluate
from rl.prompts import make_source
from rl.record import write_rollout
from rl.rollout import stop_token_ids
from rl.score import Scorer
from rl.types import Rollout
from runtime.distributed import World
from runtime.errors import UserError
from runtime.models import load_causal_lm, load_tokenizer
from runtime.packed import score_sequences
from runtime.rows import load_rows
from runtime.weights import checkpoint_tensors
from sampling.attest import make_canary, sync
from sampling.backend import CANARY_TOKENS, make_sampler
from sampling.protocol import SamplingParams


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """An evaluation."""

    model: str = "tiny"
    """Checkpoint folder or hub name of any causal LM; "tiny": the built-in V3 after its warm-up."""
    data: str = "stories:heldout"
    """Problems: a JSONL or Parquet file or a `datasets` name with prompt/answer or GSM8K's columns, or stories."""
    problems: int = 400
    """At most this many, from the start of the file."""
    samples: int = 1
    """Completions per problem. The papers take 4 to 64 for pass@1."""
    k: tuple[int, ...] = (1,)
    """Values of k in pass@k; none above `samples`."""
    seed: int = 0
    """Decides the samples."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How to sample."""
    output: str | None = None
    """Folder for evaluation.json and every completion (Parquet). Unset: only printed."""

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UserError(f"samples={self.samples}: sample at least one completion per problem")
        for k in self.k:
            if not 1 <= k <= self.samples:
                raise UserError(f"k={k}: pass@k needs at least k samples per problem, samples={self.samples}")


def run(config: EvaluateConfig) -> None:
    """Evaluate, print, and write what `config.output` asks for."""
    console = Console()
    path = str(tiny_model(Console(stderr=True))) if config.model == "tiny" else config.model
    evaluation = evaluate_checkpoint(path, config)
    show_samples("samples", evaluation, console)
    console.print()
    for k, estimate in evaluation.pass_at.items():
        console.print(Text(f"pass@{k:<4} {estimate}"))
    console.print(
        Text(
            f"{evaluation.problems} problems × {config.samples} samples, temperature {config.sampling.temperature:g}; "
            f"format {100 * evaluation.format:.1f} %, {evaluation.mean_length:.1f} tokens a completion, "
            f"{100 * evaluation.truncated:.1f} % cut at {config.sampling.max_tokens}, {evaluation.unknown} unknown"
        )
    )
    if config.output is not None:
        console.print(Text(f"written to {write(evaluation, config, Path(config.output))}"))


def evaluate_checkpoint(path: str, config: EvaluateConfig) -> Evaluation:
    """Load a checkpoint into an attested sampler and let it answer the problems."""
    model, tokenizer = load_causal_lm(path), load_tokenizer(path)
    rows = load_rows(config.data)
    source = make_source(rows, tokenizer, seed=config.seed, max_prompt_tokens=config.sampling.max_prompt_tokens)
    prompts = source.first(config.problems)
    sampling = config.sampling
    sampler = make_sampler(
        model,
        backend=sampling.backend,
        dtype=sampling.dtype,
        max_model_len=sampling.max_prompt_tokens + sampling.max_tokens,
        seed=config.seed,
    )
    text = [i for prompt in prompts[:16] for i in prompt.ids]
    canary = make_canary(model.config.vocab_size, text=text, dtype=sampler.dtype, length=CANARY_TOKENS)
    with Scorer({"accuracy": 1.0, "format": 0.0}) as scorer:
        try:
            sync(
                sampler,
                lambda: checkpoint_tensors(model),
                version=0,
                canary=canary,
                score_trainer=lambda sequences: score_sequences(model, sequences),
            )
            params = SamplingParams(
                n=config.samples,
                max_tokens=sampling.max_tokens,
                temperature=sampling.temperature,
                stop_token_ids=stop_token_ids(tokenizer, model),
            )
            return evaluate(sampler, prompts, params, tokenizer, scorer, k=config.k)
        finally:
            sampler.close()


def write(evaluation: Evaluation, config: EvaluateConfig, folder: Path) -> Path:
    """evaluation.json, and step-000000.parquet with every completion."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "model": config.model,
        "data": config.data,
        "problems": evaluation.problems,
        "samples": config.samples,
        "unknown": evaluation.unknown,
        "pass_at": {str(k): {"mean": e.mean, "low": e.low, "high": e.high} for k, e in evaluation.pass_at.items()},
        "format": evaluation.format,
        "mean_length": evaluation.mean_length,
        "truncated": evaluation.truncated,
    }
    (folder / "evaluation.json").write_text(json.dumps(content, indent=2) + "\n")
    for group in evaluation.groups:
        group.advantages = [float("nan")] * len(group.completions)
    rollout = Rollout(groups=evaluation.groups, spare=[], cursor=0, metrics={})
    write_rollout(folder, rollout, step=0, world=World())
    return folder


if __name__ == "__main__":
    sys.exit(main(EvaluateConfig, run, prog="python -m recipes.evaluate", description=__doc__))
