"""A trainee on held-out data: its loss on each source, how many problems it gets right, and what it said to each."""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from rewards import resolve
from runtime.rows import load_rows
from runtime.statistics import wilson
from runtime.weights import checkpoint_tensors
from sampling.native import NativeSampler
from sampling.protocol import Completion, SamplingParams
from sft.batch import Batch
from sft.chat import encode_prompt, is_conversational

EVALUATION_SEED = 0x5EED
"""The same samples at every evaluation: what changes is the model."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A held-out problem and what the model said."""

    question: str
    gold: str
    text: str
    completion: Completion
    grades: Mapping[str, float | None]
    """By each reward; None where it could not tell."""


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """How many problems were answered right, sampled once each at temperature 1."""

    mean: float
    low: float
    high: float
    """95 % interval (Wilson)."""
    format: float
    """Share in the right layout."""
    problems: int
    """Problems that could be graded."""
    samples: tuple[Sample, ...]
    """Every problem with its answer."""


@torch.no_grad()
def source_losses(
    passes: Mapping[str, Iterable[tuple[Batch, float]]],
    logprobs: Callable[[Batch], torch.Tensor],
    total: Callable[[torch.Tensor], torch.Tensor],
) -> dict[str, float]:
    """Mean loss of a trained token for each source, and over all of them.

    passes: source -> its batches with 1, or 0 for one that only keeps processes in step. total: sum over processes.
    """
    losses: dict[str, float] = {}
    everything = torch.zeros(2, dtype=torch.float64)
    for source, batches in passes.items():
        sums = torch.zeros(2, dtype=torch.float64)
        for batch, weight in batches:
            logp = logprobs(batch)
            sums += weight * torch.tensor([-float(logp.double().sum()), len(logp)], dtype=torch.float64)
        sums = total(sums).cpu()
        everything += sums
        losses[f"eval/{source}/loss"] = float(sums[0] / sums[1]) if sums[1] else math.nan
    if everything[1]:
        losses["eval/loss"] = float(everything[0] / everything[1])
    return losses


def sampled_accuracy(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    problems: str,
    *,
    samples: int,
    max_tokens: int,
    rewards: Sequence[str] = ("accuracy", "format"),
) -> Accuracy:
    """Sample one completion for each of the first `samples` problems and grade it with our rewards."""
    rows = load_rows(problems, limit=samples)
    plain: Any = copy.deepcopy(model) if hasattr(model, "peft_config") else model
    sampler = NativeSampler(plain if plain is model else plain.merge_and_unload())
    sampler.load(checkpoint_tensors(model), version=0)
    params = SamplingParams(n=1, max_tokens=max_tokens, stop_token_ids=(tokenizer.eos_token_id,))
    prompts = [encode_prompt(tokenizer, row["prompt"]) for row in rows]
    groups = sampler.sample(prompts, params, seeds=[EVALUATION_SEED + i for i in range(len(prompts))])
    sampler.close()
    texts = [str(tokenizer.decode(group[0].ids, skip_special_tokens=True)) for group in groups]
    columns = {"prompts": [row["prompt"] for row in rows], "answer": [row["answer"] for row in rows]}
    scores = {name: resolve(name)(completions=texts, completion_ids=None, **columns) for name in rewards}
    graded = [value for value in scores["accuracy"] if value is not None]
    mean = sum(graded) / len(graded) if graded else math.nan
    low, high = wilson(mean, len(graded)) if graded else (math.nan, math.nan)
    layout = [value for value in scores["format"] if value is not None]
    sampled = tuple(
        Sample(
            question=_question(row["prompt"]),
            gold=str(row["answer"]),
            text=texts[i],
            completion=groups[i][0],
            grades={name: values[i] for name, values in scores.items()},
        )
        for i, row in enumerate(rows)
    )
    return Accuracy(
        mean=mean, low=low, high=high, format=sum(layout) / max(len(layout), 1), problems=len(graded), samples=sampled
    )  # fmt: skip


def held_out_rows(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Samples as `runtime.held_out` writes them."""
    return [
        {
            "group": i,
            "sample": 0,
            "prompt_text": sample.question,
            "completion_text": sample.text,
            "completion_ids": sample.completion.ids,
            "logprobs": sample.completion.logprobs,
            "finish_reason": sample.completion.finish_reason,
            "answer": sample.gold,
            **{f"rewards/{name}": grade for name, grade in sample.grades.items()},
        }
        for i, sample in enumerate(samples)
    ]


def _question(prompt: object) -> str:
    return str(prompt[-1]["content"]) if is_conversational(prompt) else str(prompt)  # type: ignore[arg-type, index]
