r"""Two expressions at points chosen by no one -> they differ there, or agree to 40 digits, or can't be compared.

Evaluation is over the reals where an expression has no i: a point at which either side is undefined or complex is
skipped, so √(1/n) and 1/√n are compared where n > 0, and √(x²) and x differ at x < 0. All arithmetic has 60 digits;
magnitudes are bounded before anything is evaluated.
"""

import functools
import math
import threading
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

from rewards.maths.tree import Constant, Function, Matrix, Node, Number, Power, Product, Quantity, Sum, Variable

DIGITS = 60
AGREE = 1e-40
"""Relative difference under which two values of 60 digits are the same."""
MAX_LOG2 = 2.0**22
"""Of a magnitude: larger numbers are not evaluated."""
MAX_SUMMANDS = 200


class NoValue(ValueError):
    """No finite value at this point, or none that is cheap."""


def differ(left: Node, right: Node) -> bool | None:
    """True if they differ at a point, False if they agree at every one where both are defined, None if at none."""
    names = sorted(variables(left) | variables(right))
    complex_too = has_i(left) or has_i(right)
    # Who writes |x| says that x may be negative: then where a side is defined matters, too.
    by_domain = _applies(("abs",), left) != _applies(("abs",), right)
    agreed = 0
    for point in _points(names):
        a, b = (_value_or_none(side, point, complex_too) for side in (left, right))
        if a is None or b is None:
            if by_domain and names and (a is None) != (b is None):
                return True
        elif abs(a - b) > AGREE * max(abs(a), abs(b)):
            return True
        else:
            agreed += 1
    return False if agreed else None


def is_analytic(node: Node) -> bool:
    """Whether agreement at points says it all: no ⌊x⌋, max, gcd of variables is in it."""
    return not _applies(("floor", "ceil", "max", "min", "gcd", "lcm", "mod", "sgn"), node)


def _applies(names: tuple[str, ...], node: Node) -> bool:
    if isinstance(node, Function) and node.name in names and variables(node):
        return True
    return any(_applies(names, child) for child in children(node))


def constant_value(node: Node) -> float:
    """The real value of an expression without variables; ±inf for infinity. Raises NoValue if it has none."""
    if isinstance(node, Constant) and node.name == "infinity":
        return math.inf
    if isinstance(node, Product) and node.factors[-1:] == (Constant("infinity"),) and len(node.factors) == 2:
        return constant_value(node.factors[0]) * math.inf
    if variables(node):
        raise NoValue("it has variables")
    return float(_value(node, {}, False).real)


def variables(node: Node) -> frozenset[str]:
    """Names of the free variables in an expression."""
    return _names(node)


@functools.lru_cache(maxsize=4096)
def _names(node: Node) -> frozenset[str]:
    if isinstance(node, Variable):
        return frozenset({node.name})
    bound = {node.arguments[1].name} if _has_index(node) else set()  # type: ignore[attr-defined]
    return frozenset().union(*map(_names, children(node))) - bound


def _has_index(node: Node) -> bool:
    return (
        isinstance(node, Function)
        and node.name in ("sum", "product")
        and len(node.arguments) == 4
        and isinstance(node.arguments[1], Variable)
    )


def children(node: Node) -> Iterator[Node]:
    """The nodes directly below one."""
    for field in getattr(node, "__dataclass_fields__", ()):
        stack = [getattr(node, field)]
        while stack:
            thing = stack.pop()
            if isinstance(thing, Node):
                yield thing
            elif isinstance(thing, tuple):
                stack.extend(thing)


def has_i(node: Node) -> bool:
    """Whether the imaginary unit is in it."""
    return node == Constant("i") or any(map(has_i, children(node)))


def _points(names: list[str]) -> Iterator[dict[str, Any]]:
    """Values for the variables: small and large, fractions and integers, positive, negative, mixed. Reproducible."""
    if not names:
        yield {}
        return
    context = _context()
    for number, (scale, signs) in enumerate(_POINTS):
        point = {}
        for index, name in enumerate(names):
            bits = zlib.crc32(f"{number} {name}".encode())
            size = context.mpf(bits % 99_991) / 50_021 + context.mpf(1) / 7
            size = context.floor(size * scale) + 1 + index if scale > 1 else size * scale
            point[name] = -size if signs == "-" or (signs == "±" and (index + number) % 2) else size
        yield point


# Size (whole numbers from 2 on) and signs of the points.
_POINTS = (
    *((1, "+"), (7, "+"), (1, "-"), (20_000, "+"), (1, "±"), (20_000, "-"), (4, "+"), (1, "±"), (3, "-"), (1, "+")),
    *((20_000, "±"), (20_000, "±"), (12, "+"), (1, "-"), (1 / 4096, "+"), (1 / 4096, "-")),
)


_local = threading.local()


def _context() -> Any:
    """mpmath's arithmetic at 60 digits; a thread has its own, since precision is a setting of it."""
    if not hasattr(_local, "context"):
        import mpmath

        _local.context = mpmath.MPContext()
        _local.context.dps = DIGITS
    return _local.context


def _value_or_none(node: Node, point: Mapping[str, Any], complex_too: bool) -> Any:
    try:
        return _value(node, point, complex_too)
    except (NoValue, ArithmeticError, ValueError, RecursionError):
        return None


def _value(node: Node, point: Mapping[str, Any], complex_too: bool) -> Any:
    value = _Evaluator(_context(), point).at(node)
    if not _context().isfinite(value):
        raise NoValue("infinite")
    real, imaginary = value.real, value.imag
    if not complex_too and abs(imaginary) > AGREE * (abs(real) + 1):
        raise NoValue("complex")
    return value if complex_too else real


class _Evaluator:
    def __init__(self, context: Any, point: Mapping[str, Any]) -> None:
        self.context, self.point = context, dict(point)
        self.steps = 0

    def at(self, node: Node) -> Any:
        self.steps += 1
        if self.steps > 5000:
            raise NoValue("too many steps")
        context = self.context
        if isinstance(node, Number):
            return context.mpf(node.value.numerator) / node.value.denominator
        if isinstance(node, Variable):
            return self.point[node.name]
        if isinstance(node, Constant):
            if node.name not in ("pi", "e", "i"):
                raise NoValue(node.name)
            return {"pi": +context.pi, "e": +context.e, "i": context.mpc(0, 1)}[node.name]
        if isinstance(node, Sum):
            return context.fsum(self.at(term) for term in node.terms)
        if isinstance(node, Product):
            return context.fprod(self.at(factor) for factor in node.factors)
        if isinstance(node, Power):
            return self.power(node)
        if isinstance(node, Function):
            return self.function(node)
        if isinstance(node, Quantity) and node.unit in ("%", "°"):
            return self.at(node.value) * (context.mpf(1) / 100 if node.unit == "%" else context.pi / 180)
        raise NoValue(type(node).__name__)

    def power(self, node: Power) -> Any:
        base, exponent = self.at(node.base), self.at(node.exponent)
        if base == 0:
            if exponent.real <= 0:
                raise NoValue("a power of zero")
            return base
        # Before the power is taken: its size in bits, which is what it costs.
        if abs(exponent) * (abs(self.context.log(abs(base), 2)) + 1) > MAX_LOG2:
            raise NoValue("too large")
        if (
            isinstance(node.exponent, Number)
            and node.exponent.value.denominator % 2
            and base.imag == 0
            and base.real < 0
        ):
            size = (-base.real) ** exponent  # the real root of a negative number
            return -size if node.exponent.value.numerator % 2 else size
        return base**exponent

    def function(self, node: Function) -> Any:
        context, name = self.context, node.name
        if name in ("sum", "product") and _has_index(node):
            return self.repeated(node)
        if name == "det" and isinstance(node.arguments[0], Matrix):
            return context.det(context.matrix([[self.at(entry) for entry in row] for row in node.arguments[0].rows]))
        arguments = [self.at(argument) for argument in node.arguments]
        if name in _COMPLEX and len(arguments) == 1:
            if name in ("exp", "sinh", "cosh") and abs(arguments[0]) > MAX_LOG2:
                raise NoValue("too large")
            return getattr(context, _COMPLEX[name])(arguments[0])
        if name == "log":
            if any(argument == 0 for argument in arguments):
                raise NoValue("the logarithm of zero")
            return context.log(*arguments)
        if any(abs(argument.imag) > AGREE for argument in arguments):
            raise NoValue("complex")
        real = [argument.real for argument in arguments]
        if any(abs(value) > 10**6 for value in real):
            raise NoValue("too large")
        match name, real:
            case "factorial", [n]:
                if n < 0 and n == int(n):
                    raise NoValue("the factorial of a negative integer")
                return context.factorial(n)
            case "double_factorial", [n]:
                return context.fac2(n)
            case "binomial", [n, k]:
                return context.binomial(n, k)
            case "permutations", [n, k]:
                return context.factorial(n) / context.factorial(n - k)
            case "floor" | "ceil", [x]:
                return getattr(context, name)(x)
            case "max" | "min", [_, *_]:
                return max(real) if name == "max" else min(real)
            case "mod", [a, n] if n:
                return a - n * context.floor(a / n)
            case "gcd" | "lcm", [_, *_] if all(value == int(value) for value in real):
                return context.mpf(getattr(math, name)(*map(int, real)))
            case "sgn", [x]:
                return context.sign(x)
        raise NoValue(f"{name} of {len(real)} arguments")

    def repeated(self, node: Function) -> Any:
        body, index, low, high = node.arguments
        first, last = self.at(low).real, self.at(high).real
        if first != int(first) or last != int(last) or not -1 <= last - first < MAX_SUMMANDS:
            raise NoValue(f"a {node.name} from {first} to {last}")
        outside = self.point.get(index.name)  # type: ignore[attr-defined]
        total = self.context.mpf(0 if node.name == "sum" else 1)
        for value in range(int(first), int(last) + 1):
            self.point[index.name] = self.context.mpf(value)  # type: ignore[attr-defined]
            total = total + self.at(body) if node.name == "sum" else total * self.at(body)
        if outside is not None:
            self.point[index.name] = outside  # type: ignore[attr-defined]
        return total


_COMPLEX = (
    {name: name for name in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "coth", "exp")}
    | {f"arc{name}": f"a{name}" for name in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "coth")}
    | {"abs": "fabs", "re": "re", "im": "im", "arg": "arg"}
)  # fmt: skip
