"""Groups with advantages -> packed batches of at most so many tokens; unknown completions left out, nothing padded."""

import math
from collections.abc import Iterator, Sequence

import torch

from rl.types import Batch, Group
from runtime.packed import pack

Sample = tuple[list[int], list[int], list[float], float]
"""Prompt ids, completion ids, their sampler log-probs, and the advantage."""


def trainable(groups: Sequence[Group], *, mask_truncated: bool) -> list[Sample]:
    """The completions an update learns from. Unknown ones (NaN advantage) are not among them.

    With `mask_truncated` neither are those cut at the length limit, though they stay in their group's mean and in
    the loss's number of completions, as TRL counts them.
    """
    samples = []
    for group in groups:
        for completion, advantage in zip(group.completions, group.advantages, strict=True):
            if math.isnan(advantage) or (mask_truncated and completion.finish_reason == "length"):
                continue
            samples.append((group.prompt.ids, completion.ids, completion.logprobs, advantage))
    return samples


def count_known(groups: Sequence[Group]) -> int:
    """Completions with a known reward: the n of the loss."""
    return sum(not math.isnan(a) for group in groups for a in group.advantages)


def batches(samples: Sequence[Sample], *, max_tokens: int, device: torch.device | str = "cpu") -> Iterator[Batch]:
    """Pack samples in order into batches of at most `max_tokens` tokens (a longer sample gets its own)."""
    taken: list[Sample] = []
    tokens = 0
    for sample in samples:
        size = len(sample[0]) + len(sample[1])
        if taken and tokens + size > max_tokens:
            yield make_batch(taken, device)
            taken, tokens = [], 0
        taken.append(sample)
        tokens += size
    if taken:
        yield make_batch(taken, device)


def make_batch(samples: Sequence[Sample], device: torch.device | str = "cpu") -> Batch:
    """Samples end to end, each completion behind its own prompt."""
    mask: list[bool] = []
    sequence: list[int] = []
    sampler_logprobs: list[float] = []
    for n, (prompt, ids, logprobs, _) in enumerate(samples):
        mask += [False] * len(prompt) + [True] * len(ids)
        sequence += [n] * (len(prompt) + len(ids))
        sampler_logprobs += [0.0] * len(prompt) + logprobs
    return Batch(
        packed=pack([prompt + ids for prompt, ids, _, _ in samples], device),
        loss_mask_T=torch.tensor(mask, device=device),
        sequence_T=torch.tensor(sequence, device=device),
        advantages_N=torch.tensor([a for *_, a in samples], dtype=torch.float32, device=device),
        lengths_N=torch.tensor([len(ids) for _, ids, _, _ in samples], device=device),
        sampler_logprobs_T=torch.tensor(sampler_logprobs, dtype=torch.float32, device=device),
    )
