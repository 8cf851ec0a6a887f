"""Weights handed to a sampler -> proof that it samples from exactly these, or an error naming what differs.

Three independent checks close every sync, so that stale, dropped, transposed or half-loaded weights cannot
train a single step:

1. Fingerprints. What the sampler received (or holds) is compared, tensor by tensor and bit by bit, with a
   second, independent export of the trainer's weights: one changed bit is found and its tensor named.
2. The prefix cache. A canary prompt that was cached before the sync must not be served from the cache after.
3. The canary. The sampler scores fixed token sequences and must agree with the trainer's log-probs. This sees
   what fingerprints cannot: a fault after the weights arrived (packing, a model object that was never
   replaced, another formula). It is only as sharp as the sampler's precision: see `Canary`.

Leaves out: moving weights between processes and merging adapters (the trainer's `weights_factory` yields what
a checkpoint would hold).
"""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from sampling.fingerprint import fingerprint
from sampling.protocol import Fingerprints, Sampler, Weights

NAMED = 8
"""How many differing tensors an error spells out."""


class WeightsMismatch(RuntimeError):
    """The sampler does not hold the trainer's weights. `received`: fingerprints of what arrived, if known."""

    def __init__(self, message: str, *, received: Fingerprints | None = None) -> None:
        super().__init__(message)
        self.received = received


class DivergedPolicy(ValueError):
    """The trainer's own weights hold NaN: there is nothing to sample from."""


@runtime_checkable
class PrefixCaching(Protocol):
    """A sampler with a prefix cache, which shows how much of a prompt it would serve from it."""

    def cached_prompt_tokens(self, prompt: Sequence[int]) -> int:
        """Run `prompt`, leave it in the cache, and return how many of its tokens came from the cache."""
        ...


FLIPPED = 1.0
"""Nats a token counts for at most in the canary's mean: in bf16 its experts can flip on a near-tie and move it by
several, which says nothing about the weights. A fault moves many."""


@dataclass(frozen=True, kw_only=True)
class Canary:
    """Fixed token sequences both sides score, and how far their log-probs may lie apart.

    Make one with `make_canary`, whose tolerances depend on the coarser of the two precisions. Measured with a
    tiny DeepSeek-V3 of std-0.08 weights, the trainer in float32, on a CPU:

    | sampler       | mean abs Δlogp | max abs Δlogp |
    |---------------|----------------|---------------|
    | vLLM float32  | 7e-7           | 4e-6          |
    | vLLM bfloat16 | 0.013          | 0.4           |
    | native float8 | 0.11           | 0.6           |

    What a fault moves there: one tensor of another seed 0.06 (a norm), 0.15 to 0.25 (router, experts), 0.5 to
    1.0 (attention, embeddings), all that float8 can tell; a zeroed router bias 0.03, only float32. One
    optimizer step on one tensor is below either: that is what fingerprints are for.
    """

    sequences: tuple[tuple[int, ...], ...]
    mean_tolerance: float
    """Largest mean |Δlogp| over all canary tokens, each counted up to FLIPPED, nats: the working check."""
    max_tolerance: float
    """Largest single |Δlogp|, nats: wide, because one token's expert choice can flip on a near-tie."""

    def __post_init__(self) -> None:
        if not self.sequences or min(len(s) for s in self.sequences) < 2:
            raise ValueError("sequences: a canary needs at least one sequence, each of two tokens or more")


@dataclass(frozen=True, kw_only=True)
class SyncReport:
    """What a completed sync moved, and how well both sides agree."""

    version: int
    seconds: float
    canary_mean: float
    """Mean |Δlogp| between sampler and trainer on the canary, nats."""
    canary_max: float
    tensors: int
    bytes: int
    fingerprints: Fingerprints
    """Of this version. With this report the next `sync` can tell a stale tensor from a wrong one."""


def make_canary(
    vocab_size: int,
    *,
    text: Sequence[int] = (),
    dtype: str = "bfloat16",
    sequences: int = 4,
    length: int = 128,
    seed: int = 0,
) -> Canary:
    """Sequences of tokens like those the policy will meet, or without `text` uniformly random ones.

    text: token ids, say of a run's first prompts end to end; cut into sequences, repeated if there are too few. On
        random tokens a trained model's logits are wild and its bfloat16 rounding many times what it is on text.
    dtype: the coarser precision of trainer and sampler ("float32", "bfloat16", "float16" or "float8").
    length: below the sampler's max_model_len, and more than two blocks of its prefix cache (16 or 32 tokens).
    """
    tolerances = {"float32": (2e-3, 0.5), "bfloat16": (0.05, 8.0), "float16": (0.05, 8.0), "float8": (0.25, 8.0)}
    if dtype not in tolerances:
        raise ValueError(f"dtype={dtype!r}: tolerances are known for {', '.join(tolerances)}")
    if text:
        stream = itertools.islice(itertools.cycle(text), sequences * length)
        ids = [list(itertools.islice(stream, length)) for _ in range(sequences)]
    else:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(vocab_size, (sequences, length), generator=generator).tolist()
    mean, largest = tolerances[dtype]
    return Canary(sequences=tuple(map(tuple, ids)), mean_tolerance=mean, max_tolerance=largest)


def sync(
    sampler: Sampler,
    weights_factory: Callable[[], Weights],
    *,
    version: int,
    canary: Canary,
    score_trainer: Callable[[Sequence[Sequence[int]]], list[list[float]]],
    previous: SyncReport | None = None,
) -> SyncReport:
    """Load the trainer's weights into `sampler` and prove it, or leave the sampler refusing to sample.

    weights_factory: called twice or more, each time a fresh export of the same weights (to send, to compare).
    score_trainer: the trainer's log-probs at temperature 1, as `Sampler.score`.
    Raises WeightsMismatch with the names of what differs; `sampler.version` is then -1.
    """
    began = time.perf_counter()
    probe = list(canary.sequences[0])
    if isinstance(sampler, PrefixCaching) and sampler.version >= 0:
        sampler.cached_prompt_tokens(probe)  # now in the cache: a cache that outlives the sync will show
    try:
        held = _load(sampler, weights_factory, version=version)
        ours, size = _compare(weights_factory(), held, previous=previous)
        # Before scoring, which fills the cache itself.
        if isinstance(sampler, PrefixCaching) and (cached := sampler.cached_prompt_tokens(probe)):
            raise WeightsMismatch(
                f"prefix cache: {cached} tokens of the canary prompt still come from keys and values of the "
                "old weights; reset the prefix cache when loading"
            )
        mean, largest = _check_canary(sampler.score(canary.sequences), score_trainer(canary.sequences), canary)
    except BaseException:
        sampler.version = -1
        raise
    return SyncReport(
        version=version,
        seconds=time.perf_counter() - began,
        canary_mean=mean,
        canary_max=largest,
        tensors=len(ours),
        bytes=size,
        fingerprints=ours,
    )


def _load(sampler: Sampler, weights_factory: Callable[[], Weights], *, version: int) -> Fingerprints:
    try:
        return sampler.load(weights_factory(), version=version)
    except WeightsMismatch as error:
        # A sampler names its own parameters; the checkpoint names that never arrived say more.
        lost = sorted({name for name, _ in weights_factory()} - set(error.received or {}))
        if error.received is None or not lost:
            raise
        raise WeightsMismatch(f"{error}; never received: {_listed(lost)}", received=error.received) from error


def _compare(weights: Weights, held: Fingerprints, *, previous: SyncReport | None) -> tuple[Fingerprints, int]:
    """The trainer's own fingerprints and their tensors' total bytes, if `held` equals them."""
    ours: Fingerprints = {}
    faults: list[str] = []
    size = 0
    for name, tensor in weights:
        ours[name] = fingerprint(tensor)
        size += tensor.numel() * tensor.element_size()
        if held.get(name) != ours[name]:
            faults.append(f"{name} {list(tensor.shape)} {_fault(name, tensor, held, previous)}")
    faults += [f"{name} is held by the sampler but is not the trainer's" for name in held if name not in ours]
    if faults:
        raise WeightsMismatch(f"{len(faults)} of {len(ours)} tensors differ: {_listed(faults)}", received=held)
    return ours, size


def _fault(name: str, tensor: torch.Tensor, held: Fingerprints, previous: SyncReport | None) -> str:
    if name not in held:
        return "is missing from the sampler"
    if previous is not None and previous.fingerprints.get(name) == held[name]:
        return f"is still version {previous.version}'s"
    if tensor.ndim == 2 and fingerprint(tensor.T) == held[name]:
        return "is transposed"
    return "differs (values, shape or dtype)"


def _check_canary(theirs: list[list[float]], ours: list[list[float]], canary: Canary) -> tuple[float, float]:
    """Mean (each up to FLIPPED) and largest |Δlogp|, if within the canary's tolerance."""
    expected = [len(sequence) - 1 for sequence in canary.sequences]
    for who, scores in (("sampler", theirs), ("trainer", ours)):
        if (lengths := [len(row) for row in scores]) != expected:
            raise ValueError(f"canary: the {who} scored {lengths} tokens of its sequences, not {expected}")
    gaps = [abs(a - b) for left, right in zip(theirs, ours, strict=True) for a, b in zip(left, right, strict=True)]
    # A NaN stays one: min gives its first argument unless the second is smaller.
    mean, largest = math.fsum(min(gap, FLIPPED) for gap in gaps) / len(gaps), max(gaps)
    if not (mean <= canary.mean_tolerance and largest <= canary.max_tolerance):  # a NaN fails too
        raise WeightsMismatch(
            f"canary: every tensor arrived, yet sampler and trainer log-probs lie mean {mean:.3g}, max "
            f"{largest:.3g} apart (allowed {canary.mean_tolerance:g}, {canary.max_tolerance:g}): the fault "
            "is after loading (packed copies, a model not replaced, a formula or setting that differs)"
        )
    return mean, largest


def _listed(items: Sequence[str]) -> str:
    rest = f"; and {len(items) - NAMED} more" if len(items) > NAMED else ""
    return "; ".join(items[:NAMED]) + rest
