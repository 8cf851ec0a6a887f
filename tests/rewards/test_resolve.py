"""Names to reward functions: built in, dotted, and what the errors say."""

from pathlib import Path

import pytest

from rewards import REWARDS, resolve
from rewards.math_answer import accuracy


def test_built_in_and_dotted_names_find_the_same_function() -> None:
    assert resolve("accuracy") is REWARDS["accuracy"] is accuracy
    assert resolve("rewards.math_answer.accuracy") is resolve("rewards.math_answer:accuracy") is accuracy


def test_a_misspelt_name_is_told_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'acuracy'.*did you mean 'accuracy'"):
        resolve("acuracy")
    with pytest.raises(ValueError, match=r"no function 'acuracy'.*did you mean 'accuracy'"):
        resolve("rewards.math_answer.acuracy")


def test_a_module_that_fails_to_import_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_reward_module.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"'broken_reward_module' failed with ZeroDivisionError"):
        resolve("broken_reward_module.f")
    with pytest.raises(ValueError, match="No module named 'no_such_module'"):
        resolve("no_such_module.f")


def test_a_module_in_the_current_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "local_reward_module.py").write_text("def half(completions, **_):\n    return [0.5]\n")
    monkeypatch.syspath_prepend("/nonexistent")  # so that what resolve adds is taken away again
    monkeypatch.chdir(tmp_path)
    assert resolve("local_reward_module.half")(completions=["a"]) == [0.5]
