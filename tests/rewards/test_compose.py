"""Sums with weights and gates: by hand, and against every value that the unknown could have had."""

import itertools
import math
from functools import partial
from typing import Any

import pytest

from rewards.compose import check_gates, compose, reward_name, weighted_sum

NAN = math.nan
WEIGHTS = {"accuracy": 1.0, "format": 10.0, "brevity": 100.0}  # so different that no two sums agree by chance


def _sum(gates: dict[str, str], weights: dict[str, float] = WEIGHTS, **row: float) -> float:
    (total,) = weighted_sum({name: [value] for name, value in row.items()}, weights, gates)
    return total


@pytest.mark.parametrize(
    ("row", "total"),
    [
        ((1, 1), 11),
        ((1, 0.5), 6),
        ((0, 1), 0),
        ((0.5, 1), 0.5),  # only 1 opens a gate
        ((0, NAN), 0),  # the format doesn't matter
        ((1, NAN), NAN),
        ((NAN, 0), NAN),  # the accuracy itself is paid
    ],
)
def test_a_gated_reward_counts_where_its_gate_is_one(row: tuple[float, float], total: float) -> None:
    got = _sum({"format": "accuracy"}, {"accuracy": 1.0, "format": 10.0}, accuracy=row[0], format=row[1])
    assert got == pytest.approx(total, nan_ok=True)


def test_a_gate_that_is_not_paid_is_unknown_only_where_it_matters() -> None:
    weights = {"accuracy": 0.0, "format": 10.0}
    cases = {(NAN, 1): NAN, (NAN, 0): 0.0, (1, 1): 10.0, (0, 1): 0.0}
    for (accuracy, form), total in cases.items():
        got = _sum({"format": "accuracy"}, weights, accuracy=accuracy, format=form)
        assert got == pytest.approx(total, nan_ok=True)


def test_a_gate_behind_a_closed_gate_is_closed() -> None:
    gates = {"brevity": "format", "format": "accuracy"}
    assert _sum(gates, accuracy=1, format=1, brevity=1) == 111
    assert _sum(gates, accuracy=0, format=1, brevity=1) == 0
    assert _sum(gates, accuracy=1, format=0, brevity=1) == 1


GATES: list[dict[str, str]] = [
    {},
    {"format": "accuracy"},
    {"format": "accuracy", "brevity": "accuracy"},
    {"brevity": "format", "format": "accuracy"},
]


@pytest.mark.parametrize("gates", GATES, ids=range(4))
@pytest.mark.parametrize("free", [(), ("accuracy",), ("accuracy", "format")])
def test_a_sum_is_known_where_every_value_of_the_unknown_gives_the_same(
    gates: dict[str, str], free: tuple[str, ...]
) -> None:
    weights = {name: 0.0 if name in free else weight for name, weight in WEIGHTS.items()}
    for row in itertools.product([0.0, 0.5, 1.0, NAN], repeat=3):
        possible = {
            _sum(gates, weights, **dict(zip(WEIGHTS, filled, strict=True)))
            for filled in itertools.product(*([0.0, 0.5, 1.0] if math.isnan(value) else [value] for value in row))
        }
        got = _sum(gates, weights, **dict(zip(WEIGHTS, row, strict=True)))
        assert got == possible.pop() if len(possible) == 1 else math.isnan(got), row


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        ({"format": "acuracy"}, r"gates: 'acuracy' is not one of the rewards \(did you mean 'accuracy'\?\): accuracy"),
        ({"fromat": "accuracy"}, r"'fromat' is not one of the rewards \(did you mean 'format'\?\)"),
        ({"format": "format"}, "format waits for format, so none can ever open"),
        ({"format": "brevity", "brevity": "format"}, "format waits for brevity waits for format"),
        ({"brevity": "format", "format": "accuracy", "accuracy": "format"}, "waits for"),
    ],
)
def test_a_gate_that_cannot_open_is_refused(gates: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_gates(gates, WEIGHTS)
    with pytest.raises(ValueError, match=message):
        compose(dict.fromkeys(map(_named, WEIGHTS), 1.0), gates=gates)


def _named(name: str) -> Any:
    def reward(values: Any, **_: Any) -> list[float | None]:
        return [row[name] for row in values]

    reward.__name__ = name
    return reward


def test_composed_rewards_are_one_reward_of_trls_kind() -> None:
    logged: list[tuple[str, float]] = []
    reward = compose(
        {_named("accuracy"): 1.0, _named("format"): 0.5}, gates={"format": "accuracy"}, name="right_and_tidy"
    )
    rows = [
        {"accuracy": 1.0, "format": 1.0},
        {"accuracy": 0.0, "format": 1.0},
        {"accuracy": None, "format": 0.0},
        {"accuracy": 0.0, "format": None},
    ]
    arguments = {"prompts": ["p"] * 4, "completions": ["c"] * 4, "completion_ids": [[1]] * 4, "values": rows}
    assert reward(**arguments, log_metric=lambda *pair: logged.append(pair)) == [1.5, 0.0, None, 0.0]
    assert logged == [("rewards/accuracy/mean", pytest.approx(1 / 3)), ("rewards/format/mean", pytest.approx(2 / 3))]
    assert reward(**arguments) == [1.5, 0.0, None, 0.0]
    assert reward_name(reward) == "right_and_tidy"


def test_composed_rewards_may_be_named() -> None:
    reward = compose({"accuracy": 1.0, "rewards.tag_format.format_reward": 0.25})
    texts = [r"<think></think>\boxed{3}", r"<think></think>\boxed{4}"]
    assert reward(prompts=["p"] * 2, completions=texts, completion_ids=[[1]] * 2, answer=["3"] * 2) == [1.25, 0.25]


async def _later(**_: Any) -> list[float]:
    return []


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "rewards is empty"),
        ({"acuracy": 1.0}, "did you mean 'accuracy'"),
        ({"accuracy": NAN}, "weight of 'accuracy' is nan"),
        ({_named("a"): 1.0, _named("a"): 1.0}, "two functions are called 'a'"),
        ({_later: 1.0}, "'_later' is async"),
    ],
)
def test_what_cannot_be_composed_is_refused(parts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compose(parts)


def test_names_are_trls() -> None:
    class Callable:
        def __call__(self, **_: Any) -> list[float]:
            return []

    assert reward_name(partial(partial(_named("a")), x=1)) == "a"
    assert reward_name(Callable()) == "Callable" and reward_name("a.b") == "a.b"
