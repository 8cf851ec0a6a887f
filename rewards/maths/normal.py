r"""An expression -> a quotient of two polynomials with exact coefficients: equal forms are equal expressions.

A polynomial maps monomials to rationals. A monomial maps atoms to rational exponents, negative ones too. Atoms are
prime numbers (with exponents in (0, 1): √12 is 2·3^(1/2)), π, e, i, variables, powers with symbolic exponents, and
functions of forms. So `\frac{1}{1+\sqrt2}` and `\sqrt2-1`, 2^{n+1} and 2·2^n, ln 4 and 2 ln 2 have equal forms, and
no computer algebra is asked. The converse is not claimed: unequal forms may be equal expressions (sin²x + cos²x).

Every step is bounded: TooCostly says that a bound was met.
"""

import functools
import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from rewards.maths.identities import rewritten
from rewards.maths.polynomials import (
    MAX_BITS,
    ONE,
    Form,
    Meter,
    Monomial,
    Polynomial,
    TooCostly,
    Undefined,
    add,
    factors,
    gcd,
    joined,
    monomial_power,
    multiply,
    number,
    odd_power,
    reduced,
    root,
    single,
    tidied,
)
from rewards.maths.tree import Constant, Function, Matrix, Node, Number, Power, Product, Quantity, Sum, Variable

MAX_SUMMANDS = 300
_I_PI = (("i", Fraction(1)), ("pi", Fraction(1)))


def equal(left: Node, right: Node) -> bool:
    """Whether both have the same form. Raises TooCostly and Undefined."""
    a, b, meter = form(left), form(right), Meter()
    difference = add(multiply(a.top, b.bottom, meter), multiply(b.top, a.bottom, meter), Fraction(-1))
    return not difference or not _cleared(difference)


def constant_ratio(left: Node, right: Node, *, cleared: bool = False) -> Fraction | None:
    """c with left = c·right, for one rational c ≠ 0; None if the forms don't show one.

    `cleared`: of the numerators only, as is right for equations (y − 1/x = 0 is xy − 1 = 0).
    """
    a, b, meter = form(left), form(right), Meter()
    if cleared:
        a, b = Form(_cleared(a.top), ONE), Form(_cleared(b.top), ONE)
    top, bottom = multiply(a.top, b.bottom, meter), multiply(b.top, a.bottom, meter)
    if not top or top.keys() != bottom.keys():
        return None
    ratios = {top[monomial] / bottom[monomial] for monomial in top}
    return ratios.pop() if len(ratios) == 1 else None


@functools.lru_cache(maxsize=4096)
def form(node: Node) -> Form:
    """The form of an expression. Raises TooCostly, Undefined, and ValueError for what is no expression."""
    return _Builder().build(node)


def _cleared(polynomial: Polynomial) -> Polynomial:
    """The polynomial times what removes its negative exponents."""
    lowest: dict[Any, Fraction] = {}
    for monomial in polynomial:
        for atom, power in monomial:
            lowest[atom] = min(lowest.get(atom, Fraction(0)), power)
    result: Polynomial = {}
    for monomial, value in polynomial.items():
        powers = {atom: dict(monomial).get(atom, Fraction(0)) - lowest[atom] for atom in lowest}
        result = add(result, tidied(powers), value)
    return result


class _Builder:
    def __init__(self) -> None:
        self.meter = Meter()

    def build(self, node: Node, bound: Mapping[str, Fraction] | None = None) -> Form:
        """`bound`: values of variables, of the index of a sum."""
        bound = bound or {}
        self.meter.spend(1)
        if isinstance(node, Number):
            return number(node.value)
        if isinstance(node, Variable):
            return number(bound[node.name]) if node.name in bound else single(("variable", node.name))
        if isinstance(node, Constant):
            if node.name not in ("pi", "e", "i"):
                raise Undefined(f"{node.name} is no number")
            return single(node.name)
        if isinstance(node, Sum):
            total = number(Fraction(0))
            for term in node.terms:
                total = self.add(total, self.build(term, bound))
            return total
        if isinstance(node, Product):
            product = number(Fraction(1))
            for factor in node.factors:
                product = self.times(product, self.build(factor, bound))
            return product
        if isinstance(node, Power):
            return self.power(self.build(node.base, bound), self.build(node.exponent, bound))
        if isinstance(node, Function):
            return self.function(node, bound)
        if isinstance(node, Quantity) and node.unit in ("%", "°"):
            scale = number(Fraction(1, 100)) if node.unit == "%" else single("pi", coefficient=Fraction(1, 180))
            return self.times(self.build(node.value, bound), scale)
        raise ValueError(f"a {type(node).__name__} is no expression")

    def add(self, a: Form, b: Form) -> Form:
        if a.bottom == b.bottom:
            return Form(add(a.top, b.top), a.bottom)
        cross = add(multiply(a.top, b.bottom, self.meter), multiply(b.top, a.bottom, self.meter))
        return reduced(cross, multiply(a.bottom, b.bottom, self.meter))

    def times(self, a: Form, b: Form) -> Form:
        return reduced(multiply(a.top, b.top, self.meter), multiply(a.bottom, b.bottom, self.meter))

    def power(self, base: Form, exponent: Form) -> Form:
        rational = exponent.rational()
        if rational is not None and rational.denominator == 1:
            return self.integer_power(base, rational.numerator)
        value = base.rational()
        if rational is not None and value is not None:
            return root(value, rational)
        if rational is not None:
            return self.symbolic_root(base, rational)
        if len(exponent.bottom) > 1 or value == 0:
            if value == 0:
                raise Undefined("a power of zero")
            return single(("power", base.key(), exponent.key()))
        # b^(c0 + c1·m1 + ...) = b^c0 · (b^m1)^c1 · ...: equal bases join whatever way they are written.
        result = number(Fraction(1))
        ((divisor, scale),) = exponent.bottom.items()
        for monomial, coefficient in exponent.top.items():
            term = joined(monomial, tuple((atom, -power) for atom, power in divisor))
            for rest, factor in term.items():
                share = coefficient * factor / scale
                if rest == _I_PI and base == single("e"):
                    turn = rewritten("cos", [single("pi", coefficient=share)], self)
                    up = rewritten("sin", [single("pi", coefficient=share)], self)
                    if turn is not None and up is not None:  # Euler
                        result = self.times(result, self.add(turn, self.times(single("i"), up)))
                        continue
                if not rest:
                    result = self.times(result, self.power(base, number(share)))
                else:
                    result = self.times(result, _symbolic_power(base, value, rest, share))
        return result

    def integer_power(self, base: Form, n: int) -> Form:
        if n < 0:
            if not base.top:
                raise Undefined("a division by zero")
            base, n = reduced(base.bottom, base.top), -n
        if len(base.top) == len(base.bottom) == 1:
            return reduced(monomial_power(base.top, n), monomial_power(base.bottom, n))
        if n > 64:
            raise TooCostly(f"a sum to the power {n}")
        result = number(Fraction(1))
        for _ in range(n):
            result = self.times(result, base)
        return result

    def symbolic_root(self, base: Form, exponent: Fraction) -> Form:
        """A form with atoms to a fractional power: its rational content is taken out, the rest is an atom."""
        if not base.top:
            if exponent < 0:
                raise Undefined("a division by zero")
            return base
        result = number(Fraction(1))
        for polynomial, sign in ((base.top, 1), (base.bottom, -1)):
            content = abs(gcd(*polynomial.values()))
            rest = {monomial: coefficient / content for monomial, coefficient in polynomial.items()}
            result = self.times(result, root(content, exponent * sign))
            if power := odd_power(rest):
                result = self.times(result, single(power[0], power[1] * exponent * sign))
            elif rest != ONE:
                whole = math.floor(exponent * sign)
                result = self.times(result, self.integer_power(Form(rest, ONE), whole))
                key = tuple(sorted(rest.items(), key=repr))
                result = self.times(result, single(("root", key), exponent * sign - whole))
        return result

    def function(self, node: Function, bound: Mapping[str, Fraction]) -> Form:
        if node.name in ("sum", "product") and len(node.arguments) == 4:
            return self.repeated(node, bound)
        if node.name == "det" and isinstance(node.arguments[0], Matrix):
            rows = [[self.build(entry, bound) for entry in row] for row in node.arguments[0].rows]
            return self.determinant(rows)
        arguments = [self.build(argument, bound) for argument in node.arguments]
        if node.name == "exp":
            return self.power(single("e"), arguments[0])
        if node.name == "log":
            if len(arguments) == 2:
                base = self.log(arguments[1])
                return self.times(self.log(arguments[0]), self.integer_power(base, -1))
            return self.log(arguments[0])
        values = [argument.rational() for argument in arguments]
        if all(value is not None for value in values) and node.name in _EXACT:
            value = _EXACT[node.name](*values)
            if value is not None:
                return number(value)
        if (simpler := rewritten(node.name, arguments, self)) is not None:
            return simpler
        return single((node.name, *(argument.key() for argument in arguments)))

    def log(self, argument: Form) -> Form:
        value = argument.rational()
        if value is not None and value > 0:
            terms: Polynomial = {}
            for prime, power in factors(value).items():
                terms[((("log", prime), Fraction(1)),)] = Fraction(power)
            return Form(terms, ONE)
        if value is not None and value == 0:
            raise Undefined("the logarithm of zero")
        if argument.bottom == ONE and argument.top == {(("e", Fraction(1)),): Fraction(1)}:
            return number(Fraction(1))
        if argument.bottom == ONE and len(argument.top) == 1:
            ((monomial, coefficient),) = argument.top.items()
            if coefficient > 0 and all(isinstance(atom, int) or atom in ("pi", "e") for atom, _ in monomial):
                total = self.log(number(coefficient))
                for atom, exponent in monomial:
                    one = number(Fraction(1)) if atom == "e" else single(("log", atom))
                    total = self.add(total, self.times(number(exponent), one))
                return total
        return single(("log", argument.key()))

    def repeated(self, node: Function, bound: Mapping[str, Fraction]) -> Form:
        body, index, low, high = node.arguments
        if high == Constant("infinity"):
            return single((node.name, self.build(body, bound).key(), repr(index), self.build(low, bound).key()))
        first, last = self.build(low, bound).rational(), self.build(high, bound).rational()
        if first is None or last is None or not isinstance(index, Variable):
            parts = (self.build(low, bound).key(), self.build(high, bound).key())
            return single((node.name, self.build(body, bound).key(), repr(index), *parts))
        if first.denominator != 1 or last.denominator != 1:
            raise Undefined(f"a {node.name} from {first} to {last}")
        if last - first >= MAX_SUMMANDS:
            raise TooCostly(f"a {node.name} of {last - first} terms")
        add = node.name == "sum"
        total = number(Fraction(0 if add else 1))
        for value in range(int(first), int(last) + 1):
            term = self.build(body, {**bound, index.name: Fraction(value)})
            total = self.add(total, term) if add else self.times(total, term)
        return total

    def determinant(self, rows: list[list[Form]]) -> Form:
        if not rows or len(rows) != len(rows[0]) or len(rows) > 5:
            raise ValueError("a determinant of that shape")
        if len(rows) == 1:
            return rows[0][0]
        total = number(Fraction(0))
        for column, entry in enumerate(rows[0]):
            minor = self.determinant([row[:column] + row[column + 1 :] for row in rows[1:]])
            signed = self.times(entry, number(Fraction((-1) ** column)))
            total = self.add(total, self.times(signed, minor))
        return total


def _symbolic_power(base: Form, value: Fraction | None, exponent: Monomial, share: Fraction) -> Form:
    """(base^exponent)^share, with the base of a rational split into primes: 4^n is (2^n)^2."""
    if value is not None and value > 0:
        powers = {("power", prime, exponent): share * power for prime, power in factors(value).items()}
        return Form(tidied(powers), ONE)
    return single(("power", base.key(), exponent), share)


# Exact values of functions, None where there is none.


def _whole(*values: Fraction) -> bool:
    return all(value.denominator == 1 for value in values)


def _factorial(n: Fraction, step: int = 1) -> Fraction | None:
    if not _whole(n) or n < 0:
        return None
    if n > 3000:
        raise TooCostly(f"the factorial of {n}")
    return Fraction(math.factorial(int(n)) if step == 1 else math.prod(range(int(n), 0, -2)))


def _binomial(n: Fraction, k: Fraction) -> Fraction | None:
    if not _whole(n, k) or n < 0 or k < 0:
        return None
    if min(k, n - k) * max(n.numerator.bit_length(), 1) > MAX_BITS:
        raise TooCostly(f"the binomial of {n} and {k}")
    return Fraction(math.comb(int(n), int(k)))


def _permutations(n: Fraction, k: Fraction) -> Fraction | None:
    if not _whole(n, k) or n < 0 or k < 0:
        return None
    if k * max(n.numerator.bit_length(), 1) > MAX_BITS:
        raise TooCostly(f"the permutations of {n} and {k}")
    return Fraction(math.perm(int(n), int(k)))


def _integers(function: Callable[..., int]) -> Callable[..., Fraction | None]:
    return lambda *values: Fraction(function(*map(int, values))) if _whole(*values) else None


_EXACT: dict[str, Callable[..., Fraction | None]] = {
    "abs": abs,
    "floor": lambda x: Fraction(math.floor(x)),
    "ceil": lambda x: Fraction(math.ceil(x)),
    "factorial": _factorial,
    "double_factorial": lambda n: _factorial(n, 2),
    "binomial": _binomial,
    "permutations": _permutations,
    "gcd": _integers(math.gcd),
    "lcm": _integers(math.lcm),
    "max": lambda *values: max(values),
    "min": lambda *values: min(values),
    "mod": lambda a, n: a % n if n else None,
    "re": lambda x: x,
    "im": lambda x: Fraction(0),
    "sgn": lambda x: Fraction((x > 0) - (x < 0)),
}
