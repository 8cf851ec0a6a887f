"""Prompt ids in, groups of sampled completions out: the one interface every sampler implements.

Tokens, never text: a completion carries, from birth, its ids, the log-probability the sampler gave each of them,
why it ended, and the version of the weights that produced it. Text is made later, for rewards and for people.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import torch

FinishReason = Literal["stop", "length"]

# Checkpoint-named tensors, as `save_pretrained` would write them: what crosses from the trainer to a sampler.
Weights = Iterable[tuple[str, torch.Tensor]]

# Checkpoint name -> fingerprint of a tensor's bits (sampling/attest.py).
Fingerprints = dict[str, int]


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to sample. Only what the trainer can correct for exactly: plain temperature sampling.

    Log-probabilities are those of the distribution sampled from, log softmax(logits / temperature).
    """

    n: int
    """Completions per prompt (G)."""
    max_tokens: int
    """Most new tokens per completion; one that reaches it without a stop token ends with reason "length"."""
    temperature: float = 1.0
    """Softmax temperature; 0 is greedy, whose log-probs are those at temperature 1."""
    stop_token_ids: tuple[int, ...] = ()
    """A completion ends with (and includes) the first of these it samples."""
    record_experts: bool = False
    """Return which experts each token was sent to; a model without routers of ours has none to return."""
    speculate: bool = False
    """Let the MTP layer of a V3 draft every other token: another way to sample from the same distribution."""

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n={self.n}: sample at least one completion per prompt")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens}: allow at least one new token")
        if not self.temperature >= 0:
            raise ValueError(f"temperature={self.temperature}: use 0 (greedy) or a positive number")


def check_seeds(prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> None:
    """ValueError unless there is a seed for every prompt."""
    if len(seeds) != len(prompts):
        raise ValueError(f"seeds: {len(seeds)} for {len(prompts)} prompts; give one each")


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One sampled answer."""

    ids: list[int]
    """Sampled token ids, with the stop token if it came."""
    logprobs: list[float]
    """log π_sampler of each id, at the sampling temperature. Same length as ids."""
    finish_reason: FinishReason
    """"stop": a stop token came. "length": cut at max_tokens."""
    version: int
    """Version of the weights that sampled it."""
    experts: np.ndarray | None = field(default=None, compare=False, repr=False)  # arrays have no plain ==
    """int16 (prompt + ids − 1, MoE layers, K): the experts of every token fed to the model, if recorded."""
    drafts: tuple[int, int] | None = field(default=None, compare=False)
    """How many of its tokens were drafted, and how many drafts were accepted; None: nothing drafted for it."""


class Sampler(Protocol):
    """Anything that can sample groups and hold a version of the policy's weights."""

    version: int
    """Version of the weights now held; -1 before the first load and after a failed one."""
    dtype: str
    """What it computes in: "float32", "bfloat16" or "float16", or "float8" where its linear layers do."""

    def load(self, weights: Weights, *, version: int) -> Fingerprints:
        """Take these weights and return fingerprints of what is now held, by checkpoint name.

        Whatever was cached from the old weights (prefix caches, packed copies) is dropped.
        """
        ...

    def sample(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, seeds: Sequence[int]
    ) -> list[list[Completion]]:
        """Sample `params.n` completions per prompt; one seed per prompt makes its group reproducible."""
        ...

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """log π(token_t | tokens before t) at temperature 1, for t = 1 .. len-1 of each sequence."""
        ...

    def close(self) -> None:
        """Free the engine."""
        ...
