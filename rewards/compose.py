"""Values of several rewards, weights and gates -> one value a completion; unknown where what counts is unknown.

A gate lets a reward count only where another one is 1: `{"format": "accuracy"}` pays for the format of right answers
only. Left out: calling rewards with time limits (rl/score.py).
"""

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import rewards

Reward = str | Callable[..., Any]


def compose(
    parts: Mapping[Reward, float], *, gates: Mapping[str, str] | None = None, name: str = "reward"
) -> rewards.RewardFunction:
    """One reward function, with TRL's signature, of several: name or callable -> weight.

    gates: reward -> the reward that must be 1 for it to count, both by their names (`reward_name`).
    A row is None where a part that counts is None. Each part's mean goes to `log_metric`, as `rewards/<name>/mean`.
    Raises ValueError for an unknown reward or gate.
    """
    weights = named(parts)
    check_gates(gates or {}, weights)
    functions = {reward_name(part): rewards.resolve(part) if isinstance(part, str) else part for part in parts}
    if later := [name for name, function in functions.items() if inspect.iscoroutinefunction(function)]:
        raise ValueError(f"parts: {later[0]!r} is async; give a plain function")

    def composed(**arguments: Any) -> list[float | None]:
        values = {part: [_or_nan(value) for value in function(**arguments)] for part, function in functions.items()}
        if log := arguments.get("log_metric"):
            for part, column in values.items():
                if known := [value for value in column if not math.isnan(value)]:
                    log(f"rewards/{part}/mean", math.fsum(known) / len(known))
        return [None if math.isnan(total) else total for total in weighted_sum(values, weights, gates or {})]

    composed.__name__ = composed.__qualname__ = name
    return composed


def weighted_sum(
    values: Mapping[str, Sequence[float]], weights: Mapping[str, float], gates: Mapping[str, str]
) -> list[float]:
    """One sum a row: weight × value of every reward whose gate is open; NaN where what counts is unknown.

    values: reward -> its unweighted values, NaN = unknown. A gated reward counts where its gate, and that one's gate,
    and so on, are all 1. A reward of weight 0 is no part of the sum, but may be a gate.
    """
    counted = [name for name, weight in weights.items() if weight != 0]
    rows = len(next(iter(values.values()), ()))
    return [
        math.fsum(weights[name] * _gated(name, {part: values[part][row] for part in values}, gates) for name in counted)
        for row in range(rows)
    ]


def check_gates(gates: Mapping[str, str], names: Sequence[str] | Mapping[str, Any]) -> None:
    """Raises ValueError for a gate between rewards that aren't both there, or one that waits for itself."""
    for gated, gate in gates.items():
        for name in (gated, gate):
            if name not in names:
                near = difflib.get_close_matches(name, list(names), n=1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                raise ValueError(f"gates: {name!r} is not one of the rewards{hint}: {', '.join(names)}")
    for start in gates:
        chain = [start]
        while chain[-1] in gates:
            chain.append(gates[chain[-1]])
            if chain[-1] in chain[:-1]:
                raise ValueError(f"gates: {' waits for '.join(chain)}, so none can ever open; drop one")


def named(parts: Mapping[Reward, float]) -> dict[str, float]:
    """Name -> weight. Raises ValueError for no rewards, two of a name, or a weight that isn't finite."""
    if not parts:
        raise ValueError("rewards is empty: give at least one reward function and its weight")
    weights: dict[str, float] = {}
    for part, weight in parts.items():
        name = reward_name(part)
        if name in weights:
            raise ValueError(f"rewards: two functions are called {name!r}; rename one")
        if not math.isfinite(weight):
            raise ValueError(f"rewards: the weight of {name!r} is {weight}; use a finite number")
        weights[name] = weight
    return weights


def reward_name(reward: Reward) -> str:
    """What metrics call a reward: a name as it was given; of a callable, what TRL calls it."""
    while isinstance(reward, functools.partial):
        reward = reward.func
    return reward if isinstance(reward, str) else getattr(reward, "__name__", type(reward).__name__)


def _gated(name: str, row: Mapping[str, float], gates: Mapping[str, str]) -> float:
    """A reward's value in one row, 0 behind a closed gate, NaN if it or what opens its gate is unknown."""
    value, behind = row[name], []
    while name in gates:
        name = gates[name]
        behind.append(row[name])
    if value == 0 or any(gate != 1 and not math.isnan(gate) for gate in behind):
        return 0.0
    return value if all(gate == 1 for gate in behind) else math.nan


def _or_nan(value: Any) -> float:
    return math.nan if value is None else float(value)
