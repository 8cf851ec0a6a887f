"""Groups scored twice, then and now -> whose advantage flipped, which groups gained or lost signal, and by how much."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

from rl.rollout import teaches
from rl.types import Group


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A group as the run scored it and as it is scored now; the completions are the same."""

    step: int
    process: int
    number: int
    """Which of its process's groups it is."""
    used: bool
    """False: sampled, but not trained on."""
    old: Group
    new: Group
    unknown: list[list[str]]
    """For each completion, why rewards couldn't judge it now: "name: reason"."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """One completion, then and now."""

    pair: Pair
    sample: int

    @property
    def rewards(self) -> tuple[float, float]:
        """Old and new; NaN = unknown."""
        return self.pair.old.rewards[self.sample], self.pair.new.rewards[self.sample]

    @property
    def advantages(self) -> tuple[float, float]:
        """Old and new; NaN = unknown, left out of the update."""
        return self.pair.old.advantages[self.sample], self.pair.new.advantages[self.sample]

    @property
    def flipped(self) -> bool:
        """What was encouraged is discouraged, or the other way round."""
        old, new = self.advantages
        return old * new < 0

    @property
    def size(self) -> tuple[bool, float]:
        """How telling it is: flips first, then how far the advantage moved; unknown taught nothing, like 0."""
        old, new = (0.0 if math.isnan(advantage) else advantage for advantage in self.advantages)
        return self.flipped, abs(new - old)


def changes(pairs: Sequence[Pair]) -> Iterator[Change]:
    """Every completion of these groups."""
    return (Change(pair=pair, sample=i) for pair in pairs for i in range(len(pair.old.completions)))


@dataclass(frozen=True, kw_only=True)
class Tally:
    """Counts over completions and groups; they add up."""

    completions: int = 0
    known_old: int = 0
    known_new: int = 0
    sum_old: float = 0.0
    """Of the known rewards."""
    sum_new: float = 0.0
    changed: int = 0
    """Completions with another reward; unknown counts as one."""
    flipped: int = 0
    """Completions whose advantage changed sign."""
    groups: int = 0
    signal_old: int = 0
    """Groups with rewards that differ, so that they teach something."""
    signal_new: int = 0
    gained: int = 0
    """Groups that have signal only now."""
    lost: int = 0
    """Groups that had signal and have none now."""

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    @property
    def mean_old(self) -> float:
        """Mean known reward; NaN without any."""
        return self.sum_old / self.known_old if self.known_old else math.nan

    @property
    def mean_new(self) -> float:
        """Mean known reward; NaN without any."""
        return self.sum_new / self.known_new if self.known_new else math.nan


def tally(pairs: Sequence[Pair]) -> Tally:
    """Count these groups and their completions."""
    rewards = [change.rewards for change in changes(pairs)]
    known = [[reward for reward in side if not math.isnan(reward)] for side in zip(*rewards, strict=True)] or [[], []]
    signal = [(teaches(pair.old), teaches(pair.new)) for pair in pairs]
    return Tally(
        completions=len(rewards),
        known_old=len(known[0]),
        known_new=len(known[1]),
        sum_old=math.fsum(known[0]),
        sum_new=math.fsum(known[1]),
        changed=sum(old != new and not (math.isnan(old) and math.isnan(new)) for old, new in rewards),
        flipped=sum(change.flipped for change in changes(pairs)),
        groups=len(pairs),
        signal_old=sum(old for old, _ in signal),
        signal_new=sum(new for _, new in signal),
        gained=sum(new and not old for old, new in signal),
        lost=sum(old and not new for old, new in signal),
    )


def most_telling(candidates: Sequence[Change], count: int) -> list[Change]:
    """The largest changes, one a prompt, flips first; none that changed nothing."""
    best: dict[int, Change] = {}
    for change in sorted(candidates, key=lambda c: c.size, reverse=True):
        if change.size[1] > 0 and len(best) < count:
            best.setdefault(change.pair.old.prompt.index, change)
    return list(best.values())
