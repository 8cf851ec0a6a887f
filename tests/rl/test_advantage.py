"""Advantages are the hand numbers, never blow up, and don't see unknown rewards."""

import pytest
import torch

from rl.advantage import EPS, group_advantages, zero_variance

NAN = float("nan")


def rewards(*rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_one_right_of_four_by_hand():
    # mean 1/4; squared deviations 9/16 + 3·1/16 = 3/4, over N − 1 = 3: std 1/2
    got = group_advantages(rewards([1, 0, 0, 0]))
    assert got.tolist() == [pytest.approx([0.75 / (0.5 + 1e-4), *[-0.25 / (0.5 + 1e-4)] * 3], rel=1e-12)]


def test_dr_grpo_takes_off_the_mean_only():
    got = group_advantages(rewards([1, 0, 0, 0], [3, 1, 1, 3]), "dr_grpo")
    assert got.tolist() == [[0.75, -0.25, -0.25, -0.25], [1, -1, -1, 1]]


def test_rloo_takes_off_the_mean_of_the_others():
    got = group_advantages(rewards([1, 0, 0, 0], [3, 1, NAN, 4]), "rloo")
    expected = rewards([1, -1 / 3, -1 / 3, -1 / 3], [3 - 5 / 2, 1 - 7 / 2, NAN, 4 - 2])
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_groups_do_not_see_each_other():
    rows = rewards([1, 0, 0, 0], [5, -3, 2, 2])
    together = group_advantages(rows)
    for i in range(2):
        assert torch.equal(group_advantages(rows[i : i + 1])[0], together[i])


def test_adding_to_all_rewards_of_a_group_changes_nothing():
    rows = rewards([1, 0, 0.5, 0], [2, 0, 1, 1])
    torch.testing.assert_close(group_advantages(rows + 17), group_advantages(rows), rtol=1e-12, atol=1e-12)


def test_scaling_all_rewards_of_a_group_changes_nothing_but_what_eps_does():
    rows = rewards([1, 0, 0.5, 0])
    torch.testing.assert_close(group_advantages(rows * 1000), group_advantages(rows), rtol=3 * EPS, atol=0)
    exact = group_advantages(rows) * (rows.std(1) + EPS) / rows.std(1)
    torch.testing.assert_close(exact, (rows - rows.mean(1)) / rows.std(1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_exactly_zero_though_their_mean_is_another_number(dtype):
    for value in (0.35, 0.1, 1e-8, 1e8 / 3, -0.7, 0.0):
        for size in (2, 3, 7, 10, 64):
            group = torch.full((1, size), value, dtype=dtype)
            assert group_advantages(group).tolist() == [[0.0] * size]
            assert group_advantages(group, "dr_grpo").tolist() == [[0.0] * size]
            assert group_advantages(group, "rloo").tolist() == [[0.0] * size]


def test_one_reward_that_differs_from_seven_stays_bounded():
    # One of n that differs has |A| = (n − 1)/√n whatever the distance: 7/√8 = 2.475
    for odd in (1.0, 0.36, 0.35 + 1e-3, 1e6):
        got = group_advantages(rewards([0.35] * 7 + [odd]))[0]
        assert 0 < got[-1] <= 7 / 8**0.5 and got.sum().abs() < 1e-9
    assert group_advantages(rewards([0.35] * 7 + [1.0]))[0, -1] == pytest.approx(7 / 8**0.5, rel=1e-3)


def test_rewards_one_rounding_apart_do_not_become_an_advantage():
    got = group_advantages(rewards([0.1 + 0.2, 0.3, 0.3, 0.3]))
    assert got.abs().max() < 1e-11


def test_unknown_rewards_neither_shift_the_others_nor_get_an_advantage():
    got = group_advantages(rewards([1, NAN, 0, 0, NAN, 0]))[0]
    assert got.isnan().tolist() == [False, True, False, False, True, False]
    assert got[[0, 2, 3, 5]].tolist() == group_advantages(rewards([1, 0, 0, 0]))[0].tolist()


def test_equal_known_rewards_beside_an_unknown_one_are_exactly_zero():
    got = group_advantages(rewards([0.35] * 7 + [NAN]))[0]
    assert got[:7].tolist() == [0.0] * 7 and got[7].isnan()


def test_a_single_known_reward_has_nothing_to_compare_with():
    got = group_advantages(rewards([NAN, 0.9, NAN]))[0]
    assert got.isnan().tolist() == [True, False, True] and got[1] == 0


def test_all_unknown_stays_unknown():
    assert group_advantages(rewards([NAN] * 4)).isnan().all()


def test_zero_variance_counts_groups_that_teach_nothing():
    rows = rewards([1, 1, 1], [1, NAN, 1], [NAN, NAN, 1], [NAN] * 3, [1, 0, NAN], [1, 0, 0])
    assert zero_variance(rows).tolist() == [True, True, True, True, False, False]


def test_trls_formula_on_the_same_rewards():
    """TRL 1.16, GRPOTrainer._generate_and_score_completions with scale_rewards="group", its own nanstd."""
    nanstd = pytest.importorskip("trl.trainer.utils", reason="TRL is not installed").nanstd
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(50, 8, generator=generator, dtype=torch.float64)
    rows[torch.rand(50, 8, generator=generator) < 0.2] = NAN
    rows[0] = torch.tensor([1.0] + [0.0] * 7)
    assert (~rows.isnan()).sum(1).min() >= 2
    theirs = (rows - rows.nanmean(1, keepdim=True)) / (nanstd(rows, dim=1)[:, None] + 1e-4)
    # Their N / (N − 1) is fp32.
    torch.testing.assert_close(group_advantages(rows), theirs, rtol=1e-6, atol=1e-6, equal_nan=True)
