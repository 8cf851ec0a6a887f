"""Lengths of samples -> rows of at most so many tokens: which samples share a row, for a whole epoch at once.

Best-fit decreasing (R1's packing, arXiv 2501.12948 v2, B.1): samples from long to short, each into the row with the
least room that still has enough. All samples of one length are placed together, so that a million take a fraction of
a second. Left out: what attention sees in a row (runtime/packed.py).
"""

import bisect
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which samples each row holds: row r has `samples[starts[r]:starts[r + 1]]`."""

    samples: Ints
    """Every sample once, those of one row together."""
    starts: Ints
    """Rows + 1 offsets into `samples`."""
    tokens: int
    """Tokens of all samples."""
    row_length: int
    """Most tokens of a row."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row(self, index: int) -> Ints:
        """The samples of one row."""
        return self.samples[self.starts[index] : self.starts[index + 1]]

    @property
    def fill(self) -> float:
        """Share of the rows' room that holds tokens."""
        return self.tokens / (len(self) * self.row_length) if len(self) else 1.0


def plan_rows(lengths: npt.ArrayLike, row_length: int, *, seed: int = 0, epoch: int = 0) -> Plan:
    """Pack samples of these lengths (tokens, each from 1 to row_length), a pure function of its arguments.

    Seed and epoch decide which samples of equal length go where, and the order of the rows. Raises ValueError for a
    length outside the range.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if len(sizes) and not 1 <= sizes.min() <= sizes.max() <= row_length:
        worst = int(np.argmax((sizes < 1) | (sizes > row_length)))
        raise ValueError(f"lengths[{worst}]={sizes[worst]}: rows hold samples of 1 to {row_length} tokens")
    chance = np.random.default_rng([seed, epoch])
    shuffled = chance.permutation(len(sizes))
    longest_first = shuffled[np.argsort(-sizes[shuffled], kind="stable")]
    row_of, rows = _best_fit(sizes[longest_first], row_length)
    row_of = chance.permutation(rows)[row_of]
    by_row = np.argsort(row_of, kind="stable")
    counts = np.bincount(row_of, minlength=rows)
    starts = np.concatenate([[0], np.cumsum(counts)])
    return Plan(samples=longest_first[by_row], starts=starts, tokens=int(sizes.sum()), row_length=row_length)


def _best_fit(descending: Ints, row_length: int) -> tuple[Ints, int]:
    """The row of each sample, and how many rows there are."""
    row_of = np.empty(len(descending), dtype=np.int64)
    rows = 0
    with_room: dict[int, Ints] = {}  # tokens of room -> rows that have as much
    rooms: list[int] = []  # its keys, sorted

    def put(room: int, these: Ints) -> None:
        if room and len(these):
            if room in with_room:
                with_room[room] = np.concatenate([with_room[room], these])
            else:
                with_room[room] = these
                bisect.insort(rooms, room)

    values, firsts, counts = np.unique(-descending, return_index=True, return_counts=True)
    for negative, first, count in zip(values.tolist(), firsts.tolist(), counts.tolist(), strict=True):
        length, place, end = -negative, first, first + count
        while place < end:
            index = bisect.bisect_left(rooms, length)
            if index < len(rooms):
                room = rooms.pop(index)
                open_rows = with_room.pop(room)
            else:
                room = row_length
                needed = -(-(end - place) // (room // length))
                open_rows = np.arange(rows, rows + needed)
                rows += needed
            # The row with the least room stays that as it fills, so each takes as many as it can hold.
            each = room // length
            full, rest = divmod(min(end - place, len(open_rows) * each), each)
            row_of[place : place + full * each] = np.repeat(open_rows[:full], each)
            place += full * each
            put(room - each * length, open_rows[:full])
            if rest:
                row_of[place : place + rest] = open_rows[full]
                place += rest
                put(room - rest * length, open_rows[full : full + 1])
            put(room, open_rows[full + bool(rest) :])
    return row_of, rows
