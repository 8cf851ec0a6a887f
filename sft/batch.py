"""Rows of examples -> what one forward and backward pass takes.

Shapes: T tokens of the pass, C trained targets.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from deepseek_v3.packing import Layout
from runtime.packed import Packed

Example = tuple[np.ndarray, np.ndarray]
"""Token ids and, of the same length, which of them are trained."""


class Examples(Protocol):
    """Something that gives an example by its number: sft/store.py's `Store`, or a list."""

    def __getitem__(self, index: int, /) -> Example:
        """Ids and mask of one example."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One pass."""

    packed: Packed
    """Examples end to end, none visible to another."""
    states_C: Tensor
    """Which token of the pass predicts each target: the one before it."""
    targets_C: Tensor
    """Trained token ids. An example's first token is never one: nothing of its own comes before it."""

    @property
    def tokens(self) -> int:
        """Tokens of the pass, trained or not."""
        return len(self.packed.ids_T)


def load_batch(examples: Examples, numbers: Sequence[int], device: torch.device | str = "cpu") -> Batch:
    """Pack the examples of these numbers."""
    found = [examples[int(number)] for number in numbers]
    bounds = [0, *accumulate(len(ids) for ids, _ in found)]
    ids_T = torch.from_numpy(np.concatenate([ids for ids, _ in found]).astype(np.int64))
    trained_T = np.concatenate([trained for _, trained in found])
    trained_T[bounds[:-1]] = False
    at_C = torch.from_numpy(np.flatnonzero(trained_T))
    packed = Packed(ids_T.to(device), Layout(bounds))
    return Batch(packed=packed, states_C=(at_C - 1).to(device), targets_C=ids_T[at_C].to(device))
