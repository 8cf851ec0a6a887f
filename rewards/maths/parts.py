"""An answer -> what it is made of: the value behind its name, a chain's links, a list's items, the two of a ±.

Left out: whether two answers are the same (rewards/maths/compare.py).
"""

import itertools
from collections.abc import Sequence

from rewards.maths import numeric
from rewards.maths.tree import (
    Collection,
    Constant,
    Either,
    Function,
    Matrix,
    Node,
    PlusMinus,
    Power,
    Product,
    Quantity,
    Ratio,
    Relation,
    Sum,
    Variable,
    replaced,
)
from rewards.maths.values import MINUS_ONE, values


def settled(node: Node) -> Node:
    """One spelling for things that say the same: a one-element set, x = ±1, exact values before an ≈."""
    if isinstance(node, Collection) and node.brackets in ("{}", "") and len(node.items) == 1:
        if isinstance(node.items[0], Collection) or node.items[0] == Constant("empty"):
            return node
        return settled(node.items[0])
    if isinstance(node, Sum | Product) and (matrix := _combined(node)):
        return matrix
    if isinstance(node, Relation) and "≈" in node.operators:
        exact = node.operators.index("≈")
        if exact == 0 and not isinstance(node.terms[0], Variable | Function):
            return settled(node.terms[0])
        if exact == 0:
            return Relation(node.terms[:2], ("=",))
        return settled(Relation(node.terms[: exact + 1], node.operators[:exact]))
    if isinstance(node, Relation) and set(node.operators) == {"="}:
        name, chain = named(node)
        if name is None and chain:
            return chain[-1] if chain_holds(chain) else node
        if chain and has_sign(chain[-1]):
            return Collection("{}", tuple(Relation((name, value), ("=",)) for value in both_signs(chain[-1])))  # type: ignore[arg-type]
    if isinstance(node, Relation) and node.operators == ("∈",) and isinstance(node.terms[1], Collection):
        if node.terms[1].brackets == "{}":
            return node.terms[1]
    if (family := _family(node)) is not None:
        return family
    listed = isinstance(node, Collection) and node.brackets in ("", "{}")
    if has_sign(node) and not isinstance(node, Relation | Either) and not listed:
        return Collection("{}", tuple(both_signs(node)))
    return node


def _family(node: Node) -> Node | None:
    """2kπ, k ∈ ℤ (or the set of these) with its index by a name of its own: which letter it was doesn't matter."""
    if isinstance(node, Function) and node.name == "set":
        element, condition = node.arguments
    elif isinstance(node, Collection) and len(node.items) == 2:
        element, condition = node.items
    else:
        return None
    if not (isinstance(condition, Relation) and condition.operators == ("∈",)):
        return None
    index, domain = condition.terms
    if isinstance(element, Relation):
        _, chain = named(element)
        element = chain[-1] if chain else element
    if not isinstance(index, Variable) or not contains([element], index):
        return None
    return Function("family", (replaced(element, index, Variable("index")), domain))


def _combined(node: Sum | Product) -> Matrix | None:
    """A sum of matrices, or numbers times one, as one matrix."""
    if isinstance(node, Sum):
        parts = [_combined(term) if isinstance(term, Product) else term for term in node.terms]
        matrices = [part for part in parts if isinstance(part, Matrix)]
        if len(matrices) < len(parts) or len({tuple(map(len, matrix.rows)) for matrix in matrices}) != 1:
            return None
        rows = zip(*(matrix.rows for matrix in matrices), strict=True)
        return Matrix(tuple(tuple(Sum(entries) for entries in zip(*row, strict=True)) for row in rows))
    matrices = [factor for factor in node.factors if isinstance(factor, Matrix)]
    if len(matrices) != 1:
        return None
    scalars = tuple(factor for factor in node.factors if not isinstance(factor, Matrix))
    return Matrix(tuple(tuple(Product((*scalars, entry)) for entry in row) for row in matrices[0].rows))


def named(relation: Relation) -> tuple[Node | None, list[Node]]:
    """x and [1/2, 2/4] of `x = 1/2 = 2/4`; None and the terms where all are values; no terms where it is neither."""
    if set(relation.operators) != {"="}:
        return None, []
    first, *rest = relation.terms
    if _is_name(first) and not contains(rest, first):
        return first, rest
    if len(rest) == 1 and _is_name(rest[0]) and not contains([first], rest[0]):
        return rest[0], [first]
    if not any(numeric.variables(term) for term in relation.terms) or chain_holds(list(relation.terms)):
        return None, list(relation.terms)
    return None, []


def _is_name(node: Node) -> bool:
    if isinstance(node, Variable):
        return True
    if isinstance(node, Function):
        if node.name == "abs":  # the length |AB|, not |x| = 5
            inside = node.arguments[0]
            return isinstance(inside, Product | Function) and _is_name(inside)
        return bool(numeric.variables(node)) or node.name == "det" or len(node.name.rstrip("'")) == 1
    if isinstance(node, Product):  # the segment AB, the derivative dy/dx
        factors = [f.base if isinstance(f, Power) and f.exponent == MINUS_ONE else f for f in node.factors]
        if factors != list(node.factors) and all(map(_is_name, factors)):  # the quotient AB/CD
            return all(isinstance(f, Product | Function) for f in factors)
        letters = [factor for factor in node.factors if isinstance(factor, Variable) and len(factor.name) == 1]
        if len(letters) == len(node.factors) and len(letters) < 4:
            return all(letter.name.isupper() for letter in letters)
        return all(map(_is_differential, node.factors)) and len(node.factors) == 2
    if isinstance(node, Ratio):
        return all(map(_is_name, node.parts))
    return isinstance(node, Collection) and node.brackets in ("()", "") and all(map(_is_name, node.items))


def _is_differential(node: Node) -> bool:
    if isinstance(node, Power) and node.exponent == MINUS_ONE:
        node = node.base
    return isinstance(node, Product) and len(node.factors) == 2 and node.factors[0] == Variable("d")


def contains(nodes: Sequence[Node], part: Node) -> bool:
    return any(node == part or contains(list(numeric.children(node)), part) for node in nodes)


def chain_holds(chain: list[Node]) -> bool:
    return all(values(a, b).equal for a, b in itertools.pairwise(chain))


def is_list(node: Node) -> bool:
    return isinstance(node, Either) or (isinstance(node, Collection) and node.brackets in ("", "{}"))


def elements(node: Node) -> list[Node]:
    """The answers in a list, set or alternative: ± as two, and without a name that all of them share."""
    items: Sequence[Node] = (node,)
    if isinstance(node, Either):
        items = node.branches
    elif isinstance(node, Collection) and node.brackets in ("", "{}"):
        items = node.items
    expanded = [part for item in items for part in both_signs(item)]
    flat = [inner for part in expanded for inner in (elements(part) if isinstance(part, Either) else [part])]
    names = {named(item)[0] for item in flat if isinstance(item, Relation) and named(item)[1]}
    if len(names) == 1 and None not in names:
        return [value_of(item) for item in flat]
    return flat


def value_of(item: Node) -> Node:
    if isinstance(item, Relation):
        _, chain = named(item)
        if chain and chain_holds(chain):
            return chain[-1]
    return item


def has_sign(node: Node) -> bool:
    return isinstance(node, PlusMinus) or any(map(has_sign, numeric.children(node)))


def both_signs(node: Node) -> list[Node]:
    """All signs read as the upper one, then as the lower one; the node itself if it has no ±."""
    return [_signed(node, 1), _signed(node, -1)] if has_sign(node) else [node]


def _signed(node: Node, sign: int) -> Node:
    match node:
        case PlusMinus(term, upper):
            value = _signed(term, sign)
            return value if upper * sign > 0 else Product((MINUS_ONE, value))
        case Sum(terms):
            return Sum(tuple(_signed(term, sign) for term in terms))
        case Product(factors):
            return Product(tuple(_signed(factor, sign) for factor in factors))
        case Power(base, exponent):
            return Power(_signed(base, sign), _signed(exponent, sign))
        case Function(name, arguments):
            return Function(name, tuple(_signed(argument, sign) for argument in arguments))
        case Relation(terms, operators):
            return Relation(tuple(_signed(term, sign) for term in terms), operators)
        case Collection(brackets, items):
            return Collection(brackets, tuple(_signed(item, sign) for item in items))
        case Quantity(value, unit):
            return Quantity(_signed(value, sign), unit)
    return node
