r"""Two trees -> whether they are the same answer, and which tier said so.

What is made of values is taken apart until values are compared (values.py). The order of the two sides never matters.

What a careful reader passes over: a unit that only one side gives, `x =` before a value, the brackets of a one-element
set, the sign % (12.5% is 1/8, and 12.5 where the question asked for a percentage). What not: open or closed ends,
the order in a tuple, the number of answers, another unit, another variable.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction

from rewards.maths import normal, regions, units
from rewards.maths.parts import chain_holds, contains, elements, has_sign, is_list, named, settled, value_of
from rewards.maths.tree import (
    Collection,
    Constant,
    Dots,
    Either,
    Function,
    Matrix,
    Node,
    Number,
    Power,
    Product,
    Quantity,
    Ratio,
    Relation,
    SetOperation,
    Sum,
    Text,
    Variable,
    replaced,
)
from rewards.maths.values import EXPRESSIONS, MINUS_ONE, Finding, values

MAX_ITEMS = 60
_FLIPPED = {"<": ">", ">": "<", "≤": "≥", "≥": "≤"}
_HUNDREDTH = Number(Fraction(1, 100))


def compare(left: Node, right: Node) -> Finding:
    """Whether two answers are the same."""
    if left == right:
        return Finding(_consistent(left), "structural")
    left, right = settled(left), settled(right)
    for rule in _RULES:
        finding = rule(left, right)
        if finding is None:
            finding = rule(right, left)
        if finding is not None:
            return finding
    return values(left, right)


# Rules: each gives a finding, or None where it has nothing to say. All are tried both ways round.


def _quantities(left: Node, right: Node) -> Finding | None:
    if not isinstance(left, Quantity):
        return None
    if not isinstance(right, Quantity):
        if isinstance(right, Relation | Collection | Either | Text | Matrix | SetOperation):
            return None
        return _first_equal(_readings(left), [right])
    if left.unit == right.unit:
        return compare(left.value, right.value)
    if left.unit.startswith("_") and right.unit.startswith("_"):
        return _first_equal(_readings(left)[1:], _readings(right)[1:])
    generic = ("unit", "unit^2", "unit^3")
    sizes = units.measure(left.unit), units.measure(right.unit)
    if sizes[0] and sizes[1] and sizes[0][0] == sizes[1][0]:
        return values(*(Product((Number(s[1]), q.value)) for s, q in zip(sizes, (left, right), strict=True)))  # type: ignore[index]
    if left.unit in generic or right.unit in generic or not (sizes[0] or sizes[1] or "°" in left.unit + right.unit):
        return _first_equal(_readings(left), _readings(right))  # 12 ways, 12 possibilities
    return Finding(False, "unit")


def _readings(quantity: Quantity) -> list[Node]:
    """A quantity as the bare number that people write for it, and as what it is worth."""
    if quantity.unit == "%":
        return [quantity.value, Product((quantity.value, _HUNDREDTH))]
    if quantity.unit == "°":
        return [quantity.value, Product((quantity.value, Number(Fraction(1, 180)), Constant("pi")))]
    if quantity.unit.startswith("_") and (value := _in_base(quantity)) is not None:
        return [quantity.value, value]
    return [quantity.value]


def _in_base(quantity: Quantity) -> Node | None:
    """101_2 as 5."""
    try:
        return Number(Fraction(int(str(quantity.value.value), int(quantity.unit[1:]))))  # type: ignore[attr-defined]
    except (ValueError, AttributeError):
        return None


def _hedges(left: Node, right: Node) -> Finding | None:
    """`3 or 4` answers a question whose answer is a list, never one whose answer is 3."""
    if not isinstance(left, Either):
        return None
    if isinstance(right, Relation | SetOperation | Constant) or (
        isinstance(right, Collection) and "{" not in right.brackets
    ):
        if (finding := _regions(left, right)) is not None and finding.equal:
            return finding
    if not is_list(right):
        return Finding(False, "hedge")
    return _unordered(elements(left), elements(right))


def _relations(left: Node, right: Node) -> Finding | None:
    if not isinstance(left, Relation):
        return None
    if (finding := _regions(left, right)) is not None:
        return finding
    if isinstance(right, Relation):
        return _two_relations(left, right)
    name, chain = named(left)
    if chain and _label(name, right):
        if not chain_holds(chain):
            return Finding(False, "inconsistent-chain")
        return compare(chain[-1], right)
    return Finding(False, "kind")


def _two_relations(left: Relation, right: Relation) -> Finding | None:
    (name, chain), (other, other_chain) = named(left), named(right)
    if (
        chain
        and other_chain
        and (name == other or (isinstance(name, Function) and isinstance(other, Function | Variable)))
    ):
        if not (chain_holds(chain) and chain_holds(other_chain)):
            return Finding(False, "inconsistent-chain")
        if isinstance(name, Function) and isinstance(other, Function) and len(name.arguments) == len(other.arguments):
            for letter, its_own in zip(name.arguments, other.arguments, strict=True):  # f(x) = x², f(t) = t²
                if isinstance(letter, Variable) and isinstance(its_own, Variable):
                    other_chain = [replaced(link, its_own, letter) for link in other_chain]
        if (finding := compare(chain[-1], other_chain[-1])).equal:
            return finding
    if len(left.operators) == len(right.operators) == 1:
        return _two_statements(left, right)
    if left.operators != right.operators:  # read from the right
        right = Relation(
            right.terms[::-1], tuple(_FLIPPED.get(operator, operator) for operator in right.operators[::-1])
        )
    if left.operators == right.operators:
        return _all(compare(a, b) for a, b in zip(left.terms, right.terms, strict=True))
    return Finding(False, "structural")


def _two_statements(left: Relation, right: Relation) -> Finding:
    """Equations and inequalities that are each other's multiples: y = 2x + 3 and 2x − y + 3 = 0."""
    (a, b), (c, d) = left.terms, right.terms
    operator, other = left.operators[0], right.operators[0]
    if operator == other and operator not in "=≠" and compare(a, c).equal and compare(b, d).equal:
        return Finding(True, "structural")
    if operator in "∈∉~≡" or other in "∈∉~≡":
        same = operator == other and compare(a, c).equal and compare(b, d).equal
        return Finding(same, "structural")
    try:
        ratio = normal.constant_ratio(_difference(a, b), _difference(c, d), cleared=operator in "=≠")
    except (normal.TooCostly, normal.Undefined, ValueError):
        ratio = None
    if ratio is None:
        return Finding(False, "structural")
    if operator in "=≠":
        return Finding(operator == other, "structural")
    return Finding(other == (operator if ratio > 0 else _FLIPPED.get(operator)), "structural")


def _regions(left: Node, right: Node) -> Finding | None:
    """Two sets of real numbers; None where either is not one."""
    try:
        (a, name), (b, other) = regions.region(left), regions.region(right)
    except regions.NotASet:
        return None
    if name and other and name != other:
        return Finding(False, "variable")
    if len(a) != len(b):
        return Finding(False, "set")
    for p, q in zip(a, b, strict=True):
        for bound, bound_of_other in ((p.low, q.low), (p.high, q.high)):
            if bound.closed != bound_of_other.closed or not values(bound.exact, bound_of_other.exact).equal:
                return Finding(False, "bounds")
    return Finding(True, "set")


def _set_operations(left: Node, right: Node) -> Finding | None:
    if not isinstance(left, SetOperation) and left not in (Constant("reals"), Constant("reals+"), Constant("empty")):
        return None
    if (finding := _regions(left, right)) is not None:
        return finding
    if isinstance(left, SetOperation) and isinstance(right, SetOperation) and left.operator == right.operator:
        order = _in_order if left.operator == "∖" else _unordered
        return order(left.parts, right.parts)
    return Finding(left == right, "kind")


def _lists(left: Node, right: Node) -> Finding | None:
    if not is_list(left):
        return None
    if (finding := _regions(left, right)) is not None and finding.equal:
        return finding
    if isinstance(right, Collection) and right.brackets not in ("", "{}"):  # a tuple or an interval
        if isinstance(left, Collection) and left.brackets == "" and _plain(left):
            return _in_order([value_of(item) for item in left.items], right.items)
        return Finding(False, "kind")
    if isinstance(right, Matrix):
        return None
    return _unordered(elements(left), elements(right))


def _collections(left: Node, right: Node) -> Finding | None:
    if isinstance(left, Function) and isinstance(right, Collection) and len(left.name) == 1 and left.name.isupper():
        left = Collection("()", left.arguments)  # the point A(2, 3)
    if isinstance(left, Matrix):
        return _matrices(left, right)
    if not isinstance(left, Collection) or not isinstance(right, Collection):
        return None
    intervals = {"()", "[]", "[)", "(]"}
    if len(left.items) == 2 and left.brackets != right.brackets and {left.brackets, right.brackets} <= intervals:
        return Finding(False, "brackets")
    return _in_order(left.items, right.items)


def _matrices(left: Matrix, right: Node) -> Finding:
    entries = [entry for row in left.rows for entry in row]
    if isinstance(right, Matrix):
        if [len(row) for row in left.rows] != [len(row) for row in right.rows]:
            return Finding(False, "shape")
        return _in_order(entries, [entry for row in right.rows for entry in row])
    vector = len(left.rows) == 1 or len(left.rows[0]) == 1
    if vector and isinstance(right, Collection) and right.brackets in ("()", "<>", "[]"):
        return _in_order(entries, right.items)
    if len(entries) == 1:
        return compare(entries[0], right)
    if isinstance(right, Collection) and all(isinstance(row, Collection) for row in right.items):
        rows = tuple(row.items for row in right.items if isinstance(row, Collection))
        return _matrices(left, Matrix(rows))
    return Finding(False, "kind")


def _ratios(left: Node, right: Node) -> Finding | None:
    if not isinstance(left, Ratio):
        return None
    if isinstance(right, Ratio):
        if len(left.parts) != len(right.parts):
            return Finding(False, "shape")
        if (finding := _in_order(left.parts, right.parts)).equal:
            return finding
        if any(part == Number(Fraction(0)) for part in (*left.parts, *right.parts)):  # 12:00 is a time
            return finding
        first, other = left.parts[0], right.parts[0]
        return _all(
            values(_quotient(a, first), _quotient(b, other)) for a, b in zip(left.parts, right.parts, strict=True)
        )
    if len(left.parts) == 2 and left.parts[1] != Number(Fraction(0)) and isinstance(right, EXPRESSIONS):
        return values(_quotient(*left.parts), right)
    return Finding(False, "kind")


def _texts(left: Node, right: Node) -> Finding | None:
    if isinstance(left, Text):
        return Finding(isinstance(right, Text) and left.words == right.words, "text")
    return None


def _residues(left: Node, right: Node) -> Finding | None:
    """1 (mod 4) and 5 (mod 4)."""
    if not (isinstance(left, Function) and left.name == "modulo"):
        return None
    if not (
        isinstance(right, Function) and right.name == "modulo" and values(left.arguments[1], right.arguments[1]).equal
    ):
        return Finding(False, "modulus")
    try:
        quotient = normal.form(
            _quotient(_difference(left.arguments[0], right.arguments[0]), left.arguments[1])
        ).rational()
    except ValueError:
        quotient = None
    return Finding(quotient is not None and quotient.denominator == 1, "residue")


def _families(left: Node, right: Node) -> Finding | None:
    """2kπ, k ∈ ℤ and 2nπ, n ∈ ℤ (parts.py gives both the same index)."""
    if isinstance(left, Function) and left.name == "family":
        if isinstance(right, Function) and right.name == "family":
            return _in_order(left.arguments, right.arguments)
        return Finding(False, "kind")
    return None


_RULES: tuple[Callable[[Node, Node], Finding | None], ...] = (
    _quantities,
    _hedges,
    _relations,
    _set_operations,
    _lists,
    _collections,
    _ratios,
    _texts,
    _residues,
    _families,
)


# Taking answers apart.


def _label(name: Node | None, value: Node) -> bool:
    """Whether a name before a value may be passed over, when the other side is this value."""
    return name is None or not contains([value], name) or not isinstance(name, Variable)


def _consistent(node: Node) -> bool:
    """False for 7 = 8, which is equal to nothing, not even to itself."""
    if isinstance(node, Relation) and set(node.operators) == {"="}:
        try:
            rationals = [normal.form(term).rational() for term in node.terms]
        except ValueError:
            return True
        return len({value for value in rationals if value is not None}) < 2
    return True


def _plain(node: Collection) -> bool:
    return not any(has_sign(item) for item in node.items)


def _unordered(left: Sequence[Node], right: Sequence[Node]) -> Finding:
    """As sets: each item of one has an equal in the other. Lists with an ellipsis are compared in order."""
    if Dots() in left or Dots() in right:
        return _in_order(left, right)
    left, right = _distinct(left), _distinct(right)
    if len(left) != len(right):
        return Finding(False, "count")
    if len(left) > MAX_ITEMS:
        return _in_order(left, right)
    rest, reason = list(right), "structural"
    for item in left:
        for index, other in enumerate(rest):
            finding = compare(item, other)
            if finding.equal:
                del rest[index]
                reason = finding.reason if finding.reason in ("numeric", "symbolic") else reason
                break
        else:
            return Finding(False, "item")
    return Finding(True, reason)


def _distinct(items: Sequence[Node]) -> list[Node]:
    """Without items that are written twice alike, or are twice the same number."""
    kept: list[Node] = []
    seen: set[object] = set()
    for item in items:
        key: object = item
        try:
            key = normal.form(item).rational() or item
        except ValueError:
            pass
        if key not in seen:
            seen.add(key)
            kept.append(item)
    return kept


def _in_order(left: Sequence[Node], right: Sequence[Node]) -> Finding:
    if len(left) != len(right):
        return Finding(False, "count")
    return _all(compare(a, b) for a, b in zip(left, right, strict=True))


def _all(findings: Iterable[Finding]) -> Finding:
    reason = "structural"
    for finding in findings:
        if not finding.equal:
            return finding
        reason = finding.reason if finding.reason in ("numeric", "symbolic") else reason
    return Finding(True, reason)


def _first_equal(left: Sequence[Node], right: Sequence[Node]) -> Finding:
    finding = Finding(False, "kind")
    for a, b in itertools.product(left, right):
        finding = compare(a, b)
        if finding.equal:
            return finding
    return finding


def _difference(a: Node, b: Node) -> Node:
    return Sum((a, Product((MINUS_ONE, b))))


def _quotient(a: Node, b: Node) -> Node:
    return Product((a, Power(b, MINUS_ONE)))
