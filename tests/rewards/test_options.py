"""Options in a reward's name: how they are read, and what gets them."""

from functools import partial

import pytest

from rewards import REWARDS, resolve
from rewards.options import per_row, split_options


@pytest.mark.parametrize(
    ("name", "bare", "options"),
    [
        ("length", "length", {}),
        ("length()", "length", {}),
        ("length(max_tokens=4096)", "length", {"max_tokens": 4096}),
        ("a.b:c( x = -1.5 , y=true, z=null,w='zh-CN' )", "a.b:c", {"x": -1.5, "y": True, "z": None, "w": "zh-CN"}),
        ("f(x=1e-3, y=a b)", "f", {"x": 0.001, "y": "a b"}),
    ],
)
def test_options_are_read_as_yaml_writes_them(name: str, bare: str, options: dict[str, object]) -> None:
    assert split_options(name) == (bare, options)
    assert all(type(split_options(name)[1][key]) is type(value) for key, value in options.items())


@pytest.mark.parametrize("name", "f( f(1) f(x=) f(x=1 f(x=1)) f(x=g(1)) f(x=1,) (x=1) f(x==1)".split())
def test_other_spellings_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"options are written name\(option=value"):
        split_options(name)
    with pytest.raises(ValueError, match="given twice"):
        split_options("f(x=1, x=2)")


def test_a_column_is_taken_row_by_row() -> None:
    assert per_row("zh", 2) == ["zh", "zh"] and per_row(3, 1) == [3] and per_row(["zh", None], 2) == ["zh", None]


def test_a_reward_gets_its_options() -> None:
    reward = resolve("length(max_tokens=16, buffer=4)")
    assert isinstance(reward, partial) and reward.func is REWARDS["length"]
    assert reward(completion_ids=[[0] * 14], completions=["a"], prompts=["p"]) == [-0.5]
    assert resolve("rewards.language:language_reward(language=zh)")(completions=["你好"]) == [1.0]
    assert resolve("format()")(completions=["a"]) == [0.0]


def test_a_maker_of_rewards_is_called_with_them() -> None:
    pytest.importorskip("trl.rewards", reason="TRL is not installed")
    reward = resolve("trl.rewards.get_soft_overlong_punishment(max_completion_len=16, soft_punish_cache=4)")
    assert reward(completion_ids=[[0] * 14]) == [-0.5]


def test_an_option_it_does_not_have_is_told_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"has no option 'max_token' \(did you mean 'max_tokens'\?\)"):
        resolve("length(max_token=16)")
    with pytest.raises(ValueError, match=r"'lenght' is unknown \(did you mean 'length'\?\)"):
        resolve("lenght(max_tokens=16)")
    with pytest.raises(ValueError, match="makes a tuple, not a function"):
        resolve("rewards.options.split_options(name=x)")
