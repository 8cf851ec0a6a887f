"""Intervals, inequalities and set operations -> a set of real numbers as sorted, disjoint intervals.

So [0, 1) is 0 ≤ x < 1, and ℝ∖{2} is x ≠ 2. Left out: bounds with variables in them, and inequalities that are not
solved for their variable.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from rewards.maths import numeric
from rewards.maths.parts import both_signs, has_sign
from rewards.maths.tree import (
    Collection,
    Constant,
    Either,
    Function,
    Node,
    Number,
    Power,
    Product,
    Relation,
    SetOperation,
    Sum,
    Variable,
)

INFINITY = Constant("infinity")
_FLIPPED = {"<": ">", ">": "<", "≤": "≥", "≥": "≤"}


class NotASet(ValueError):
    """What it was read from is no set of real numbers with known bounds."""


@dataclass(frozen=True, slots=True)
class Bound:
    """One end of an interval."""

    value: float
    """What it is sorted by."""
    exact: Node
    closed: bool


@dataclass(frozen=True, slots=True)
class Interval:
    """From low to high; a point where both are the same and closed."""

    low: Bound
    high: Bound


Region = tuple[Interval, ...]
_EVERYTHING: Region = (
    Interval(Bound(-math.inf, Product((Number(Fraction(-1)), INFINITY)), False), Bound(math.inf, INFINITY, False)),
)


def region(node: Node) -> tuple[Region, str]:
    """The real numbers meant, and the variable they are values of ("" if none is named). Raises NotASet."""
    try:
        return _region(node)
    except (numeric.NoValue, ArithmeticError, ValueError) as error:
        raise NotASet(str(error)) from None


def _region(node: Node) -> tuple[Region, str]:
    match node:
        case Constant("empty"):
            return (), ""
        case Constant("reals"):
            return _EVERYTHING, ""
        case Constant("reals+"):
            return (Interval(_bound(Number(Fraction(0)), False), _EVERYTHING[0].high),), ""
        case Collection("{}", items):
            return _union([_point(item) for item in items]), ""
        case Collection("()" | "[)" | "(]" | "[]", (low, high)):
            interval = Interval(_bound(low, node.brackets[0] == "["), _bound(high, node.brackets[1] == "]"))
            return _union([interval] if interval.low.value <= interval.high.value else _fail("bounds"), merge=False), ""
        case SetOperation(operator, parts):
            regions = [_region(part)[0] for part in parts]
            result = regions[0]
            for other in regions[1:]:
                if operator == "∪":
                    result = _union([*result, *other])
                else:
                    result = _intersection(result, other if operator == "∩" else _complement(other))
            return result, ""
        case Either(branches):
            found = [_region(branch) for branch in branches]
            return _union([interval for part, _ in found for interval in part]), _one_name(name for _, name in found)
        case Collection("", items) if all(isinstance(item, Relation) for item in items):
            found = [_region(item) for item in items]
            name, result = _one_name(name for _, name in found), _EVERYTHING
            for part, _ in found:
                result = _intersection(result, part)
            # x < 1, x > 3 lists the parts of a union
            return result or _union([interval for part, _ in found for interval in part]), name
        case Relation(_, operators) if has_sign(node):
            upper, lower = (_region(branch)[0] for branch in both_signs(node))
            name = next((term.name for term in node.terms if isinstance(term, Variable)), "")
            return (_intersection(upper, lower) if operators == ("≠",) else _union([*upper, *lower])), name
        case Relation(terms, operators):
            result = _EVERYTHING
            names: list[str] = []
            for left, operator, right in zip(terms, operators, terms[1:], strict=False):
                part, name = _solved(left, operator, right)
                result, names = _intersection(result, part), [*names, name]
            return result, _one_name(names)
    raise NotASet(f"a {type(node).__name__}")


def _solved(left: Node, operator: str, right: Node) -> tuple[Region, str]:
    if isinstance(left, Variable) and operator in "∈∉":
        inside = _region(right)[0]
        return (inside if operator == "∈" else _complement(inside)), left.name
    if isinstance(right, Variable) and not isinstance(left, Variable):
        left, right, operator = right, left, _FLIPPED.get(operator, operator)
    if isinstance(left, Function) and left.name == "abs" and operator in "<≤>≥":
        return _absolute(left.arguments[0], operator, right)
    if isinstance(left, Power) and left.exponent == Number(Fraction(2)) and operator in "<≤>≥":
        return _absolute(left.base, operator, Power(right, Number(Fraction(1, 2))))
    if not isinstance(left, Variable):
        raise NotASet("not solved for a variable")
    return _compared(operator, right), left.name


def _compared(operator: str, right: Node) -> Region:
    low, high = _EVERYTHING[0].low, _EVERYTHING[0].high
    match operator:
        case "<" | "≤":
            return (Interval(low, _bound(right, operator == "≤")),)
        case ">" | "≥":
            return (Interval(_bound(right, operator == "≥"), high),)
        case "=":
            return (_point(right),)
        case "≠":
            return _complement((_point(right),))
    raise NotASet(operator)


def _absolute(inside: Node, operator: str, radius: Node) -> tuple[Region, str]:
    """|x − c| < r as the interval around c, |x − c| > r as what is outside."""
    match inside:
        case Variable(name):
            centre: Node = Number(Fraction(0))
        case Sum((Variable(name), rest)):
            centre = Product((Number(Fraction(-1)), rest))
        case _:
            raise NotASet("an absolute value of something else")
    low, high = Sum((centre, Product((Number(Fraction(-1)), radius)))), Sum((centre, radius))
    if numeric.constant_value(radius) <= 0:
        raise NotASet("a radius that is not positive")
    if operator in "<≤":
        return (Interval(_bound(low, operator == "≤"), _bound(high, operator == "≤")),), name
    return _complement((Interval(_bound(low, operator == ">"), _bound(high, operator == ">")),)), name


def _bound(node: Node, closed: bool) -> Bound:
    value = numeric.constant_value(node)
    return Bound(value, node, closed and not math.isinf(value))


def _point(node: Node) -> Interval:
    bound = _bound(node, True)
    if math.isinf(bound.value):
        raise NotASet("a point at infinity")
    return Interval(bound, bound)


def _one_name(names: Iterable[str]) -> str:
    found = {name for name in names if name}
    if len(found) > 1:
        raise NotASet("several variables")
    return found.pop() if found else ""


def _fail(what: str) -> list[Interval]:
    raise NotASet(what)


def _union(intervals: list[Interval], merge: bool = True) -> Region:
    result: list[Interval] = []
    for interval in sorted(intervals, key=lambda i: (i.low.value, not i.low.closed)):
        if interval.low.value == interval.high.value and not (interval.low.closed and interval.high.closed):
            continue
        if result and merge:
            last = result[-1]
            if interval.low.value < last.high.value or (
                interval.low.value == last.high.value and (interval.low.closed or last.high.closed)
            ):
                further = (interval.high.value, interval.high.closed) > (last.high.value, last.high.closed)
                result[-1] = Interval(last.low, interval.high if further else last.high)
                continue
        result.append(interval)
    return tuple(result)


def _complement(parts: Region) -> Region:
    result, low = [], _EVERYTHING[0].low
    for interval in parts:
        end = Bound(interval.low.value, interval.low.exact, not interval.low.closed)
        if interval.low.value > -math.inf:
            result.append(Interval(low, end))
        low = Bound(interval.high.value, interval.high.exact, not interval.high.closed)
    if low.value < math.inf:
        result.append(Interval(low, _EVERYTHING[0].high))
    return _union(result)


def _intersection(a: Region, b: Region) -> Region:
    return _complement(_union([*_complement(a), *_complement(b)]))
