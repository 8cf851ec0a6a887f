"""Sources with epochs or weights -> which examples an epoch of the run holds: pure functions of seed and epoch.

Examples are numbered through, source after source. A source of n examples that is due m in an epoch gives each
m // n times, and m % n of them once more; these move on from epoch to epoch along one random order of the source, so
that over the run, too, no example is seen more than once more than another. Left out: who shares a row (sft/pack.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runtime.settings import require
from sft.pack import Ints


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of a mix."""

    path: str
    """A file (.jsonl, .json, either with .gz, or .parquet), a `datasets` name or folder ("name", "name:split" or
    "name:config:split"), "stories" or "stories:heldout"."""
    epochs: float | None = None
    """Times each of its examples is seen in one epoch of the run; 1.5: each once, half of them twice. Unset: once, or
    as often as `weight` says."""
    weight: float | None = None
    """Instead: its share of the mix's examples, beside the other weights. The epoch is as long as it can be with no
    example seen twice in it. All sources of a mix have one, or none."""
    max_examples: int | None = None
    """Read at most so many rows, from its beginning; unset: all."""

    def __post_init__(self) -> None:
        require(bool(self.path), "mix.path: give a file, a `datasets` name or folder, or stories")
        require(self.epochs is None or self.weight is None, f"mix ({self.path}): give epochs or weight, not both")
        for name in ("epochs", "weight"):
            value = getattr(self, name)
            require(value is None or 0 < value < np.inf, f"mix ({self.path}).{name}={value}: give a number above 0")
        require(
            self.max_examples is None or self.max_examples >= 1,
            f"mix ({self.path}).max_examples={self.max_examples}: read at least one, or leave it out",
        )


def check_mix(sources: Sequence[SourceConfig]) -> None:
    """UserError unless the sources go together: at least one, and a weight for all or for none."""
    require(len(sources) > 0, "mix: give at least one source")
    without = [source.path for source in sources if source.weight is None]
    require(
        len(without) in (0, len(sources)),
        f"mix: {', '.join(without)} without a weight beside sources with one; give all a weight, or none",
    )


def epoch_counts(sources: Sequence[SourceConfig], sizes: Sequence[int]) -> list[int]:
    """How many examples each source gives to an epoch. sizes: usable examples of each.

    Raises UserError for a source that would give none.
    """
    check_mix(sources)
    if sources[0].weight is None:
        counts = [round((source.epochs or 1) * size) for source, size in zip(sources, sizes, strict=True)]
    else:
        weights = [source.weight or 0.0 for source in sources]
        per_weight = min(size / weight for size, weight in zip(sizes, weights, strict=True))
        counts = [min(round(per_weight * w), size) for w, size in zip(weights, sizes, strict=True)]
    for source, size, count in zip(sources, sizes, counts, strict=True):
        require(count > 0, f"mix ({source.path}): none of its {size} examples in an epoch; raise its epochs or weight")
    return counts


def epoch_examples(sources: Sequence[SourceConfig], sizes: Sequence[int], *, seed: int, epoch: int) -> Ints:
    """Numbers of the examples of an epoch (from 0), in random order; those that are due twice are there twice.

    Example i of source s is number sum(sizes[:s]) + i.
    """
    parts = []
    first = 0
    for index, (size, count) in enumerate(zip(sizes, epoch_counts(sources, sizes), strict=True)):
        whole, more = divmod(count, size)
        along = (epoch * more + np.arange(more)) % size
        parts += [first + np.tile(np.arange(size), whole), first + _permutation(size, seed, index)[along]]
        first += size
    examples = np.concatenate(parts)
    return examples[_permutation(len(examples), seed, len(sizes), epoch)]


def _permutation(n: int, *seeds: int) -> Ints:
    """By sorting PCG64's raw words, which numpy promises to keep; `Generator.permutation` may change."""
    words = np.random.PCG64(np.random.SeedSequence(seeds)).random_raw(n)
    return np.argsort(words, kind="stable")
