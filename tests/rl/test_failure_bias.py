"""Rewards that fail for long answers oftener than for short ones: what that does to the advantages, and what not.

Simulated groups, real advantages. Long answers are right oftener than short ones, so there is something to learn about
length; 20 % of the rewards are unknown, a share that rises in a line with the length. docs/faults.md has the figures.
"""

import math
from typing import NamedTuple

import numpy as np
import pytest

from rl.rollout import set_advantages
from rl.types import Group, Prompt

GROUPS, SIZE, QUARTERS = 20_000, 8, 4
CONTRAST = 0.3
"""P(right | longest) − P(right | shortest)."""
PROMPT = Prompt(index=0, epoch=0, seed=0, content="question", ids=[1], columns={})


def simulate(*, seed: int, contrast: float, failing: str, unknown: float = math.nan, kind: str = "rloo"):
    """Lengths in [0, 1] and advantages, (GROUPS, SIZE) each; `unknown` is what a failed reward becomes."""
    draw = np.random.default_rng(seed)
    length_PG = draw.random((GROUPS, SIZE))
    chance_P1 = draw.uniform(0.2, 0.8, (GROUPS, 1))  # easy and hard prompts
    reward_PG = (draw.random((GROUPS, SIZE)) < chance_P1 + contrast * (length_PG - 0.5)).astype(float)
    reward_PG[draw.random((GROUPS, SIZE)) < {"none": 0.0, "any": 0.2, "long": 0.4 * length_PG}[failing]] = unknown
    groups = [Group(prompt=PROMPT, completions=[], texts=[], rewards=rewards) for rewards in reward_PG.tolist()]
    set_advantages(groups, kind)
    return length_PG, np.array([group.advantages for group in groups])


class Means(NamedTuple):
    """The mean advantage of known completions in each quarter Q of the lengths."""

    of_Q: np.ndarray
    share_PQ: np.ndarray
    """What each group adds to their errors: completions of a group are not independent."""

    def difference(self, other: "Means", weights: list[float]) -> tuple[float, float]:
        """Of a weighted sum of the quarters in two independent simulations, and its standard error."""
        errors = [((means.share_PQ @ weights) ** 2).sum() for means in (self, other)]
        return float((self.of_Q - other.of_Q) @ weights), math.sqrt(sum(errors))


def by_length(length_PG: np.ndarray, advantage_PG: np.ndarray) -> Means:
    means, shares = [], []
    for quarter in range(QUARTERS):
        inside_PG = (np.floor(length_PG * QUARTERS) == quarter) & ~np.isnan(advantage_PG)
        sums_P, counts_P = np.where(inside_PG, advantage_PG, 0).sum(1), inside_PG.sum(1)
        means.append(sums_P.sum() / counts_P.sum())
        shares.append((sums_P - means[-1] * counts_P) / counts_P.sum())
    return Means(np.array(means), np.array(shares).T)


def errors_apart(one: Means, other: Means, *, shift: float = 0.0) -> float:
    """By how many standard errors the two differ at most, in any quarter, if `shift` between them is expected."""
    differences = [one.difference(other, weights.tolist()) for weights in np.eye(QUARTERS)]
    return max(abs(difference - shift) / error for difference, error in differences)


LONGEST_LESS_SHORTEST = [-1.0, 0.0, 0.0, 1.0]
INSIDE = 2.5
"""Standard errors: 95 % for the largest of four quarters."""


@pytest.mark.parametrize(("failing", "contrast"), [("any", CONTRAST), ("long", 0.0)])
def test_failures_that_say_nothing_of_the_reward_leave_every_length_its_advantage(failing, contrast):
    clean = by_length(*simulate(seed=0, contrast=contrast, failing="none"))
    failed = by_length(*simulate(seed=1, contrast=contrast, failing=failing))
    assert errors_apart(failed, clean) < INSIDE


def test_failures_of_the_better_lengths_raise_all_advantages_alike_and_do_not_tell_lengths_apart():
    clean = by_length(*simulate(seed=0, contrast=CONTRAST, failing="none"))
    failed = by_length(*simulate(seed=1, contrast=CONTRAST, failing="long"))
    # The known are worse on average, and they are the baseline: E[r] − E[r | known] = −∫ c(x − ½)(1 − 0.4x) dx / 0.8.
    assert errors_apart(failed, clean, shift=CONTRAST / 24) < INSIDE
    assert errors_apart(failed, clean) > INSIDE
    difference, error = failed.difference(clean, LONGEST_LESS_SHORTEST)
    assert abs(difference) < 1.96 * error and error < 0.01


def test_an_unknown_counted_as_wrong_would_take_the_lesson_away():
    clean = by_length(*simulate(seed=0, contrast=CONTRAST, failing="none"))
    wrong = by_length(*simulate(seed=1, contrast=CONTRAST, failing="long", unknown=0.0))
    difference, error = wrong.difference(clean, LONGEST_LESS_SHORTEST)
    assert difference < -0.8 * (clean.of_Q @ LONGEST_LESS_SHORTEST) and difference < -15 * error


@pytest.mark.parametrize(("kind", "shrunk"), [("grpo", 0.94), ("dr_grpo", 0.96)])
def test_the_other_baselines_shrink_a_little_as_they_do_in_smaller_groups(kind, shrunk):
    clean, alike, long = (
        by_length(*simulate(seed=seed, contrast=CONTRAST, failing=failing, kind=kind))
        for seed, failing in enumerate(("none", "any", "long"))
    )
    difference, error = long.difference(alike, LONGEST_LESS_SHORTEST)
    assert abs(difference) < 1.96 * error  # that long ones fail oftener adds nothing to that
    ratio = (long.of_Q @ LONGEST_LESS_SHORTEST) / (clean.of_Q @ LONGEST_LESS_SHORTEST)
    assert ratio == pytest.approx(shrunk, abs=0.04)


def test_what_long_answers_lose_is_their_share_of_the_update():
    """The bias that is left: nobody learns from an answer nobody could grade."""
    length_PG, advantage_PG = simulate(seed=1, contrast=CONTRAST, failing="long")
    known_PG = ~np.isnan(advantage_PG)
    shares = [known_PG[np.floor(length_PG * QUARTERS) == quarter].mean() for quarter in range(QUARTERS)]
    assert shares == pytest.approx([0.95, 0.85, 0.75, 0.65], abs=0.01)
