"""The rows of a run: a pure function of seed and place, every example as often as it is due."""

from collections import Counter

import numpy as np
import pytest

from sft.epochs import Epochs
from sft.mix import SourceConfig, epoch_examples

LENGTHS = np.array([7, 3, 9, 10, 2, 2, 5, 8, 1, 6], dtype=np.int32)
MIX = [SourceConfig(path="a", epochs=1.5), SourceConfig(path="b")]
SIZES = [4, 6]


def make(seed: int = 0, epochs: int = 3) -> Epochs:
    return Epochs(
        LENGTHS,
        epoch_examples=lambda epoch: epoch_examples(MIX, SIZES, seed=seed, epoch=epoch),
        epochs=epochs,
        row_length=12,
        seed=seed,
    )


def rows(epochs: Epochs) -> list[list[int]]:
    return [epochs.row(index).tolist() for index in range(len(epochs))]


def test_every_epoch_holds_each_example_as_often_as_it_is_due():
    epochs, start = make(), 0
    for epoch, count in enumerate(epochs.counts):
        seen = Counter(example for row in rows(epochs)[start : start + count] for example in row)
        assert seen == Counter(epoch_examples(MIX, SIZES, seed=0, epoch=epoch).tolist())
        assert sum(seen.values()) == 4 + 2 + 6
        start += count
    assert start == len(epochs)


def test_no_row_is_longer_than_it_may_be():
    assert all(sum(LENGTHS[example] for example in row) <= 12 for row in rows(make()))


def test_rows_depend_on_the_seed_and_their_place_alone():
    whole = rows(make())
    again = make()
    backwards = [again.row(index).tolist() for index in reversed(range(len(again)))][::-1]
    assert backwards == whole and rows(make(epochs=2)) == whole[: len(make(epochs=2))]
    assert rows(make(seed=1)) != whole
    first, second, *_ = np.split(np.arange(len(whole)), np.cumsum(make().counts))
    assert [whole[i] for i in first] != [whole[i] for i in second]


def test_neighbours_change_from_epoch_to_epoch():
    """Even of the same examples in the same order."""
    lengths, everyone = np.full(12, 4), np.arange(12)
    epochs = Epochs(lengths, epoch_examples=lambda epoch: everyone, epochs=2, row_length=12, seed=0)
    first, second = ({frozenset(row) for row in rows(epochs)[start : start + 4]} for start in (0, 4))
    assert first != second


def test_the_epoch_of_a_row_counts_what_lies_before_it():
    epochs = make(epochs=2)
    first, second = epochs.counts
    assert epochs.epoch_at(0) == 0 and epochs.epoch_at(first) == 1 and epochs.epoch_at(first + second) == 2
    assert epochs.epoch_at(first + 1) == pytest.approx(1 + 1 / second)


def test_there_is_no_row_behind_the_last():
    with pytest.raises(IndexError, match="row 99 of a run of 20"):
        make().row(99)


def test_fill_is_the_share_of_room_that_holds_tokens():
    epochs = make()
    tokens = LENGTHS[epoch_examples(MIX, SIZES, seed=0, epoch=0)].sum()
    assert epochs.fill == pytest.approx(tokens / (epochs.counts[0] * 12))
