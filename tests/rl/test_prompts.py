"""A step's prompts are a function of (seed, step) alone; what can't be sampled is set aside and counted."""

import pytest

from rl.prompts import make_source, mix_seed
from runtime.errors import UserError
from runtime.rows import Rows
from sft.chat import encode_prompt


def source_of(tokenizer, rows: list[dict], *, seed: int = 0, limit: int = 1024):
    given = Rows(source="given")
    given.extend(rows)
    return make_source(given, tokenizer, seed=seed, max_prompt_tokens=limit)


@pytest.fixture
def source(tokenizer):
    return source_of(tokenizer, [{"prompt": f"question {i}", "answer": str(i)} for i in range(7)])


def draws(prompts) -> list[tuple[int, int, int]]:
    return [(p.epoch, p.index, p.seed) for p in prompts]


def test_a_step_is_the_same_whatever_was_drawn_before(source, tokenizer):
    straight = [draws(source.draw(3 * step, 3)[0]) for step in range(10)]
    again = source_of(tokenizer, list(source.rows))
    for step in (9, 2, 2, 5):
        assert draws(again.draw(3 * step, 3)[0]) == straight[step]


def test_the_sequence_does_not_depend_on_how_it_is_divided_into_steps(source):
    by_three = [draw for step in range(14) for draw in draws(source.draw(3 * step, 3)[0])]
    by_seven = [draw for step in range(6) for draw in draws(source.draw(7 * step, 7)[0])]
    by_one = [draw for step in range(42) for draw in draws(source.draw(1 * step, 1)[0])]
    assert by_three == by_seven == by_one


def test_every_epoch_has_every_row_once_in_another_order(source):
    epochs = [draws(source.draw(7 * step, 7)[0]) for step in range(4)]
    for number, epoch in enumerate(epochs):
        assert sorted(index for _, index, _ in epoch) == list(range(7))
        assert {e for e, _, _ in epoch} == {number}
    assert len({tuple(index for _, index, _ in epoch) for epoch in epochs}) == 4


def test_another_seed_draws_another_order(source, tokenizer):
    other = source_of(tokenizer, list(source.rows), seed=1)
    assert [p.index for p in other.draw(7 * 0, 7)[0]] != [p.index for p in source.draw(7 * 0, 7)[0]]


def test_no_two_draws_share_a_seed_though_they_share_a_row(source):
    seeds = [p.seed for step in range(100) for p in source.draw(7 * step, 7)[0]]
    assert len(set(seeds)) == 700
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert len({mix_seed(run, draw) for run in range(50) for draw in range(50)}) == 2500


def test_seeds_are_the_same_in_every_version():
    assert mix_seed(0, 0) == 8754807190040728371
    assert mix_seed(17, 123_456) == 4087280250711487912


def test_a_prompt_carries_the_rows_other_columns(source):
    (prompt,) = source.first(1)
    assert prompt.content == "question 0" and prompt.columns == {"answer": "0"}


def test_first_takes_rows_in_file_order_and_no_more_than_there_are(source):
    assert [p.index for p in source.first(3)] == [0, 1, 2]
    assert len(source.first(100)) == 7
    assert draws(source.first(3)) == draws(source.first(100))[:3]  # a problem's samples don't depend on how many


def test_plain_prompts_are_continued_and_messages_go_through_the_template(tokenizer):
    talk = [{"role": "user", "content": "How many?"}]
    rows = [{"prompt": "How many?", "answer": "1"}, {"prompt": talk, "answer": "1"}]
    plain, conversational = source_of(tokenizer, rows).first(2)
    assert plain.ids == tokenizer("How many?")["input_ids"]
    text = tokenizer.decode(conversational.ids)
    assert text == "<｜begin▁of▁sentence｜><｜User｜>How many?<｜Assistant｜>"
    assert conversational.ids == encode_prompt(tokenizer, talk)


def test_prompts_over_the_limit_are_set_aside_and_counted(tokenizer):
    fits = "é" * 10
    size = len(tokenizer(fits)["input_ids"])
    rows = [{"prompt": fits, "answer": "1"}, {"prompt": fits + "?", "answer": "2"}, {"prompt": "a", "answer": "3"}]
    source = source_of(tokenizer, rows, limit=size)
    assert [row["answer"] for row in source.rows] == ["1", "3"] and source.too_long == 1
    assert all(len(p.ids) <= size for p in source.first(9))


def test_a_templates_own_tokens_count(tokenizer):
    turns = [{"role": "user" if i % 2 == 0 else "assistant", "content": "a"} for i in range(101)]
    rows = [{"prompt": turns, "answer": "1"}, {"prompt": turns[:1], "answer": "2"}]
    size = len(encode_prompt(tokenizer, turns))
    assert size > 101 + 64
    assert source_of(tokenizer, rows, limit=size).too_long == 0
    assert source_of(tokenizer, rows, limit=size - 1).too_long == 1


def test_no_usable_prompt_is_an_error_that_says_so(tokenizer):
    with pytest.raises(UserError, match=r"sampling\.max_prompt_tokens=2: every one of the 1 prompts of 'given'"):
        source_of(tokenizer, [{"prompt": "far too long", "answer": ""}], limit=2)
