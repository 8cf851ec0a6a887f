"""Intervals, pass@k and effective sample size against published and hand-made numbers."""

import itertools
import math

import numpy as np
import pytest

from runtime.statistics import effective_sample_size, pass_at_k, wilson


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [
        # Newcombe 1998, table I, method 3 (score without continuity correction), z = 1.959964.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_matches_newcombe_1998(right: int, n: int, low: float, high: float) -> None:
    assert wilson(right / n, n, z=1.959964) == pytest.approx((low, high), abs=6e-5)


def test_wilson_by_hand() -> None:
    # z² = 4, p = 1/2, n = 12: (1/2 + 1/6 ± 2·sqrt(1/48 + 1/144)) / (4/3) = 1/2 ± 1/4.
    assert wilson(0.5, 12, z=2.0) == pytest.approx((0.25, 0.75))


def test_wilson_mirrors_and_stays_in_range() -> None:
    for mean, n in itertools.product((0.0, 0.1, 0.5, 0.97, 1.0), (1, 7, 400)):
        low, high = wilson(mean, n)
        assert 0 <= low <= mean <= high <= 1
        assert wilson(1 - mean, n) == pytest.approx((1 - high, 1 - low))


def test_wilson_covers_and_is_conservative_for_fractional_scores() -> None:
    rng = np.random.Generator(np.random.PCG64(0))
    n, truth, runs = 100, 0.7, 2000
    bernoulli = (rng.random((runs, n)) < truth).mean(axis=1)
    fractional = rng.binomial(8, truth, (runs, n)).mean(axis=1) / 8  # the share of 8 samples that is right

    def coverage(means: np.ndarray) -> float:
        return float(np.mean([low <= truth <= high for low, high in (wilson(float(m), n) for m in means)]))

    assert 0.93 < coverage(bernoulli) < 0.97
    assert coverage(fractional) > 0.995


@pytest.mark.parametrize(("mean", "n"), [(-0.1, 5), (1.1, 5), (math.nan, 5), (0.5, 0)])
def test_wilson_refuses_what_is_not_a_mean_of_scores(mean: float, n: int) -> None:
    with pytest.raises(ValueError, match=r"mean=|n="):
        wilson(mean, n)


@pytest.mark.parametrize(("n", "c", "k", "value"), [(4, 2, 2, 5 / 6), (10, 3, 1, 0.3), (5, 0, 5, 0.0), (5, 1, 5, 1.0)])
def test_pass_at_k_by_hand(n: int, c: int, k: int, value: float) -> None:
    assert pass_at_k(n, c, k) == pytest.approx(value)


def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer() -> None:
    right = [True] * 3 + [False] * 5
    for k in range(1, 9):
        subsets = list(itertools.combinations(right, k))
        assert pass_at_k(8, 3, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize(("n", "c", "k"), [(4, 2, 5), (4, 2, 0), (4, 5, 1), (4, -1, 1)])
def test_pass_at_k_refuses_impossible_counts(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match=r"[kc]="):
        pass_at_k(n, c, k)


def test_effective_sample_size_by_hand() -> None:
    assert effective_sample_size([2.0, 2.0, 2.0]) == pytest.approx(3)
    assert effective_sample_size([1.0, 0.0, 0.0]) == pytest.approx(1)
    assert effective_sample_size([3.0, 1.0]) == pytest.approx(16 / 10)
    assert effective_sample_size([3e200, 1e200]) == pytest.approx(16 / 10)
    assert effective_sample_size([]) == 0
    with pytest.raises(ValueError, match="nan"):
        effective_sample_size([1.0, math.nan])
