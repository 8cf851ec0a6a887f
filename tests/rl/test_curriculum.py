"""Prompts nearly always or nearly never solved mostly wait, and which they are depends on seed and turn alone."""

import math
from collections import Counter

import pytest

from rl.config import CurriculumConfig
from rl.curriculum import Curriculum
from rl.prompts import MOST_PASSED_OVER, make_source
from runtime.distributed import World
from runtime.rows import Rows

NAN = float("nan")


def curriculum(**settings) -> Curriculum:
    return Curriculum(CurriculumConfig(**dict(reward="accuracy") | settings), group_size=4)


@pytest.fixture
def source(tokenizer):
    rows = Rows(source="test")
    rows.extend({"prompt": f"What is {i}?", "answer": str(i)} for i in range(20))
    return make_source(rows, tokenizer, seed=3, max_prompt_tokens=64)


def test_the_chance_by_hand():
    taught = curriculum()
    taught.seen[0] = (2.0, 4.0)
    p = 2.5 / 5
    assert taught.chance(0, {}) == pytest.approx(1 - p**4 - (1 - p) ** 4)
    taught.seen[1] = (0.0, 400.0)
    assert taught.chance(1, {}) == 0.1  # the floor: it stays in play
    assert taught.chance(2, {}) == 1.0  # nothing is known


def test_the_datas_pass_rate_counts_as_so_many_completions():
    taught = curriculum(column_weight=8.0)
    taught.seen[0] = (4.0, 4.0)
    p = (4 + 0.25 * 8 + 0.5) / (4 + 8 + 1)
    assert taught.chance(0, {"pass_rate": 0.25}) == pytest.approx(1 - p**4 - (1 - p) ** 4)
    for strange in (None, "0.25", NAN, -1, 1.5, True):
        assert curriculum().chance(0, {"pass_rate": strange}) == 1.0


def test_without_a_reward_part_every_prompt_is_taken(source):
    off = curriculum(reward=None)
    off.seen[0] = (0.0, 400.0)
    assert off.chance(0, {"pass_rate": 0.0}) == 1.0
    assert source.draw(0, 30, off) == source.draw(0, 30)


def test_unknown_rewards_count_as_not_tried(make_group):
    taught = curriculum()
    group = make_group([[5]] * 4, parts={"accuracy": [1.0, NAN, 0.0, 1.0]}, index=6)
    taught.observe([group, group], World())
    assert taught.seen == {6: (4.0, 6.0)}


def test_hard_and_easy_prompts_come_seldom_and_the_others_every_time(source):
    taught = curriculum(floor=0.1)
    taught.seen = {0: (0.0, 400.0), 1: (400.0, 400.0), 2: (2.0, 4.0)}
    prompts, cursor = source.draw(0, 1000, taught)
    counts = Counter(prompt.index for prompt in prompts)
    epochs = cursor / 20
    assert counts[5] == pytest.approx(epochs, abs=1)
    assert counts[2] == pytest.approx(epochs * 0.875, rel=0.15)
    for hard in (0, 1):
        assert 0.02 * epochs < counts[hard] < 0.25 * epochs


def test_draws_depend_on_the_cursor_alone(source):
    taught = curriculum()
    taught.seen = dict.fromkeys(range(0, 20, 2), (0.0, 40.0))
    whole, end = source.draw(0, 12, taught)
    first, cursor = source.draw(0, 5, taught)
    rest, again = source.draw(cursor, 7, taught)
    assert first + rest == whole and again == end > 12


def test_when_nearly_all_are_passed_over_the_rest_is_taken_as_it_comes(source):
    taught = curriculum(floor=1e-9)
    taught.seen = dict.fromkeys(range(20), (0.0, math.inf))
    prompts, cursor = source.draw(0, 3, taught)
    assert len(prompts) == 3 and cursor == 3 * MOST_PASSED_OVER + 3


def test_its_state_survives_a_checkpoint(tmp_path):
    from runtime.state import load_state, save_state

    taught, again = curriculum(), curriculum()
    taught.seen = {3: (1.25, 8.0), 11: (0.0, 4.0)}
    save_state(tmp_path, "curriculum", taught.state())
    again.load(load_state(tmp_path, "curriculum"))
    assert again.seen == taught.seen
