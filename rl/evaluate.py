"""A sampler and held-out problems -> pass@1 and pass@k with confidence intervals."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from rl.rollout import rollout, score
from rl.score import Scorer
from rl.types import Group, Prompt
from runtime.statistics import pass_at_k, wilson
from sampling.protocol import Sampler, SamplingParams

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over problems with its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How a policy does on a set of problems."""

    problems: int
    """Problems with at least one graded completion."""
    unknown: int
    """Completions no one could grade; they count neither way."""
    pass_at: dict[int, Estimate]
    """k -> probability that at least one of k samples is right (Chen et al. 2021, eq. 1)."""
    format: float
    """Share of completions in the right format."""
    mean_length: float
    """Tokens per completion."""
    thinking: float
    """Share of completions with something between their think tags."""
    truncated: float
    """Share of completions cut at the length limit."""
    groups: list[Group]
    """Every problem with its completions."""

    @property
    def accuracy(self) -> Estimate:
        """pass@1."""
        return self.pass_at[1]


def evaluate(
    sampler: Sampler,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    tokenizer: PreTrainedTokenizerBase,
    scorer: Scorer,
    *,
    k: Sequence[int] = (1,),
) -> Evaluation:
    """Sample `params.n` completions per problem and grade them with the scorer's `accuracy` and `format`.

    The interval is Wilson's with one observation per problem, whatever n: conservative for n > 1.
    """
    groups = rollout(sampler, prompts, params, tokenizer)
    score(groups, scorer)
    graded = [[r for r in group.parts["accuracy"] if not np.isnan(r)] for group in groups]
    unknown = sum(len(group.completions) for group in groups) - sum(map(len, graded))
    graded = [rewards for rewards in graded if rewards]
    if not graded:
        log.warning("no completion could be graded: the problems' answers are unusable, or the grader failed")
    pass_at = {}
    for size in sorted({1, *k}):
        chances = [pass_at_k(len(r), int(sum(r)), size) for r in graded if len(r) >= size]
        mean = float(np.mean(chances)) if chances else float("nan")
        low, high = wilson(mean, len(chances)) if chances else (float("nan"), float("nan"))
        pass_at[size] = Estimate(mean=mean, low=low, high=high)
    return Evaluation(
        problems=len(graded),
        unknown=unknown,
        pass_at=pass_at,
        format=_mean([r for group in groups for r in group.parts["format"] if not np.isnan(r)]),
        mean_length=_mean([len(c.ids) for group in groups for c in group.completions]),
        thinking=_mean([float(thinks(text)) for group in groups for text in group.texts]),
        truncated=_mean([c.finish_reason == "length" for group in groups for c in group.completions]),
        groups=groups,
    )


def thinks(text: str) -> bool:
    """Whether a completion shows its work: something stands between <think> and </think> (or the end)."""
    _, opened, rest = text.partition("<think>")
    return bool(opened) and bool(rest.partition("</think>")[0].strip())


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")
