r"""Polynomials whose monomials map atoms to rational exponents: their arithmetic, exact and bounded.

Atoms are prime numbers (with exponents in (0, 1): √12 is 2·3^(1/2)), names such as pi, e and i, and tuples that begin
with what they are. Every step is bounded (bits, terms, steps): TooCostly says that a bound was met.
"""

import functools
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

MAX_BITS = 40_000
"""Of a numerator or denominator."""
MAX_TERMS = 400
MAX_STEPS = 12_000
"""Monomials multiplied in one comparison."""
Atom = Any  # a prime, a name, or a hashable tuple that begins with what it is
Monomial = tuple[tuple[Atom, Fraction], ...]  # sorted by the atoms' text
Polynomial = dict[Monomial, Fraction]
ONE: Polynomial = {(): Fraction(1)}


class TooCostly(ValueError):
    """Evaluating this would take more than any answer is worth."""


class Undefined(ValueError):
    """It has no value: a division by zero, the logarithm of zero, infinity in a sum."""


@dataclass(frozen=True, slots=True)
class Form:
    """top / bottom."""

    top: Polynomial
    bottom: Polynomial

    def rational(self) -> Fraction | None:
        """Its value, if it is a rational number."""
        top, bottom = constant(self.top), constant(self.bottom)
        return top / bottom if top is not None and bottom else None

    def key(self) -> tuple[Any, ...]:
        """A hashable spelling."""
        return tuple(tuple(sorted(p.items(), key=repr)) for p in (self.top, self.bottom))


class Meter:
    """Counts monomials multiplied, so that one comparison stays bounded."""

    def __init__(self) -> None:
        self.left = MAX_STEPS

    def spend(self, steps: int) -> None:
        self.left -= steps
        if self.left < 0:
            raise TooCostly(f"over {MAX_STEPS} products of monomials")


def constant(polynomial: Polynomial) -> Fraction | None:
    """A polynomial without atoms as a number."""
    if not polynomial:
        return Fraction(0)
    return polynomial.get(()) if len(polynomial) == 1 else None


def number(value: Fraction) -> Form:
    return Form({(): value} if value else {}, ONE)


def single(atom: Atom, power: Fraction = Fraction(1), coefficient: Fraction = Fraction(1)) -> Form:
    return Form({((atom, power),) if power else (): coefficient}, ONE)


def multiply(a: Polynomial, b: Polynomial, meter: Meter) -> Polynomial:
    """a·b, with primes and i reduced. Raises TooCostly."""
    if a == ONE:
        return b
    if b == ONE:
        return a
    meter.spend(len(a) * len(b))
    result: Polynomial = {}
    for left, x in a.items():
        for right, y in b.items():
            for monomial, factor in joined(left, right).items():
                result[monomial] = result.get(monomial, Fraction(0)) + x * y * factor
    result = {monomial: bounded(value) for monomial, value in result.items() if value}
    if len(result) > MAX_TERMS:
        raise TooCostly(f"over {MAX_TERMS} terms")
    return result


def add(a: Polynomial, b: Polynomial, scale: Fraction = Fraction(1)) -> Polynomial:
    result = dict(a)
    for monomial, value in b.items():
        result[monomial] = bounded(result.get(monomial, Fraction(0)) + value * scale)
    return {monomial: value for monomial, value in result.items() if value}


def reduced(top: Polynomial, bottom: Polynomial) -> Form:
    """The quotient with a bottom of one monomial moved to the top. Raises Undefined for a bottom of zero."""
    if not bottom:
        raise Undefined("a division by zero")
    if bottom == ONE or not top:
        return Form(top, ONE if not top else bottom)
    if len(bottom) > 1:
        return Form(top, bottom)
    ((monomial, value),) = bottom.items()
    missing = {a: math.ceil(p) - p for a, p in monomial if isinstance(a, tuple) and a[0] == "root" and p % 1}
    if missing:  # 1/√(x+1) is √(x+1)/(x+1)
        meter, complement = Meter(), {tuple(sorted(missing.items(), key=by_text)): Fraction(1)}
        return reduced(multiply(top, complement, meter), multiply(bottom, complement, meter))
    inverse = tuple((atom, -power) for atom, power in monomial)
    if not inverse:
        return Form({m: bounded(x / value) for m, x in top.items()}, ONE)
    meter = Meter()
    return Form(multiply(top, {m: x / value for m, x in tidied(dict(inverse)).items()}, meter), ONE)


def monomial_power(polynomial: Polynomial, n: int) -> Polynomial:
    if not polynomial:
        return {}
    ((monomial, value),) = polynomial.items()
    coefficient = integer_power(value, n)
    if abs(n) > 10**6:
        raise TooCostly(f"the power {n}")
    powers = tidied({atom: power * n for atom, power in monomial})
    return {m: bounded(x * coefficient) for m, x in powers.items()}


def joined(a: Monomial, b: Monomial) -> Polynomial:
    """The product of two monomials; several terms where a root of a sum becomes the sum again."""
    if not a or not b:
        return {a or b: Fraction(1)}
    powers = dict(a)
    for atom, power in b:
        powers[atom] = powers.get(atom, Fraction(0)) + power
    return tidied(powers)


def tidied(powers: dict[Atom, Fraction]) -> Polynomial:
    coefficient, kept = Fraction(1), {}
    sums: list[tuple[Polynomial, int]] = []
    for atom, power in powers.items():
        if isinstance(atom, int) or atom == "i" or (isinstance(atom, tuple) and atom[0] == "root"):
            whole = math.floor(power)
            if isinstance(atom, int):
                coefficient *= integer_power(Fraction(atom), whole)
                power -= whole
            elif atom == "i" and power == whole:
                coefficient *= (1, 1, -1, -1)[whole % 4]
                power = Fraction(whole % 2)
            elif atom != "i" and whole > 0:
                sums.append((dict(atom[1]), whole))
                power -= whole
        elif isinstance(atom, tuple) and atom[0] == "cos" and power >= 2 and power.denominator == 1:
            sine = (("sin", atom[1]), Fraction(2))
            sums.append(({(): Fraction(1), (sine,): Fraction(-1)}, int(power) // 2))
            power %= 2
        if power:
            kept[atom] = power
    result: Polynomial = {tuple(sorted(kept.items(), key=by_text)): coefficient}
    for polynomial, whole in sums:
        meter = Meter()
        for _ in range(whole):
            result = multiply(result, polynomial, meter)
    return result


def by_text(item: tuple[Atom, Fraction]) -> str:
    return repr(item[0])


def odd_power(polynomial: Polynomial) -> tuple[Atom, Fraction] | None:
    """x and 3 of x³, whose root is x^(3/2) wherever it is real (of x² it is |x|); None for anything else."""
    if len(polynomial) == 1:
        ((monomial, coefficient),) = polynomial.items()
        if coefficient == 1 and len(monomial) == 1 and monomial[0][1].numerator % 2:
            return monomial[0]
    return None


def bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise TooCostly(f"a number of over {MAX_BITS} bits")
    return value


def integer_power(base: Fraction, n: int) -> Fraction:
    bits = max(abs(base.numerator).bit_length(), base.denominator.bit_length())
    if base not in (0, 1, -1) and bits * abs(n) > MAX_BITS:
        raise TooCostly(f"a number of over {MAX_BITS} bits")
    if not base and n < 0:
        raise Undefined("a division by zero")
    return base**n if base not in (1, -1) else Fraction(base ** (n % 2))


def root(value: Fraction, exponent: Fraction) -> Form:
    """value^exponent as a rational times primes to powers in (0, 1); of a negative value, the real root."""
    if not value:
        if exponent < 0:
            raise Undefined("a division by zero")
        return number(value)
    powers: dict[Atom, Fraction] = {prime: exponent * power for prime, power in factors(abs(value)).items()}
    sign = Fraction(1)
    if value < 0:
        if exponent.denominator % 2:
            sign = Fraction((-1) ** (exponent.numerator % 2))
        elif exponent.denominator == 2:
            powers["i"] = Fraction(exponent.numerator)
        else:
            return single(("power", value, exponent))
    if abs(exponent.numerator) > 10**5:
        raise TooCostly(f"the power {exponent}")
    return Form({monomial: x * sign for monomial, x in tidied(powers).items()}, ONE)


def factors(value: Fraction) -> dict[int, int]:
    """Prime -> exponent, negative for the denominator; a factor without small primes stays whole."""
    powers: dict[int, int] = {}
    for number, sign in ((value.numerator, 1), (value.denominator, -1)):
        for prime, power in _integer_factors(number):
            powers[prime] = powers.get(prime, 0) + sign * power
    return powers


@functools.lru_cache(maxsize=4096)
def _integer_factors(number: int) -> tuple[tuple[int, int], ...]:
    if number.bit_length() > 2048:
        raise TooCostly("factors of a number of that size")
    found: list[tuple[int, int]] = []
    divisor = 2
    while divisor * divisor <= number and divisor < 5000:
        power = 0
        while number % divisor == 0:
            number, power = number // divisor, power + 1
        if power:
            found.append((divisor, power))
        divisor += 1 if divisor == 2 else 2
    if number > 1:
        root = math.isqrt(number)
        found.append((root, 2) if root * root == number else (number, 1))
    return tuple(found)


def gcd(*values: Fraction) -> Fraction:
    """The largest rational of which all are whole multiples."""
    return Fraction(math.gcd(*(v.numerator for v in values)), math.lcm(*(v.denominator for v in values)))
