"""What is handed over between the steps of the loop: Prompt -> Group -> Batch.

Suffixes of tensors: T packed tokens of a batch (prompts and completions), N completions, P prompts, G group size.
"""

from dataclasses import dataclass, field
from typing import Any

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
class Batch:
    """Completions packed for the update, each behind its prompt; nothing is padded."""

    packed: Packed
    loss_mask_T: Tensor
    """True = trained: completion tokens of completions that are not left out."""
    sequence_T: Tensor
    """Which of the batch's completions a token belongs to."""
    advantages_N: Tensor
    """(N,) fp32."""
    lengths_N: Tensor
    """(N,) trained tokens per completion."""
    sampler_logprobs_T: Tensor
    """log π_sampler of trained tokens, 0 elsewhere."""
