"""Pass rates -> which prompts are worth their turn. Those nearly always or nearly never solved mostly wait.

A group teaches something unless all of its completions are alike: with pass rate p and G completions, with chance
1 − p^G − (1 − p)^G. A prompt whose turn comes is taken with that chance, by a draw that only depends on the run's seed
and the turn, so a resumed run takes the same ones.
"""

import math
from collections.abc import Sequence
from typing import Any

from rl.config import CurriculumConfig
from rl.types import Group
from runtime.distributed import World
from runtime.rows import Row


class Curriculum:
    """What is known of each row's pass rate, from the data and from this run."""

    def __init__(self, config: CurriculumConfig, *, group_size: int) -> None:
        self.config, self.group_size = config, group_size
        self.seen: dict[int, tuple[float, float]] = {}
        """Row -> (passes, completions) of this run."""

    def chance(self, index: int, row: Row) -> float:
        """Of being taken; 1 for a row nothing is known of, and for every row without a curriculum."""
        passes, tries = self.seen.get(index, (0.0, 0.0))
        prior = row.get(self.config.column)
        if isinstance(prior, int | float) and not isinstance(prior, bool) and 0 <= prior <= 1:
            passes, tries = passes + prior * self.config.column_weight, tries + self.config.column_weight
        if self.config.reward is None or tries == 0:
            return 1.0
        p = (passes + 0.5) / (tries + 1)  # never quite 0 or 1: a few failures don't prove that it can't be solved
        return max(self.config.floor, 1 - p**self.group_size - (1 - p) ** self.group_size)

    def observe(self, groups: Sequence[Group], world: World) -> None:
        """Count what this step's completions passed, in every process alike. Unknown ones count as not tried."""
        if self.config.reward is None:
            return
        own = [(group.prompt.index, _known(group, self.config.reward)) for group in groups]
        for index, values in world.gather(own):
            passes, tries = self.seen.get(index, (0.0, 0.0))
            self.seen[index] = (passes + math.fsum(values), tries + len(values))

    def state(self) -> list[list[float]]:
        """For a checkpoint."""
        return [[float(index), *counts] for index, counts in self.seen.items()]

    def load(self, state: Sequence[Sequence[Any]]) -> None:
        """What `state` gave."""
        self.seen = {int(index): (passes, tries) for index, passes, tries in state}


def _known(group: Group, reward: str) -> list[float]:
    return [min(max(value, 0.0), 1.0) for value in group.parts[reward] if not math.isnan(value)]
