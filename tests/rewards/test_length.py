"""DAPO's equation 13 by hand and as TRL has it, and a cap."""

from functools import partial

import pytest

from rewards.check import GOLDEN, golden_suite, grader_of
from rewards.length import length_reward, overlong_punishment


def test_golden_cases() -> None:
    grader = grader_of("rewards.length.length_reward")
    assert golden_suite(GOLDEN / "length.jsonl", grader, budget_ms=1000).misses == []


@pytest.mark.parametrize(
    ("length", "punishment"), [(0, 0.0), (12, 0.0), (13, -0.25), (14, -0.5), (16, -1.0), (17, -1.0)]
)
def test_it_falls_in_a_line_over_the_buffer(length: int, punishment: float) -> None:
    assert overlong_punishment(length, max_tokens=16, buffer=4) == punishment


@pytest.mark.parametrize(("max_tokens", "buffer"), [(100, 20), (16, 4), (7, 7), (5, 1), (8, 0)])
def test_the_numbers_are_trls(max_tokens: int, buffer: int) -> None:
    trl_rewards = pytest.importorskip("trl.rewards", reason="TRL is not installed")
    theirs = trl_rewards.get_soft_overlong_punishment(max_completion_len=max_tokens, soft_punish_cache=buffer)
    ids = [[0] * length for length in range(2 * max_tokens)]
    ours = length_reward(completion_ids=ids, max_tokens=max_tokens, buffer=buffer, prompts=None, completions=None)
    assert ours == pytest.approx(theirs(completion_ids=ids), abs=1e-12)


def test_a_data_column_gives_each_row_its_limit() -> None:
    reward = partial(length_reward, max_tokens=100)
    assert reward(completion_ids=[[0] * 9] * 2, max_tokens=[8, 9]) == [-1.0, 0.0]


@pytest.mark.parametrize("buffer", [-1, 17])
def test_a_buffer_that_cannot_be_is_refused(buffer: int) -> None:
    with pytest.raises(ValueError, match=f"buffer={buffer}: give tokens from 0 to max_tokens=16"):
        overlong_punishment(3, max_tokens=16, buffer=buffer)
