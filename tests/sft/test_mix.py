"""Mixes: exact counts, nothing seen more often than it should be, and a pure function of seed and epoch."""

import time
from collections import Counter

import numpy as np
import pytest

from runtime.errors import UserError
from sft.mix import SourceConfig, epoch_counts, epoch_examples

ONE = SourceConfig(path="one")


def times_seen(sources: list[SourceConfig], sizes: list[int], epochs: range, seed: int = 0) -> np.ndarray:
    drawn = np.concatenate([epoch_examples(sources, sizes, seed=seed, epoch=epoch) for epoch in epochs])
    return np.bincount(drawn, minlength=sum(sizes))


def test_without_epochs_or_weights_each_example_is_seen_once() -> None:
    assert times_seen([ONE, ONE], [7, 5], range(1)).tolist() == [1] * 12


@pytest.mark.parametrize("epoch", range(4))
def test_one_and_a_half_epochs_show_each_once_and_half_of_them_twice(epoch: int) -> None:
    sources = [ONE, SourceConfig(path="more", epochs=1.5), SourceConfig(path="less", epochs=0.25)]
    seen = times_seen(sources, [10, 100, 40], range(epoch, epoch + 1))
    assert Counter(seen[:10].tolist()) == {1: 10}
    assert Counter(seen[10:110].tolist()) == {1: 50, 2: 50}
    assert Counter(seen[110:].tolist()) == {0: 30, 1: 10}


@pytest.mark.parametrize("part", [0.25, 0.3, 0.7, 1.4])
def test_over_the_epochs_no_example_is_seen_more_than_once_more_than_another(part: float) -> None:
    for epochs in range(1, 12):
        seen = times_seen([SourceConfig(path="part", epochs=part)], [30], range(epochs))
        assert seen.sum() == epochs * round(part * 30) and seen.max() - seen.min() <= 1


def test_weights_are_shares_of_the_examples_and_the_scarcest_source_is_used_up() -> None:
    sources = [SourceConfig(path="a", weight=3), SourceConfig(path="b", weight=1)]
    assert epoch_counts(sources, [1000, 100]) == [300, 100]
    assert epoch_counts(sources, [30, 100]) == [30, 10]
    seen = times_seen(sources, [1000, 100], range(3))
    assert seen[:1000].max() == 1 and seen[:1000].sum() == 900  # three epochs, nothing twice
    assert set(seen[1000:]) == {3}


@pytest.mark.parametrize("seed", range(20))
def test_random_weights_give_shares_to_within_one_example(seed: int) -> None:
    chance = np.random.default_rng(seed)
    weights, sizes = chance.uniform(0.01, 5, 6), chance.integers(500, 5000, 6).tolist()
    sources = [SourceConfig(path=str(i), weight=w) for i, w in enumerate(weights)]
    counts = epoch_counts(sources, sizes)
    assert all(abs(c - sum(counts) * w / weights.sum()) <= 1 for c, w in zip(counts, weights, strict=True))
    assert max(c / n for c, n in zip(counts, sizes, strict=True)) == 1
    assert times_seen(sources, sizes, range(1)).max() == 1


def test_which_examples_come_and_in_what_order_is_uniform() -> None:
    """χ² over 400 seeds: how often each of 40 examples is among the 10 chosen, and which source comes first."""
    sources = [SourceConfig(path="some", epochs=0.25), ONE]
    orders = [epoch_examples(sources, [40, 30], seed=seed, epoch=seed % 3) for seed in range(400)]
    chosen = np.bincount(np.concatenate(orders), minlength=70)[:40]
    assert ((chosen - 100) ** 2 / 100).sum() * 40 / 30 < 73  # 39 degrees of freedom, p = 0.001
    assert 60 < sum(order[0] < 40 for order in orders) < 140  # 100 ± 4.6 σ


def test_examples_depend_on_seed_and_epoch_and_on_nothing_else() -> None:
    sources, sizes = [SourceConfig(path="a", epochs=0.5), ONE], [50, 50]
    first = epoch_examples(sources, sizes, seed=3, epoch=1).tolist()
    assert epoch_examples(sources, sizes, seed=3, epoch=1).tolist() == first
    others = [epoch_examples(sources, sizes, seed=seed, epoch=epoch).tolist() for seed, epoch in [(3, 2), (4, 1)]]
    assert all(other != first and set(other) != set(first) for other in others)
    # The same in every release of numpy: what a run of months ago drew, a resumed one draws.
    assert epoch_examples([ONE], [6], seed=0, epoch=0).tolist() == [4, 5, 1, 2, 0, 3]


def test_a_million_and_a_half_take_under_two_seconds() -> None:
    sources = [SourceConfig(path="a", epochs=1.2), SourceConfig(path="b", epochs=0.5)]
    start = time.perf_counter()
    assert len(epoch_examples(sources, [1_000_000, 600_000], seed=0, epoch=5)) == 1_500_000
    assert time.perf_counter() - start < 10  # 0.4 s on an idle core


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(path=""), "mix.path"),
        (dict(path="a", epochs=1, weight=1), r"mix \(a\): give epochs or weight, not both"),
        (dict(path="a", epochs=0), r"mix \(a\).epochs=0: give a number above 0"),
        (dict(path="a", weight=-1.0), r"mix \(a\).weight=-1.0: give a number above 0"),
        (dict(path="a", weight=float("nan")), r"mix \(a\).weight=nan"),
        (dict(path="a", epochs=float("inf")), r"mix \(a\).epochs=inf"),
        (dict(path="a", max_examples=0), r"mix \(a\).max_examples=0: read at least one"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        SourceConfig(**settings)


def test_sources_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(UserError, match="at least one source"):
        epoch_counts([], [])
    with pytest.raises(UserError, match="one without a weight beside sources with one"):
        epoch_counts([ONE, SourceConfig(path="b", weight=1)], [5, 5])
    with pytest.raises(UserError, match=r"mix \(b\): none of its 5 examples in an epoch; raise its epochs or weight"):
        epoch_counts([ONE, SourceConfig(path="b", epochs=0.05)], [5, 5])
