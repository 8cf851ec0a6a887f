"""Outputs and values are judged outside, by bytes and by encoded type."""

import time
from collections import Counter, OrderedDict, namedtuple
from typing import Any

import pytest

from rewards.sandbox.backend import read_answer
from rewards.sandbox.judge import same_output, same_value
from rewards.sandbox.values import NotPlainError, decode, encode

Pair = namedtuple("Pair", "a b")


@pytest.mark.parametrize(
    ("expected", "output", "same"),
    [
        ("1\n2", b"1  \r\n2\n\n\n", True),
        ("", b"\n \n", True),
        ("é", "é".encode(), True),
        ("1\n2", b"1\n", False),
        ("1", b"1\n2", False),
        ("1\n2", b"1\n\n2", False),
        (" 1", b"1", False),
        ("é", b"\xe9", False),
    ],
)
def test_outputs_are_compared_whole(expected: str, output: bytes, same: bool) -> None:
    assert same_output(expected, output) is same


VALUES: list[Any] = [
    None, True, 3, -(1 << 63), 1 << 200, -(1 << 200), 1.5, float("inf"), 1 + 2j, "a\ud800", b"\x00\xff", [1, [2]],
    (1, (2,)), {"a": 1, 2: (3,)}, {1, 2}, frozenset({1}), range(3), Counter("aab"), OrderedDict(a=1), Pair(1, 2),
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_value_comes_back_equal_and_plain(value: Any) -> None:
    node = encode(value)
    assert decode(node) == value
    assert type(decode(node)).__module__ == "builtins"
    assert same_value(node, node, exact=False)


def test_python_equality_across_types() -> None:
    for a, b in [(1, 1.0), (True, 1), ({1: 2}, {1.0: 2}), ({1}, frozenset({1})), (1 << 70, 2.0**70)]:
        assert same_value(encode(a), encode(b), exact=False), (a, b)
        assert not same_value(encode(a), encode(b), exact=True), (a, b)
    for a, b in [((1,), [1]), ("1", 1), (float("nan"), float("nan")), ({1: 2}, {2: 1}), (None, False), ("a", b"a")]:
        assert not same_value(encode(a), encode(b), exact=False), (a, b)
    assert same_value(0.0, -0.0, exact=True)
    assert same_value({"set": [1, 2]}, {"set": [2, 1]}, exact=False)
    assert same_value(encode([1, {"a": None}]), encode((1, {"a": None})), exact=True)
    assert not same_value(encode(iter([1])), encode(iter([1])), exact=False)


def test_classes_that_compare_in_their_own_way_are_told_apart() -> None:
    class Sly(list):  # type: ignore[type-arg]
        def __eq__(self, other: object) -> bool:
            return True

    class Meta(type):
        def __getattribute__(cls, name: str) -> Any:
            return list.__eq__ if name == "__eq__" else super().__getattribute__(name)

    class Slyer(Sly, metaclass=Meta):
        pass

    class Bag(list):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            return iter([42])

    for value in (Sly(), [Slyer()], {"a": (Sly(),)}):
        with pytest.raises(NotPlainError) as refusal:
            encode(value)
        assert refusal.value.overrides
    with pytest.raises(NotPlainError) as refusal:
        encode(object())
    assert not refusal.value.overrides
    assert encode(Bag([1])) == [1]  # read by list's own methods


def test_depth_and_size_are_bounded() -> None:
    deep: list[Any] = []
    for _ in range(100):
        deep = [deep]
    endless: list[Any] = []
    endless.append(endless)
    for value in (deep, endless, [0] * (1 << 19)):
        with pytest.raises(NotPlainError, match="deeper"):
            encode(value)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"[]", b"{}", b'{"value": NaN}', b'{"value": 1e999}', b'{"value": {}}', b'{"value": {"a": 1, "b": 2}}',
        b'{"value": {"dict": [[1]]}}', b'{"value": {"dict": [1]}}', b'{"value": {"code": "x"}}', b"\xff",
        b'{"value": {"int": "zz"}}', b'{"value": {"set": 1}}', b'{"passed": true}', b'{"error": 1, "text": ""}',
        b'{"value": ' + b"[" * 200 + b"]" * 200 + b"}", b'{"value": ' + b"[" * 100_000,
        b'{"value": {"iterator": [{"nothing": 1}]}}',
    ],
    ids=lambda data: repr(data[:30]),
)  # fmt: skip
def test_what_is_no_value_is_a_bad_result(data: bytes) -> None:
    assert read_answer(data).status == "hack/bad-result"


def test_colliding_integers_cost_nothing() -> None:
    """In a set of Python's they would take a minute."""
    node = {"set": [{"int": hex(i * ((1 << 61) - 1))} for i in range(1, 40_000)]}
    began = time.perf_counter()
    assert same_value(node, node, exact=False)
    assert time.perf_counter() - began < 5.0
