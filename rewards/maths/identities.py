"""Functions of forms -> forms in fewer functions, by identities that hold wherever both sides are defined.

Sines and cosines of sums and multiples go to those of single terms, tangents to their quotient, hyperbolic functions to
exponentials, binomials to factorials, and (n+1)! to (n+1)·n!. cos² is 1 − sin² (rewards/maths/polynomials.py).
"""

from collections.abc import Callable
from fractions import Fraction
from typing import Protocol

from rewards.maths.polynomials import ONE, Form, Polynomial, add, constant, number, single

MAX_MULTIPLE = 8
"""sin 9x stays what it is."""
MAX_ANGLES = 4
MAX_SHIFT = 30
"""(n+31)! stays what it is."""

_HALF, _ONE = Fraction(1, 2), Fraction(1)
_PI = (("pi", _ONE),)


class Arithmetic(Protocol):
    """What identities are made with."""

    def add(self, a: Form, b: Form) -> Form:
        """a + b"""

    def times(self, a: Form, b: Form) -> Form:
        """a · b"""

    def power(self, base: Form, exponent: Form) -> Form:
        """base ^ exponent"""

    def integer_power(self, base: Form, n: int) -> Form:
        """base ^ n"""


def rewritten(name: str, arguments: list[Form], by: Arithmetic) -> Form | None:
    """The function of these arguments in simpler ones; None where no identity applies."""
    if len(arguments) == 1 and name in _OF_ONE:
        return _OF_ONE[name](arguments[0], by)
    if len(arguments) == 2 and name in ("binomial", "permutations"):
        n, k = arguments
        below = _minus(n, k, by)
        top = by.times(factorial(n, by), by.integer_power(factorial(below, by), -1))
        return by.times(top, by.integer_power(factorial(k, by), -1)) if name == "binomial" else top
    return None


def factorial(argument: Form, by: Arithmetic) -> Form:
    """Of n + k as n! times or over k factors."""
    shift = argument.top.get((), Fraction(0))
    whole = constant(argument.top)
    if argument.bottom != ONE or shift.denominator != 1 or abs(shift) > MAX_SHIFT:
        return single(("factorial", argument.key()))
    rest = {monomial: value for monomial, value in argument.top.items() if monomial}
    result = number(_ONE) if whole is not None else single(("factorial", Form(rest, ONE).key()))
    if whole is not None and whole < 0:
        return single(("factorial", argument.key()))
    for step in range(1, int(shift) + 1):
        result = by.times(result, Form(add(rest, {(): Fraction(step)}), ONE))
    for step in range(0, int(shift), -1):
        result = by.times(result, by.integer_power(Form(add(rest, {(): Fraction(step)}), ONE), -1))
    return result


def sine(argument: Form, by: Arithmetic) -> Form | None:
    """sin of an angle."""
    found = _sine_cosine(argument, by)
    return found[0] if found else None


def cosine(argument: Form, by: Arithmetic) -> Form | None:
    """cos of an angle."""
    found = _sine_cosine(argument, by)
    return found[1] if found else None


def _sine_cosine(argument: Form, by: Arithmetic) -> tuple[Form, Form] | None:
    """Both, by the addition theorems, from those of the terms of the angle."""
    if argument.bottom != ONE or len(argument.top) > MAX_ANGLES:
        return None
    total = number(Fraction(0)), number(_ONE)
    for monomial, coefficient in sorted(argument.top.items(), key=repr):
        if monomial == _PI:
            angle = _table(coefficient)
            if angle is None:
                return None
            total = _sum_of_angles(total, angle, by)
            continue
        multiple, part = abs(coefficient.numerator), Fraction(1, coefficient.denominator)
        if multiple > MAX_MULTIPLE:
            return None
        key = Form({monomial: part}, ONE).key()
        sign = number(_ONE if coefficient > 0 else -_ONE)
        one = by.times(sign, single(("sin", key))), single(("cos", key))
        for _ in range(multiple):
            total = _sum_of_angles(total, one, by)
    return total


def _sum_of_angles(a: tuple[Form, Form], b: tuple[Form, Form], by: Arithmetic) -> tuple[Form, Form]:
    sine = by.add(by.times(a[0], b[1]), by.times(a[1], b[0]))
    cosine = _minus(by.times(a[1], b[1]), by.times(a[0], b[0]), by)
    return sine, cosine


def _table(turns: Fraction) -> tuple[Form, Form] | None:
    """sin and cos of turns·π, where they are made of square roots of 2 and 3."""
    if 12 % turns.denominator:
        return None
    twelfths = int(turns * 12) % 24
    return _sine_of_twelfths(twelfths), _sine_of_twelfths((twelfths + 6) % 24)


def _sine_of_twelfths(n: int) -> Form:
    if n >= 12:
        return Form({m: -x for m, x in _sine_of_twelfths(n - 12).top.items()}, ONE)
    two, three, quarter = ((2, _HALF),), ((3, _HALF),), Fraction(1, 4)
    six = ((2, _HALF), (3, _HALF))
    values: list[Polynomial] = [
        {}, {six: quarter, two: -quarter}, {(): _HALF}, {two: _HALF}, {three: _HALF}, {six: quarter, two: quarter}, ONE,
    ]  # fmt: skip
    return Form(values[min(n, 12 - n)], ONE)


def _minus(a: Form, b: Form, by: Arithmetic) -> Form:
    return by.add(a, Form({monomial: -value for monomial, value in b.top.items()}, b.bottom))


def _exponential(sign: int) -> Callable[[Form, Arithmetic], Form]:
    """(e^x ± e^−x)/2"""

    def build(x: Form, by: Arithmetic) -> Form:
        up = by.power(single("e"), x)
        down = by.times(number(Fraction(sign)), by.integer_power(up, -1))
        return by.times(number(_HALF), by.add(up, down))

    return build


def _quotient(top: str, bottom: str) -> Callable[[Form, Arithmetic], Form | None]:
    def build(x: Form, by: Arithmetic) -> Form | None:
        above, below = (_OF_ONE[name](x, by) if name else number(_ONE) for name in (top, bottom))
        return by.times(above, by.integer_power(below, -1)) if above and below else None

    return build


_OF_ONE: dict[str, Callable[[Form, Arithmetic], Form | None]] = {
    "factorial": factorial,
    "sin": sine,
    "cos": cosine,
    "tan": _quotient("sin", "cos"),
    "cot": _quotient("cos", "sin"),
    "sec": _quotient("", "cos"),
    "csc": _quotient("", "sin"),
    "sinh": _exponential(-1),
    "cosh": _exponential(1),
    "tanh": _quotient("sinh", "cosh"),
    "coth": _quotient("cosh", "sinh"),
}
