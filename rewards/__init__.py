"""Completions in, scores out: each module holds one reward function, and this table gives it a name.

A reward function has TRL's signature, `f(prompts, completions, completion_ids, **columns)` to a list of
floats: plain, deterministic, None where the row can't be judged. Left out: running them with time limits and
weights (rl/score.py).
"""

import difflib
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rewards.code_tests import code_reward, grade_code
from rewards.language import language_reward
from rewards.length import length_reward
from rewards.math_answer import accuracy
from rewards.maths.grade import grade_math
from rewards.options import split_options
from rewards.repetition import repetition_reward
from rewards.tag_format import format_reward, think_answer_format
from rewards.verdict import Verdict

__all__ = ["REWARDS", "RewardFunction", "Verdict", "grade_code", "grade_math", "resolve"]

RewardFunction = Callable[..., Sequence[float | None]]

REWARDS: dict[str, RewardFunction] = {
    "accuracy": accuracy,
    "code": code_reward,
    "format": format_reward,
    "think_answer": think_answer_format,
    "length": length_reward,
    "language": language_reward,
    "repetition": repetition_reward,
}


def resolve(name: str) -> RewardFunction:
    """The reward function of a name: built in, `package.module.function` or `package.module:function`.

    A dotted name is imported; the current directory is searched last. Options may follow, `length(max_tokens=4096)`:
    a reward function gets them as its keyword arguments, and one that makes reward functions, as TRL's `get_...`,
    is called with them. Raises ValueError with the nearest known name or option, or with what failed to import.
    """
    bare, options = split_options(name)
    return with_options(_find(bare), options, name) if "(" in name else _find(bare)


def with_options(function: Callable[..., Any], options: Mapping[str, Any], name: str) -> RewardFunction:
    """A reward function with options set. Raises ValueError for an option it doesn't have."""
    takes = inspect.signature(function).parameters
    for option in options:
        if option not in takes:
            raise ValueError(f"reward {name!r} has no option {option!r}{_nearest(option, list(takes))}")
    if "completions" in takes or "completion_ids" in takes:
        return functools.partial(function, **options)
    made: Any = function(**options)
    if not callable(made):
        raise ValueError(f"reward {name!r} makes a {type(made).__name__}, not a function")
    return made


def _find(name: str) -> RewardFunction:
    if name in REWARDS:
        return REWARDS[name]
    module_name, _, attribute = name.partition(":") if ":" in name else name.rpartition(".")
    if not module_name or not attribute:
        raise ValueError(
            f"reward {name!r} is unknown{_nearest(name, list(REWARDS))}; built in: {', '.join(REWARDS)}; "
            "your own: package.module.function"
        )
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # user code runs on import and may raise anything
        raise ValueError(
            f"reward {name!r}: importing {module_name!r} failed with {type(error).__name__}: {error}"
        ) from error
    function: Any = getattr(module, attribute, None)
    if not callable(function):
        names = [key for key, value in vars(module).items() if callable(value)]
        raise ValueError(
            f"reward {name!r}: module {module_name!r} has no function {attribute!r}" + _nearest(attribute, names)
        )
    return function


def _nearest(name: str, known: Sequence[str]) -> str:
    match = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""
