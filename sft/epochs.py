"""A mix and the lengths of its examples -> the packed rows of every step: a pure function of seed and cursor.

Rows of one epoch follow those of the epoch before without a break, so a step may hold rows of both.
"""

import functools
from collections.abc import Callable

import numpy as np

from sft.pack import Ints, Plan, plan_rows


class Epochs:
    """The rows of a run, in order."""

    def __init__(
        self,
        lengths: np.ndarray,
        *,
        epoch_examples: Callable[[int], Ints],
        epochs: int,
        row_length: int,
        seed: int,
    ) -> None:
        """lengths: tokens of each example. epoch_examples: those of an epoch, repeated where they count twice."""
        self._lengths, self._examples = lengths, epoch_examples
        self._row_length, self._seed = row_length, seed
        self.plan = functools.lru_cache(maxsize=2)(self._plan)
        """The rows of an epoch, as positions in that epoch's examples."""
        self.counts = [len(self.plan(epoch)) for epoch in range(epochs)]
        """Rows of each epoch."""

    def __len__(self) -> int:
        return sum(self.counts)

    def row(self, index: int) -> Ints:
        """The examples of a row of the run. Raises IndexError past the last epoch."""
        place = index
        for epoch, count in enumerate(self.counts):
            if place < count:
                return self._examples(epoch)[self.plan(epoch).row(place)]
            place -= count
        raise IndexError(f"row {index} of a run of {len(self)}")

    def epoch_at(self, row: int) -> float:
        """How many epochs are over before this row, with fractions."""
        for epoch, count in enumerate(self.counts):
            if row < count:
                return epoch + row / count
            row -= count
        return float(len(self.counts))

    @property
    def fill(self) -> float:
        """Share of the rows' room that holds tokens, in the first epoch."""
        return self.plan(0).fill

    def _plan(self, epoch: int) -> Plan:
        return plan_rows(self._lengths[self._examples(epoch)], self._row_length, seed=self._seed, epoch=epoch)
