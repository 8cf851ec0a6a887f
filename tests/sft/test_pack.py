"""Packing: every sample once, no row too long, as few rows as best-fit decreasing, a pure function of its arguments."""

import time

import numpy as np
import pytest

from sft.pack import plan_rows


def best_fit_decreasing(lengths: list[int], row_length: int) -> list[int]:
    """The textbook's: room left in each row, after each sample went where it leaves least."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        room = min((room for room in rooms if room >= length), default=0)
        if room:
            rooms.remove(room)
        rooms.append((room or row_length) - length)
    return sorted(rooms)


@pytest.mark.parametrize("seed", range(50))
def test_rows_are_those_of_best_fit_decreasing(seed: int) -> None:
    chance = np.random.default_rng(seed)
    lengths = chance.integers(1, 40, chance.integers(1, 80))
    plan = plan_rows(lengths, 40, seed=seed)
    assert sorted(plan.samples.tolist()) == list(range(len(lengths)))
    rooms = [40 - int(lengths[plan.row(row)].sum()) for row in range(len(plan))]
    assert sorted(rooms) == best_fit_decreasing(lengths.tolist(), 40)
    assert plan.fill == lengths.sum() / (40 * len(plan))


def test_the_plan_depends_on_seed_and_epoch_and_on_nothing_else() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 1000)
    first = plan_rows(lengths, 128, seed=3, epoch=1)
    again, next_epoch = plan_rows(lengths.tolist(), 128, seed=3, epoch=1), plan_rows(lengths, 128, seed=3, epoch=2)
    assert first.samples.tolist() == again.samples.tolist()
    assert first.starts.tolist() == again.starts.tolist()
    assert first.samples.tolist() != next_epoch.samples.tolist()
    assert len(first) == len(next_epoch)


def test_rows_come_in_random_order_and_equal_lengths_change_partners() -> None:
    """Else each epoch would go from full rows of long samples to rows of short ones, with the same neighbours."""
    lengths = np.array([60] * 100 + [40] * 100)
    plans = [plan_rows(lengths, 100, epoch=epoch) for epoch in range(2)]
    partners = [{frozenset(plan.row(row).tolist()) for row in range(len(plan))} for plan in plans]
    assert len(partners[0] & partners[1]) < 10
    long_ones = [int(plans[0].row(row)[0]) for row in range(100)]
    assert long_ones != sorted(long_ones)


def test_no_samples_make_no_rows() -> None:
    assert len(plan_rows([], 10)) == 0


@pytest.mark.parametrize("lengths", [[3, 0, 2], [3, 11]])
def test_a_length_no_row_can_hold_is_named(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=r"lengths\[1\]=\d+: rows hold samples of 1 to 10 tokens"):
        plan_rows(lengths, 10)


def test_a_million_and_a_half_are_planned_in_seconds_and_fill_their_rows() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5.6, 1.0, 1_500_000).astype(int) + 1, 1, 4096)
    start = time.perf_counter()
    plan = plan_rows(lengths, 4096)
    assert plan.fill > 0.995
    assert np.add.reduceat(lengths[plan.samples], plan.starts[:-1]).max() <= 4096
    assert time.perf_counter() - start < 60  # 0.7 s on an idle core
