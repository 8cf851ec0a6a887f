"""A Python value <-> plain JSON that keeps its type, for arguments and results that cross the jail's wall.

None, bool, 64-bit int, finite float, str and list are themselves; anything else is an object with one key, its
type: `{"tuple": [1, 2]}`, `{"dict": [[key, value], …]}`. A subclass of a built-in type counts as that type, read by
the built-in's own methods, unless it defines how it compares. Iterators are drained. Left out: instances of other
classes.
"""

import itertools
import math
from collections import Counter, OrderedDict, defaultdict
from types import FunctionType, GeneratorType
from typing import Any

MAX_DEPTH = 60
MAX_NODES = 1 << 18
ITERATORS: tuple[type, ...] = (
    GeneratorType, map, filter, zip, enumerate, reversed, itertools.chain, itertools.islice, itertools.accumulate,
    type(iter([])), type(iter(())), type(iter("")), type(iter({})), type(iter(set())), type(iter(range(0))),
    type({}.keys()), type({}.values()), type({}.items()),
)  # fmt: skip
BUILT_IN = (bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset)
COMPARES_AS_DICT = (Counter, OrderedDict, defaultdict)


class NotPlainError(Exception):
    """A value that can't cross; `overrides` says whether its class defines how it compares."""

    def __init__(self, what: str, *, overrides: bool = False) -> None:
        super().__init__(what)
        self.overrides = overrides


def encode(value: Any) -> Any:
    """Of the candidate's result, in its own process. Raises NotPlainError, and what a drained iterator raises."""
    return _encode(value, MAX_DEPTH, itertools.count(1))


def _encode(value: Any, depth: int, nodes: "itertools.count[int]") -> Any:
    if depth == 0 or next(nodes) > MAX_NODES:
        raise NotPlainError(f"a value deeper than {MAX_DEPTH} levels or larger than {MAX_NODES} parts")

    def each(items: Any) -> list[Any]:
        return [_encode(item, depth - 1, nodes) for item in items]

    kind = type(value)
    base = kind if kind in BUILT_IN else _base(kind)
    if value is None or base is bool:
        return value
    if base is int:
        number = int.__int__(value)
        return number if -(1 << 63) <= number < 1 << 63 else {"int": hex(number)}
    if base is float:
        real = float.__float__(value)
        return real if math.isfinite(real) else {"float": repr(real)}
    if base is complex:
        return {"complex": [_encode(part, 2, nodes) for part in (complex.__add__(value, 0).real, value.imag)]}
    if base is str:
        return str.__str__(value)
    if base is bytes:
        return {"bytes": bytes.__getitem__(value, slice(None)).decode("latin-1")}
    if base is list:
        return each(list.__iter__(value))
    if base is dict:
        return {"dict": [each(pair) for pair in dict.items(value)]}
    if base in (tuple, set, frozenset):
        return {base.__name__: each(base.__iter__(value))}
    if kind is range:
        return {"range": each((value.start, value.stop, value.step))}
    if kind in ITERATORS:
        return {"iterator": each(value)}
    raise NotPlainError(f"a {kind.__name__}", overrides=_overrides(kind))


def _base(kind: type) -> type | None:
    """The built-in type that a class extends without changing how it compares."""
    if kind in COMPARES_AS_DICT:
        return dict
    base = next((base for base in BUILT_IN if base in type.mro(kind)), None)
    return base if base and type.__getattribute__(kind, "__eq__") is base.__eq__ else None


def _overrides(kind: type) -> bool:
    return type(type.__getattribute__(kind, "__eq__")) is FunctionType


def decode(node: Any) -> Any:
    """The value of what `encode` gave, built from built-in types only. Raises ValueError for anything else."""
    if isinstance(node, list):
        return [decode(item) for item in node]
    if not isinstance(node, dict):
        return node
    if len(node) != 1:
        raise ValueError(f"an object with {len(node)} keys for a value")
    ((kind, content),) = node.items()
    if kind == "dict":
        return {decode(key): decode(value) for key, value in content}
    if kind == "int":
        return int(content, 16)
    if kind == "float":
        return float(content)
    if kind == "bytes":
        return content.encode("latin-1")
    items = decode(content)
    if kind == "iterator":
        return iter(items)
    if kind in ("complex", "range"):
        return (complex if kind == "complex" else range)(*items)
    if kind in ("tuple", "set", "frozenset"):
        return {"tuple": tuple, "set": set, "frozenset": frozenset}[kind](items)
    raise ValueError(f"a value of kind {kind!r}")
