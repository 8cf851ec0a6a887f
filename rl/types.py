"""What is handed over between the steps of the loop: Prompt -> Group -> Batch.

Suffixes of tensors: T packed tokens of a batch, C trained tokens (of completions), N completions, L MoE layers,
K experts per token.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from runtime.packed import Packed
from sampling.protocol import Completion


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One problem, ready to be sampled."""

    index: int
    """Its row in the data."""
    epoch: int
    """Which pass over the data this is."""
    seed: int
    """Decides its group's samples: a pure function of the run's seed, the step and the place in the step."""
    content: str | list[dict[str, str]]
    """What the row's `prompt` column held: text, or messages."""
    ids: list[int]
    """Token ids the policy continues."""
    columns: dict[str, Any]
    """The row's other columns (the gold in `answer`), passed to rewards by name."""


@dataclass(kw_only=True)
class Group:
    """The completions of one prompt and what became of them."""

    prompt: Prompt
    completions: list[Completion]
    texts: list[str]
    """Decoded completions, without special tokens."""
    parts: dict[str, list[float]] = field(default_factory=dict)
    """Reward name -> one value per completion; NaN = unknown."""
    rewards: list[float] = field(default_factory=list)
    """Weighted sum of the parts; NaN = unknown."""
    advantages: list[float] = field(default_factory=list)
    """One per completion; NaN = left out of the update."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """All that a step samples, scored: what it trains on, and what led there."""

    groups: list[Group]
    """To be trained on, of this process."""
    spare: list[Group]
    """Sampled and not trained on: groups without signal that dynamic sampling replaced."""
    cursor: int
    """Where the data goes on behind this step."""
    metrics: dict[str, float]
    """What only those who sampled and scored could know, over all processes."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What the update needs of one completion."""

    ids: list[int]
    """At least one token."""
    logprobs: list[float]
    """log π_sampler of each."""
    advantage: float
    experts: np.ndarray | None = None
    """(prompt + ids − 1, MoE layers, K): experts of every token the sampler was fed, if recorded."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Completions that share a prompt."""

    prompt: list[int]
    samples: list[Sample]

    @property
    def tokens(self) -> int:
        """Tokens of a forward pass: the prompt once, and each completion without its last token, which predicts
        nothing."""
        return len(self.prompt) + sum(len(sample.ids) - 1 for sample in self.samples)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Families packed for a forward and backward pass; nothing is padded, and a prompt is computed once."""

    packed: Packed
    """T tokens: each prompt, and after it its completions, every one continuing it."""
    states_C: Tensor
    """For each trained token, which of the T tokens predicts it."""
    targets_C: Tensor
    """Trained token ids, completions end to end."""
    sequence_C: Tensor
    """Which of the batch's N completions a trained token belongs to."""
    sampler_logprobs_C: Tensor
    """log π_sampler of the trained tokens."""
    advantages_N: Tensor
    """(N,) fp32."""
    lengths_N: Tensor
    """(N,) trained tokens of each completion."""
    experts_LTK: Tensor | None = None
    """Experts the sampler chose for each of the T tokens in each MoE layer; −1: not recorded."""
