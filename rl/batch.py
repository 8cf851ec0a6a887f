"""Groups with advantages -> packed batches of at most so many tokens, each prompt in them once; nothing padded.

Unknown completions (NaN advantage) and empty ones have nothing to train on and are left out.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from rl.types import Batch, Family, Group, Sample
from runtime.packed import pack


def trainable(groups: Sequence[Group], *, mask_truncated: bool) -> list[Family]:
    """The completions an update learns from, by prompt, shortest first: completions of one length run together.

    With `mask_truncated` those cut at the length limit are not among them, though they stay in their group's mean and
    in the loss's number of completions, as TRL counts them.
    """
    families = []
    for group in groups:
        samples = [
            Sample(ids=c.ids, logprobs=c.logprobs, advantage=advantage, experts=c.experts)
            for c, advantage in zip(group.completions, group.advantages, strict=True)
            if c.ids and not math.isnan(advantage) and not (mask_truncated and c.finish_reason == "length")
        ]
        if samples:
            families.append(Family(prompt=group.prompt.ids, samples=sorted(samples, key=lambda s: len(s.ids))))
    return families


def count_known(groups: Sequence[Group]) -> int:
    """Completions with a known reward: the n of the loss."""
    return sum(not math.isnan(a) for group in groups for a in group.advantages)


def count_tokens(families: Sequence[Family]) -> int:
    """Trained tokens."""
    return sum(len(sample.ids) for family in families for sample in family.samples)


def batches(
    families: Sequence[Family], *, max_tokens: int, share: bool = True, device: torch.device | str = "cpu"
) -> Iterator[Batch]:
    """Pack families in order into batches of at most `max_tokens` tokens; a family that is larger is divided, down to
    single completions, whatever their length. share=False: every completion behind a prompt of its own."""
    taken: list[Family] = []
    tokens = 0
    for family in families:
        for part in _parts(family, max_tokens if share else 0):
            if taken and tokens + part.tokens > max_tokens:
                yield make_batch(taken, device)
                taken, tokens = [], 0
            taken.append(part)
            tokens += part.tokens
    if taken:
        yield make_batch(taken, device)


def _parts(family: Family, max_tokens: int) -> Iterator[Family]:
    """The family in parts of at most `max_tokens` tokens and at least one completion."""
    part = replace(family, samples=[])
    for sample in family.samples:
        if part.samples and part.tokens + len(sample.ids) - 1 > max_tokens:
            yield part
            part = replace(family, samples=[])
        part.samples.append(sample)
    yield part


def make_batch(families: Sequence[Family], device: torch.device | str = "cpu") -> Batch:
    """Families end to end: prompt, then its completions without their last tokens."""
    segments: list[list[int]] = []
    parents: list[int] = []
    states: list[int] = []
    experts: list[np.ndarray] = []
    start = 0
    for family in families:
        prompt = len(segments)
        segments.append(family.prompt)
        parents.append(-1)
        if family.samples[0].experts is not None:
            experts.append(family.samples[0].experts[: len(family.prompt)])
        start += len(family.prompt)
        last = start - 1  # the prompt's last token predicts the first of every completion
        for sample in family.samples:
            fed = len(sample.ids) - 1
            states += [last, *range(start, start + fed)]
            start += fed
            if fed:
                segments.append(sample.ids[:-1])
                parents.append(prompt)
            if sample.experts is not None:
                experts.append(sample.experts[len(family.prompt) :])
    samples = [sample for family in families for sample in family.samples]
    lengths_N = torch.tensor([len(sample.ids) for sample in samples], device=device)
    return Batch(
        packed=pack(segments, device, parents=parents),
        states_C=torch.tensor(states, device=device),
        targets_C=torch.tensor([i for sample in samples for i in sample.ids], device=device),
        sequence_C=torch.arange(len(samples), device=device).repeat_interleave(lengths_N),
        sampler_logprobs_C=torch.tensor([p for sample in samples for p in sample.logprobs], device=device),
        advantages_N=torch.tensor([sample.advantage for sample in samples], dtype=torch.float32, device=device),
        lengths_N=lengths_N,
        experts_LTK=_experts(experts, start, device),
    )


def _experts(parts: Sequence[np.ndarray], tokens: int, device: torch.device | str) -> torch.Tensor | None:
    if not parts:
        return None
    experts_TLK = np.concatenate(parts)
    if len(experts_TLK) != tokens:
        raise ValueError(
            f"experts are recorded for {len(experts_TLK)} of {tokens} tokens: record all completions or none"
        )
    return torch.from_numpy(experts_TLK.astype(np.int64)).transpose(0, 1).to(device)
