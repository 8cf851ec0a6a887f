"""Rows of examples -> what one forward and backward pass takes.

Shapes: T tokens of the pass, C trained targets, M of them with two tokens of their example before them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple, Protocol

import numpy as np
import torch

from deepseek_v3.packing import Layout
from runtime.packed import Packed, Targets

Example = tuple[np.ndarray, np.ndarray]
"""Token ids and, of the same length, which of them are trained."""


class Examples(Protocol):
    """Something that gives an example by its number: sft/store.py's `Store`, or a list."""

    def __getitem__(self, index: int, /) -> Example:
        """Ids and mask of one example."""


class Sizes(NamedTuple):
    """What losses divide by, over all passes and processes."""

    targets: float
    further: float
    sequences: float
    tokens: float


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One pass."""

    packed: Packed
    """Examples end to end, none visible to another."""
    targets: Targets
    """Trained tokens, each predicted by the one before it. An example's first token is never one: nothing of its own
    comes before it."""
    further: Targets
    """The same from two tokens before (M), for an MTP layer."""

    @property
    def tokens(self) -> int:
        """Tokens of the pass, trained or not."""
        return len(self.packed.ids_T)

    @property
    def sizes(self) -> torch.Tensor:
        """`Sizes` of the pass, fp64, to be added up."""
        counts = len(self.targets.ids_C), len(self.further.ids_C), len(self.packed.layout.lengths), self.tokens
        return torch.tensor(counts, dtype=torch.float64)


def load_batch(examples: Examples, numbers: Sequence[int], device: torch.device | str = "cpu") -> Batch:
    """Pack the examples of these numbers."""
    found = [examples[int(number)] for number in numbers]
    bounds = [0, *accumulate(len(ids) for ids, _ in found)]
    ids_T = torch.from_numpy(np.concatenate([ids for ids, _ in found]).astype(np.int64)).to(device)
    trained_T = np.concatenate([trained for _, trained in found])
    position_T = np.concatenate([np.arange(len(ids)) for ids, _ in found])

    def targets(ahead: int) -> Targets:
        at_C = torch.from_numpy(np.flatnonzero(trained_T & (position_T >= ahead))).to(device)
        return Targets(at_C - ahead, ids_T[at_C])

    return Batch(packed=Packed(ids_T, Layout(bounds)), targets=targets(1), further=targets(2))
