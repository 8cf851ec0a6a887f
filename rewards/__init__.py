"""Completions in, scores out: each module holds one reward function, and this table gives it a name.

A reward function has TRL's signature, `f(prompts, completions, completion_ids, **columns)` to a list of
floats: plain, deterministic, None where the row can't be judged. Left out: running them with time limits and
weights (rl/score.py).
"""

import difflib
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rewards.math_answer import accuracy
from rewards.tag_format import format_reward

RewardFunction = Callable[..., Sequence[float | None]]

REWARDS: dict[str, RewardFunction] = {"accuracy": accuracy, "format": format_reward}


def resolve(name: str) -> RewardFunction:
    """The reward function of a name: built in, `package.module.function` or `package.module:function`.

    A dotted name is imported; the current directory is searched last. Raises ValueError with the nearest
    known name, or with what failed to import.
    """
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
