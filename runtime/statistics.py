"""Counts and scores in, the numbers an evaluation may claim out: intervals, pass@k, effective sample size.

Pure functions of plain numbers. Leaves out tests between two models: compare their per-problem scores in
pairs.
"""

import math
from collections.abc import Sequence


def wilson(mean: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Return Wilson's score interval for a mean of `n` independent per-problem scores in [0, 1].

    For right-or-wrong scores it is Wilson's (1927) interval of a proportion. For scores between, such as a
    problem's share of right answers out of several samples, it is conservative: among all variables in [0, 1]
    with this mean, right-or-wrong has the largest variance, mean(1 - mean), so the true coverage is at least
    about the nominal one. `n` counts problems, never samples: samples of one problem aren't independent.
    z=1.96 is 95 %.
    """
    if not 0 <= mean <= 1:
        raise ValueError(f"mean={mean}: needs a mean of scores in [0, 1]")
    if n < 1:
        raise ValueError(f"n={n}: needs at least one problem")
    centre = mean + z * z / (2 * n)
    half = z * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    shrink = 1 + z * z / n
    # The exact bounds at mean 0 and 1 are 0 and 1; rounding must not cross them, nor exclude the mean.
    low, high = max(0.0, (centre - half) / shrink), min(1.0, (centre + half) / shrink)
    return min(low, mean), max(high, mean)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the unbiased estimate of pass@k from `c` right answers among `n` samples of one problem.

    1 - C(n-c, k) / C(n, k): Chen et al. 2021 (arXiv:2107.03374), eq. 1. Average it over problems.
    """
    if not 1 <= k <= n:
        raise ValueError(f"k={k}: needs 1 <= k <= n={n} samples; draw more samples or lower k")
    if not 0 <= c <= n:
        raise ValueError(f"c={c}: the number of right answers lies in 0..n={n}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def effective_sample_size(weights: Sequence[float]) -> float:
    """Return (Σw)² / Σw², how many equally weighted samples these importance weights are worth (Kish 1965).

    Between 1 and len(weights), unchanged by scaling; 0 when there are no weights or all are 0.
    """
    values = [float(w) for w in weights]
    if bad := [w for w in values if not (math.isfinite(w) and w >= 0)]:
        raise ValueError(f"weights: {bad[0]} is not a finite, non-negative weight")
    largest = max(values, default=0.0)
    if largest == 0:
        return 0.0
    scaled = [w / largest for w in values]  # squares of large weights would overflow
    return math.fsum(scaled) ** 2 / math.fsum(w * w for w in scaled)
