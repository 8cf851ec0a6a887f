"""Prompts -> groups of sampled completions, and groups -> groups with rewards and advantages."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rewards.length import overlong_punishment
from rl.advantage import group_advantages
from rl.score import Scorer, Scores
from rl.types import Group, Prompt
from sampling.protocol import Sampler, SamplingParams
from sft.chat import is_conversational


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> tuple[int, ...]:
    """Every id that ends a completion: the tokenizer's and those the model's generation config adds."""
    declared = getattr(model.generation_config, "eos_token_id", None)
    extra = declared if isinstance(declared, list) else [declared]
    return tuple(sorted({i for i in [tokenizer.eos_token_id, *extra] if i is not None}))


def rollout(
    sampler: Sampler,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Group]:
    """Sample a group for each prompt and decode it for the rewards."""
    sampled = sampler.sample([p.ids for p in prompts], params, seeds=[p.seed for p in prompts])
    return [
        Group(
            prompt=prompt,
            completions=completions,
            texts=[tokenizer.decode(c.ids, skip_special_tokens=True) for c in completions],
        )
        for prompt, completions in zip(prompts, sampled, strict=True)
    ]


def score(groups: Sequence[Group], scorer: Scorer, *, step: int = 0) -> Scores:
    """Reward every completion, in place; unknown rewards are NaN. Columns reach rewards by name, as in TRL.

    step: what rewards see as `trainer_state.global_step`, the steps done so far.
    """
    names = {name for group in groups for name in group.prompt.columns}
    prompts: list[Any] = []
    completions: list[Any] = []
    completion_ids: list[list[int]] = []
    columns: dict[str, list[Any]] = {name: [] for name in sorted(names)}
    for group in groups:
        conversational = is_conversational(group.prompt.content)
        for completion, text in zip(group.completions, group.texts, strict=True):
            prompts.append(group.prompt.content)
            completions.append([{"role": "assistant", "content": text}] if conversational else text)
            completion_ids.append(completion.ids)
            for name, values in columns.items():
                values.append(group.prompt.columns.get(name))
    scores = scorer.score(prompts, completions, completion_ids, columns, step=step)
    start = 0
    for group in groups:
        own = slice(start, start := start + len(group.completions))
        group.parts = {name: values[own] for name, values in scores.parts.items()}
        group.rewards = scores.total[own]
    return scores


def set_advantages(groups: Sequence[Group], kind: str = "grpo") -> None:
    """Compare each group's rewards with each other, in place."""
    rewards_PG = torch.tensor([group.rewards for group in groups], dtype=torch.float64)
    advantages_PG = group_advantages(rewards_PG, kind)
    for group, advantages in zip(groups, advantages_PG.tolist(), strict=True):
        group.advantages = advantages


def punish_overlong(groups: Sequence[Group], *, max_tokens: int, buffer: int) -> None:
    """Add DAPO's punishment of long completions to the rewards, in place, as the part "overlong"."""
    for group in groups:
        lengths = [len(completion.ids) for completion in group.completions]
        part = [overlong_punishment(length, max_tokens=max_tokens, buffer=buffer) for length in lengths]
        group.parts["overlong"] = part
        group.rewards = [reward + punishment for reward, punishment in zip(group.rewards, part, strict=True)]


def teaches(group: Group) -> bool:
    """Whether any completion of a group with advantages is better than another."""
    return any(advantage != 0 and not math.isnan(advantage) for advantage in group.advantages)
