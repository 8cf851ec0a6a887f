"""Rewards that fail for long answers oftener than for short ones: what that does to the advantages, and what not.

Simulated groups, real advantages. Long answers are right oftener by CONTRAST/2 and short ones seldomer, so there is
something to learn about length; 20 % of the rewards are unknown, a share that rises in a line with the length.
"""

import math

import numpy as np
import pytest

from rl.rollout import set_advantages

GROUPS, SIZE, QUARTERS = 4000, 8, 4
CONTRAST = 0.3
"""P(right | longest) − P(right | shortest)."""


def rise(length: np.ndarray, contrast: float) -> np.ndarray:
    """What a length in [0, 1] adds to the chance of being right."""
    return contrast * (length - 0.5)


def advantages(make_group, *, seed: int, contrast: float, failing: str, unknown: float = math.nan, kind: str = "rloo"):
    """Lengths and advantages (GROUPS, SIZE); `unknown` is what a failed reward becomes."""
    draw = np.random.default_rng(seed)
    length_PG = draw.random((GROUPS, SIZE))
    chance_P1 = draw.uniform(0.2, 0.8, (GROUPS, 1))  # easy and hard prompts
    reward_PG = (draw.random((GROUPS, SIZE)) < chance_P1 + rise(length_PG, contrast)).astype(float)
    chance_PG = {"none": 0.0, "any": 0.2, "long": 0.4 * length_PG}[failing]
    failed_PG = draw.random((GROUPS, SIZE)) < chance_PG
    reward_PG[failed_PG] = unknown
    groups = [make_group([[5]] * SIZE, rewards=rewards) for rewards in reward_PG.tolist()]
    set_advantages(groups, kind)
    return length_PG, np.array([group.advantages for group in groups])


def by_length(length_PG: np.ndarray, advantage_PG: np.ndarray) -> list[tuple[float, float]]:
    """Mean advantage of the known completions in each quarter of the lengths, and its standard error over groups."""
    found = []
    for quarter in range(QUARTERS):
        inside_PG = (np.floor(length_PG * QUARTERS) == quarter) & ~np.isnan(advantage_PG)
        sums_P, counts_P = np.where(inside_PG, advantage_PG, 0).sum(1), inside_PG.sum(1)
        mean = sums_P.sum() / counts_P.sum()
        found.append((mean, math.sqrt(((sums_P - mean * counts_P) ** 2).sum()) / counts_P.sum()))
    return found


def apart(one: list[tuple[float, float]], other: list[tuple[float, float]], shift: float = 0.0) -> float:
    """How many standard errors the quarters of two simulations lie apart at most, once `other` is shifted."""
    return max(abs(a - b - shift) / math.hypot(s, t) for (a, s), (b, t) in zip(one, other, strict=True))


def contrast_of(found: list[tuple[float, float]]) -> float:
    return found[-1][0] - found[0][0]


@pytest.mark.parametrize(("failing", "contrast"), [("any", CONTRAST), ("long", 0.0)])
def test_failures_that_say_nothing_of_the_reward_leave_every_length_its_advantage(make_group, failing, contrast):
    clean = by_length(*advantages(make_group, seed=0, contrast=contrast, failing="none"))
    failed = by_length(*advantages(make_group, seed=1, contrast=contrast, failing=failing))
    assert apart(failed, clean) < 2.5  # of four quarters at 95 %


def test_failures_of_the_better_lengths_raise_all_advantages_alike_and_never_tell_lengths_apart(make_group):
    clean = by_length(*advantages(make_group, seed=0, contrast=CONTRAST, failing="none"))
    failed = by_length(*advantages(make_group, seed=1, contrast=CONTRAST, failing="long"))
    # E[r] − E[r | known] = −∫ c(x − ½)(1 − 0.4x) dx / 0.8 = c/24: the known are worse on average, so the baseline is.
    shift = CONTRAST / 24
    assert apart(failed, clean, shift) < 2.5
    assert abs(contrast_of(failed) - contrast_of(clean)) < 2.5 * math.hypot(
        *(s for _, s in (clean[0], clean[-1])), 0.01
    )


def test_an_unknown_counted_as_wrong_would_turn_the_advantages_against_long_answers(make_group):
    clean = by_length(*advantages(make_group, seed=0, contrast=CONTRAST, failing="none"))
    wrong = by_length(*advantages(make_group, seed=1, contrast=CONTRAST, failing="long", unknown=0.0))
    assert apart(wrong, clean) > 5
    assert contrast_of(clean) > 0.15 and contrast_of(wrong) < 0.12


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo"])
def test_the_other_baselines_shrink_a_little_as_smaller_groups_do(make_group, kind):
    options = dict(contrast=CONTRAST, kind=kind)
    clean = contrast_of(by_length(*advantages(make_group, seed=0, failing="none", **options)))
    alike = contrast_of(by_length(*advantages(make_group, seed=1, failing="any", **options)))
    long = contrast_of(by_length(*advantages(make_group, seed=2, failing="long", **options)))
    assert 0.85 < long / clean < 1.0 and abs(long - alike) / clean < 0.08


def test_what_is_lost_of_long_answers_is_their_share_of_the_update(make_group):
    """The one bias that is left: nobody learns from an answer nobody could grade."""
    length_PG, advantage_PG = advantages(make_group, seed=1, contrast=CONTRAST, failing="long")
    known_PG = ~np.isnan(advantage_PG)
    shares = [known_PG[np.floor(length_PG * QUARTERS) == quarter].mean() for quarter in range(QUARTERS)]
    assert shares == pytest.approx([0.95, 0.85, 0.75, 0.65], abs=0.015)
