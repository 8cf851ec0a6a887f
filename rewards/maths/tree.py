"""The typed tree an answer is read into (rewards/maths/parser.py): numbers, expressions, collections, statements.

Nodes are immutable, hashable and know nothing of evaluation. Division is a power of −1, a root is a fractional
power, a decimal is the exact fraction it is written as.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any


class Node:
    """Any part of an answer."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Number(Node):
    """An exact rational."""

    value: Fraction


@dataclass(frozen=True, slots=True)
class Constant(Node):
    """pi, e, i, infinity; or a set: reals, integers, naturals, rationals, complexes, empty."""

    name: str


@dataclass(frozen=True, slots=True)
class Variable(Node):
    """A letter with its subscript, such as x, alpha or a_10."""

    name: str


@dataclass(frozen=True, slots=True)
class Sum(Node):
    """Terms added."""

    terms: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Product(Node):
    """Factors multiplied."""

    factors: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Power(Node):
    """base ^ exponent."""

    base: Node
    exponent: Node


@dataclass(frozen=True, slots=True)
class Function(Node):
    """A function of the tables in rewards/maths/tokens.py, or an unknown one such as f, applied to arguments."""

    name: str
    arguments: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class PlusMinus(Node):
    """±term, or ∓term where `upper` is −1: `upper` is its sign on the upper reading."""

    term: Node
    upper: int


@dataclass(frozen=True, slots=True)
class Quantity(Node):
    """A value with a unit as written (canonical spelling), or with `%`."""

    value: Node
    unit: str


@dataclass(frozen=True, slots=True)
class Collection(Node):
    """Items between brackets: `()`, `[]`, `(]`, `[)`, `{}`, `<>`, or none (`""`): a tuple, interval, set or list."""

    brackets: str
    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Matrix(Node):
    """Rows of entries."""

    rows: tuple[tuple[Node, ...], ...]


@dataclass(frozen=True, slots=True)
class Relation(Node):
    """A chain `terms[0] operators[0] terms[1] ...`; operators are = ≠ < ≤ > ≥ ∈ ∉ ≈ ≡ ~."""

    terms: tuple[Node, ...]
    operators: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SetOperation(Node):
    """∪, ∩ or ∖ of sets, from left to right."""

    operator: str
    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Either(Node):
    """`a or b`: one answer with branches, if the gold has them too; a hedge otherwise."""

    branches: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Ratio(Node):
    """a : b (: c), also a clock time."""

    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Dots(Node):
    """An ellipsis in a list."""


@dataclass(frozen=True, slots=True)
class Text(Node):
    """Words, lower case, single spaces."""

    words: str


def replaced(node: Node, old: Node, new: Node) -> Node:
    """The tree with every `old` in it made `new`."""
    if node == old:
        return new

    def inside(thing: Any) -> Any:
        if isinstance(thing, Node):
            return replaced(thing, old, new)
        return tuple(map(inside, thing)) if isinstance(thing, tuple) else thing

    fields = {name: inside(getattr(node, name)) for name in node.__dataclass_fields__}  # type: ignore[attr-defined]
    return type(node)(**fields)


NODES = {kind.__name__: kind for kind in Node.__subclasses__()}


def to_json(thing: Any) -> Any:
    """A node, fraction, string or tuple of them as lists and strings for JSON."""
    if isinstance(thing, Node):
        names = list(thing.__dataclass_fields__)  # type: ignore[attr-defined]
        return [type(thing).__name__, *(to_json(getattr(thing, name)) for name in names)]
    if isinstance(thing, tuple):
        return ["tuple", *map(to_json, thing)]
    return ["Fraction", str(thing.numerator), str(thing.denominator)] if isinstance(thing, Fraction) else thing
