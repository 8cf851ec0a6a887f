r"""Equal forms: identities that need no computer algebra, near misses, bounds."""

import random
from fractions import Fraction

import pytest
import sympy

from rewards.maths import normal, numeric
from rewards.maths.parser import parse
from rewards.maths.polynomials import TooCostly, Undefined
from rewards.maths.tree import Node, Number, Power, Product, Sum, Variable

EQUAL = [
    (r"\frac{\sqrt{2}}{4}", r"\frac{\sqrt{\frac{1}{2}}}{2}"),
    (r"\sqrt6", r"\sqrt2\sqrt3"),
    (r"\frac{1}{1+\sqrt2}", r"\sqrt2-1"),
    (r"\sqrt[3]{-8}", "-2"),
    ("(1+i)^8", "16"),
    ("2^{n+1}", r"2\cdot 2^n"),
    ("4^n", "2^{2n}"),
    ("e^{x}e^{y}", "e^{x+y}"),
    (r"\frac{e^x+e^{-x}}{2}", r"\frac{e^{2x}+1}{2e^x}"),
    (r"\ln 12", r"2\ln 2+\ln 3"),
    (r"\log_2 8", "3"),
    (r"\sqrt{\frac{1}{n}}", r"\frac{1}{\sqrt{n}}"),
    (r"\frac{1}{\sqrt{x^2+1}}", r"\frac{\sqrt{x^2+1}}{x^2+1}"),
    (r"\frac{x^2-1}{x-1}", "x+1"),
    (r"\sec^2 x", r"1+\tan^2 x"),
    (r"\sin 2x", r"2\sin x\cos x"),
    (r"\cos 3x", r"4\cos^3 x-3\cos x"),
    (r"\tan 2x", r"\frac{2\tan x}{1-\tan^2 x}"),
    (r"\sin(a+b)", r"\sin a\cos b+\cos a\sin b"),
    (r"\cos(\frac{\pi}{2}-x)", r"\sin x"),
    (r"\sin 15^\circ", r"\frac{\sqrt6-\sqrt2}{4}"),
    (r"\cosh^2 x-\sinh^2 x", "1"),
    (r"e^{i\pi}", "-1"),
    (r"2e^{i\pi/3}", r"1+\sqrt3 i"),
    ("(n+1)!", "(n+1) n!"),
    (r"\frac{n!}{(n-2)!}", "n(n-1)"),
    (r"\binom{2n}{n}", r"\frac{(2n)!}{(n!)^2}"),
    (r"\binom{n}{2}", r"\frac{n(n-1)}{2}"),
    (r"\sum_{k=1}^{10} k^2", "385"),
    (r"\det\begin{pmatrix}a&b\\c&d\end{pmatrix}", "ad-bc"),
]
DIFFERENT = [
    (r"\sqrt{x^2}", "x"),
    (r"\sqrt{xy}", r"-\sqrt{x}\sqrt{y}"),
    ("(-1)^{2n}", "-1"),
    (r"\sin 2x", r"2\sin x"),
    (r"\ln(-2)", r"\ln 2"),
    ("(n-1)!", "n!"),
    ("5+10^{-60}", "5"),
    ("1/2004!", "1/2006!"),
    (r"\sqrt{2}", r"\frac{141421356237}{100000000000}"),
]


@pytest.mark.parametrize(("left", "right"), EQUAL)
def test_equal_expressions_have_equal_forms(left: str, right: str) -> None:
    assert normal.equal(parse(left), parse(right))


@pytest.mark.parametrize(("left", "right"), DIFFERENT)
def test_different_expressions_never_have_equal_forms(left: str, right: str) -> None:
    assert not normal.equal(parse(left), parse(right))


@pytest.mark.parametrize("costly", ["9^{9^{9^9}}", "(10^7)!", r"\binom{1000000}{500000}", "(a+b+c+d+f+g)^{60}"])
def test_what_costs_too_much_is_refused_before_it_is_done(costly: str) -> None:
    with pytest.raises(TooCostly):
        normal.form(parse(costly))


@pytest.mark.parametrize("undefined", ["1/0", r"\tan\frac{\pi}{2}", r"\ln 0", r"\frac{1}{\sqrt2\sqrt2-2}", "0^{-1}"])
def test_what_has_no_value_says_so(undefined: str) -> None:
    with pytest.raises(Undefined):
        normal.form(parse(undefined))


def test_random_expressions_agree_with_sympy_and_with_points() -> None:
    """Equal forms are equal for sympy's expand and at points; equal polynomials have equal forms."""
    chance = random.Random(0)
    x, y = sympy.symbols("x y")
    for _ in range(150):
        (left, a), (right, b) = _expression(chance, 3, (x, y)), _expression(chance, 3, (x, y))
        expanded = sympy.expand(a)
        assert normal.equal(left, _tree(expanded))
        assert normal.equal(left, right) == (sympy.expand(a - b) == 0)
        assert numeric.differ(left, _tree(expanded)) is False


def _expression(chance: random.Random, depth: int, symbols: tuple[sympy.Symbol, ...]) -> tuple[Node, sympy.Expr]:
    if depth == 0 or chance.random() < 0.2:
        if chance.random() < 0.5:
            value = Fraction(chance.randint(-5, 5), chance.randint(1, 4))
            return Number(value), sympy.Rational(value.numerator, value.denominator)
        symbol = chance.choice(symbols)
        return Variable(symbol.name), symbol
    (left, a), (right, b) = (_expression(chance, depth - 1, symbols) for _ in range(2))
    match chance.randint(0, 2):
        case 0:
            return Sum((left, right)), a + b
        case 1:
            return Product((left, right)), a * b
    power = chance.randint(2, 3)
    return Power(left, Number(Fraction(power))), a**power


def _tree(expression: sympy.Expr) -> Node:
    if expression.is_Rational:
        return Number(Fraction(int(expression.p), int(expression.q)))
    if expression.is_Symbol:
        return Variable(expression.name)
    parts = tuple(map(_tree, expression.args))
    return {sympy.Add: Sum, sympy.Mul: Product}[expression.func](parts) if not expression.is_Pow else Power(*parts)
