"""Two expressions -> whether they have the same value, through tiers from cheap to dear, and which tier said so.

The same tree; exact rationals; equal forms (normal.py); points that reject (numeric.py); and sympy, in a process of
its own, that accepts (symbolic.py).
"""

from fractions import Fraction
from typing import NamedTuple

from rewards.maths import normal, numeric, symbolic
from rewards.maths.tree import Constant, Function, Node, Number, Power, Product, Quantity, Sum, Variable

EXPRESSIONS = Number | Constant | Variable | Sum | Product | Power | Function
TIME_LIMIT = 0.7
"""Seconds of CPU for sympy, so that with everything around it no verdict takes one on an idle core."""
MINUS_ONE = Number(Fraction(-1))


class Finding(NamedTuple):
    """What a comparison found."""

    equal: bool
    reason: str
    """The tier that decided (`rational`, `structural`, `numeric`, `symbolic`), or what differs (`unit`, `order`)."""


def values(left: Node, right: Node) -> Finding:
    """Whether two expressions have the same value wherever both have one. RuntimeError where sympy can't be asked."""
    if left == right:
        return Finding(True, "structural")
    infinite = [_infinite(node) for node in (left, right)]
    if any(infinite):
        return Finding(infinite[0] == infinite[1], "infinity")
    if not (isinstance(left, EXPRESSIONS | Quantity) and isinstance(right, EXPRESSIONS | Quantity)):
        return Finding(False, "kind")
    costly = False
    try:
        a, b = normal.form(left).rational(), normal.form(right).rational()
        if a is not None and b is not None:
            return Finding(a == b, "rational")
        if normal.equal(left, right):
            return Finding(True, "structural")
    except normal.TooCostly:
        costly = True
    except normal.Undefined:
        return Finding(False, "undefined")
    except ValueError:
        return Finding(False, "kind")
    different = numeric.differ(left, right)
    if different is None and not costly and _endless(left, right) and _for_sympy(left) and _for_sympy(right):
        return Finding(_proved(left, right).equal is True, "symbolic")
    if different is None:
        return Finding(False, "too-costly" if costly else "structural")
    if different:
        return Finding(False, "numeric")
    if not (_for_sympy(left) and _for_sympy(right)):
        return Finding(numeric.is_analytic(left) and numeric.is_analytic(right), "numeric")
    decision = _proved(left, right)
    if not (numeric.is_analytic(left) and numeric.is_analytic(right)):
        return Finding(decision.equal is True and decision.reason != "positive", "symbolic")
    # Sixty digits agreed at every point that was tried. Only a proof of the contrary outweighs that.
    return Finding(decision.equal is not False, "symbolic" if decision.equal is not None else "numeric")


def _proved(left: Node, right: Node) -> symbolic.Decision:
    """What sympy says; RuntimeError where it could not be asked, for then nobody can say."""
    decision = symbolic.equal(left, right, time_limit=TIME_LIMIT)
    if not decision.asked:
        raise RuntimeError(f"sympy gave no answer: {decision.reason}")
    return decision


def _infinite(node: Node) -> int:
    """The sign of ±∞; 0 for anything else."""
    if node == Constant("infinity"):
        return 1
    if isinstance(node, Product) and node.factors == (MINUS_ONE, Constant("infinity")):
        return -1
    return 0


def _endless(*nodes: Node) -> bool:
    """Whether there is a series in them."""
    return any(node == Constant("infinity") or _endless(*numeric.children(node)) for node in nodes)


def _for_sympy(node: Node) -> bool:
    """Whether every node is of a kind the workers take."""
    return isinstance(node, EXPRESSIONS) and all(map(_for_sympy, numeric.children(node)))
