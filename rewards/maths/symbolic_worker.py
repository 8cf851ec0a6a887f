"""Pairs of trees in, proofs out, in a child: `python symbolic_worker.py PARENT_PID` runs sympy.

One JSON text a line on file descriptor 0, a socket: `[left, right, cpu_seconds]` (trees as `tree.to_json` writes
them) is answered by `[equal, reason]`. Expressions are built node by node from a table: no text is parsed, and
names are replaced by numbers, so that sympy never sees text from outside. The script imports nothing of this
project, so that a worker is soon there. The parent's side, with what the reasons mean, is rewards/maths/symbolic.py.
"""

import contextlib
import json
import os
import resource
import select
import signal
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial, reduce
from typing import Any

import sympy
from sympy import Expr, S
from sympy.core.evalf import PrecisionExhausted
from sympy.core.function import AppliedUndef
from sympy.functions.elementary.trigonometric import InverseTrigonometricFunction

MEMORY_LIMIT = 1 << 30
"""Bytes of address space; python with sympy takes about 0.15 GiB of it."""

PARENT_CHECK = 2.0
"""Seconds between looks at whether the parent lives: its end of the socket may live on in a process it forked."""

CONSTANTS = {"pi": S.Pi, "e": S.Exp1, "i": S.ImaginaryUnit, "infinity": S.Infinity}

FUNCTIONS: dict[tuple[str, int], Callable[..., Expr]] = {
    **{(name, 1): getattr(sympy, name) for name in ("sin", "cos", "tan", "cot", "sec", "csc")},
    **{(f"arc{name}", 1): getattr(sympy, f"a{name}") for name in ("sin", "cos", "tan", "cot", "sec", "csc")},
    **{(name, 1): getattr(sympy, name) for name in ("sinh", "cosh", "tanh", "coth")},
    **{(f"arc{name}", 1): getattr(sympy, f"a{name}") for name in ("sinh", "cosh", "tanh", "coth")},
    **{(name, 1): getattr(sympy, name) for name in ("log", "exp", "floor", "factorial", "re", "im", "conjugate")},
    ("log", 2): lambda x, base: sympy.log(x) / sympy.log(base),
    ("abs", 1): sympy.Abs,
    ("ceil", 1): sympy.ceiling,
    ("arg", 1): sympy.arg,
    ("sgn", 1): sympy.sign,
    ("overline", 1): sympy.conjugate,
    ("double_factorial", 1): sympy.factorial2,
    ("binomial", 2): sympy.binomial,
    ("permutations", 2): sympy.ff,
    ("mod", 2): sympy.Mod,
}
"""(name, number of arguments) in a tree -> what builds it; anything else is an undefined function."""

FOLDS: dict[str, Callable[[Expr, Expr], Expr]] = {
    "max": lambda a, b: (a + b + sympy.Abs(a - b)) / 2,
    "min": lambda a, b: (a + b - sympy.Abs(a - b)) / 2,
    "gcd": lambda a, b: sympy.Integer(sympy.igcd(a, b)),
    "lcm": lambda a, b: sympy.Integer(sympy.ilcm(a, b)),
}
"""Functions of any number of arguments, two at a time."""

POINTS = tuple(sympy.Rational(*pair) for pair in ((7, 5), (3, 11), (29, 8), (-17, 10)))
"""Where two sides with variables are compared; the n-th variable takes the point plus n/13."""

WHOLE_POINTS = tuple(map(sympy.Integer, (3, 5, 8)))
"""The same where a sum or product may end at a variable; the n-th takes the point plus n."""


def main() -> None:
    """Answer until the parent hangs up or is gone."""
    parent = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(ValueError, OSError):  # not every system that isn't Linux has it
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    wire = socket.socket(fileno=0)
    _forbid_guesses()
    # A pair nothing can decide, to import now what sympy's methods put off.
    decide(*(["Function", name, ["tuple", ["Variable", "x"]]] for name in ("f", "sin")))
    wire.sendall(b"ready\n")
    for line in _lines(wire, parent):
        wire.sendall(json.dumps(_answer(line)).encode() + b"\n")


def _forbid_guesses() -> None:
    """Make nsimplify do nothing: radsimp calls it, and it evaluates the text of what a float might be."""
    vars(sys.modules["sympy.simplify.simplify"])["nsimplify"] = lambda expression, *_, **__: expression


def _lines(wire: socket.socket, parent: int) -> Iterator[bytes]:
    poll = select.poll()
    poll.register(wire, select.POLLIN)
    buffer = bytearray()
    while os.getppid() == parent:
        if not poll.poll(PARENT_CHECK * 1000):
            continue
        part = wire.recv(1 << 16)
        if not part:
            return
        buffer += part
        if part.endswith(b"\n"):  # the parent waits for the reply, so there is never more than one line
            yield bytes(buffer)
            buffer.clear()


def _answer(line: bytes) -> tuple[bool | None, str]:
    try:
        left, right, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal ends the process, wherever it is, parent or not
        return decide(left, right)
    except MemoryError:
        return None, "memory-limit"
    except Exception:  # sympy may raise anything on input nobody thought of
        return None, "undecided"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def decide(left: Any, right: Any) -> tuple[bool | None, str]:
    """Whether two trees, in JSON, are equal for all real values of their variables, with how that was found."""
    sympy.core.random.seed(0)  # the same pair gets the same answer, whatever came before
    names = sorted(_free(left) | _free(right))
    for domain in ("real", "positive"):
        symbols = {name: sympy.Symbol(f"x{n}", **{domain: True}) for n, name in enumerate(names)}
        built = [_build(side, symbols) for side in (left, right)]
        a, b = map(_evaluate, built)
        if domain == "real" and _differ(a, b, _points(built, list(symbols.values()))):
            return False, "nonzero"
        if a == b or _vanishes(a - b):
            return True, domain if names else "exact"
        if not names:
            break
    return None, "undecided"


def _free(tree: Any) -> set[str]:
    match tree:
        case ["Variable", name]:
            return {name}
        case ["Function", "sum" | "product", ["tuple", body, ["Variable", index], low, high]]:
            return _free(body) - {index} | _free(low) | _free(high)
        case [_, *parts]:
            return set().union(*map(_free, parts))
    return set()


# --- building


def _build(tree: Any, symbols: dict[str, sympy.Symbol]) -> Expr:
    """The sympy expression of a tree; symbols maps variables, and inside a sum or product its index too."""
    build = partial(_build, symbols=symbols)
    match tree:
        case ["Number", ["Fraction", numerator, denominator]]:
            return sympy.Rational(int(numerator), int(denominator))
        case ["Constant", name]:
            return CONSTANTS[name]
        case ["Variable", name]:
            return symbols[name]
        case ["Sum", ["tuple", *terms]]:
            return sympy.Add(*map(build, terms))
        case ["Product", ["tuple", *factors]]:
            return sympy.Mul(*map(build, factors))
        case ["Power", base, exponent]:
            return _power(build(base), build(exponent))
        case ["Function", "sum" | "product" as name, ["tuple", body, ["Variable", index], low, high]]:
            # Named by depth: the letter of an index means nothing.
            depth = sum(symbol.name.startswith("k") for symbol in symbols.values())
            k = sympy.Symbol(f"k{depth}", integer=True)
            kind = sympy.Sum if name == "sum" else sympy.Product
            return kind(_build(body, {**symbols, index: k}), (k, build(low), build(high)))
        case ["Function", name, ["tuple", *arguments]]:
            return _function(name, [build(argument) for argument in arguments])
    raise ValueError(f"no value: {tree!r:.100}")


def _power(base: Expr, exponent: Expr) -> Expr:
    """base ^ exponent; for a real base and an odd root the real one, so that (−8)^(1/3) is −2."""
    odd_root = exponent.is_Rational and exponent.q > 1 and exponent.q % 2 == 1
    if not odd_root or not base.is_extended_real or base.is_extended_nonnegative:
        return sympy.Pow(base, exponent)
    size = sympy.Pow(sympy.Abs(base), exponent)
    return size if exponent.p % 2 == 0 else sympy.sign(base) * size


def _function(name: str, arguments: list[Expr]) -> Expr:
    if (name, len(arguments)) in FUNCTIONS:
        return FUNCTIONS[name, len(arguments)](*arguments)
    if name in FOLDS and arguments and (name in ("max", "min") or all(part.is_Integer for part in arguments)):
        return reduce(FOLDS[name], arguments)
    return sympy.Function(f"f{name.encode().hex()}")(*arguments)  # unknown, but equal for equal arguments


def _evaluate(side: Expr) -> Expr:
    """Sums and products in closed form, on the domain where they have one; ValueError without a finite value."""
    if side.has(sympy.Sum, sympy.Product):
        side = side.doit().replace(lambda part: isinstance(part, sympy.Piecewise), _generic)
    if side.has(S.NaN, S.ComplexInfinity, S.Infinity, S.NegativeInfinity):
        raise ValueError("not finite")
    return side


def _generic(piecewise: Expr) -> Expr:
    """The branch that holds but for single points (r = 1 in a geometric sum) and where the series converges."""
    branches = [
        value
        for value, condition in piecewise.args
        if not isinstance(condition, sympy.Eq) and not value.has(sympy.Sum, sympy.Product)
    ]
    return branches[0] if len(branches) == 1 else piecewise


# --- deciding


def _points(built: list[Expr], variables: list[sympy.Symbol]) -> Iterator[dict[sympy.Symbol, Expr]]:
    series = any(side.has(sympy.Sum, sympy.Product) for side in built)
    if not variables:
        yield {}
    elif not series:
        for point in POINTS:
            yield {variable: point + sympy.Rational(n, 13) for n, variable in enumerate(variables)}
    elif not any(side.has(S.Infinity) for side in built):  # who knows where an infinite one converges
        for point in WHOLE_POINTS:
            yield {variable: point + n for n, variable in enumerate(variables)}


def _differ(left: Expr, right: Expr, points: Iterable[dict[sympy.Symbol, Expr]]) -> bool:
    """Whether the two have values at a point whose difference has 10 correct digits and isn't 0.

    Without an i only points where every part is real count: sqrt(x) sqrt(y) is real for two negatives too, but is
    not meant there.
    """
    difference = left - right
    if difference.has(AppliedUndef, sympy.Sum, sympy.Product, sympy.Piecewise):
        return False
    for values in points:
        parts = (part for side in (left, right) for part in sympy.preorder_traversal(side))
        if values and not difference.has(S.ImaginaryUnit) and not all(part.subs(values).is_real for part in parts):
            continue
        if _digits(difference.subs(values)) not in (None, 0):
            return True
    return False


def _digits(value: Expr) -> Expr | None:
    """A constant to 10 digits, all of them correct; None if 100 working digits don't give as many."""
    try:
        number = value.evalf(10, strict=True)
    except (PrecisionExhausted, NotImplementedError):
        return None
    return number if number.is_number and number.is_finite else None


def _vanishes(difference: Expr) -> bool:
    """Whether one of the methods below turns an expression into 0; the cheap ones come first."""
    for method in METHODS:
        try:
            if method(difference) == 0:
                return True
        except MemoryError:
            raise
        except Exception:  # a method that isn't made for this expression, or a bug in it, proves nothing
            continue
    return False


def _rational(difference: Expr) -> Expr:
    return sympy.cancel(sympy.together(difference))


def _radicals(difference: Expr) -> Expr:
    return sympy.radsimp(sympy.expand(sympy.sqrtdenest(difference)))


def _logarithms(difference: Expr) -> Expr:
    logs = difference.rewrite([sympy.asinh, sympy.acosh, sympy.atanh], sympy.log)
    return _rational(sympy.expand_log(logs.replace(sympy.log, lambda x: sympy.log(sympy.factor(x)))))


def _exponentials(difference: Expr) -> Expr:
    """Trigonometric and hyperbolic functions in terms of exp, where identities become rational ones."""
    return _rational(sympy.expand(difference.rewrite(sympy.exp)))


def _gammas(difference: Expr) -> Expr:
    return sympy.gammasimp(difference.rewrite(sympy.gamma))


def _arcs(difference: Expr) -> Expr:
    """A constant is 0 if its sine is and it is nearer to 0 than to the sine's next zero, π."""
    difference = sympy.expand(difference.rewrite(sympy.acos, sympy.asin))
    if not difference.has(InverseTrigonometricFunction) or difference.free_symbols or abs(difference.evalf(15)) > 1:
        return difference
    return sympy.radsimp(sympy.expand(sympy.sqrtdenest(sympy.expand_trig(sympy.sin(difference)))))


def _algebraic(difference: Expr) -> Expr:
    """A constant's minimal polynomial, which is x for 0 alone."""
    if difference.free_symbols:
        return difference
    x = sympy.Symbol("x")
    return sympy.minimal_polynomial(difference, x) - x


METHODS: tuple[Callable[[Expr], Expr], ...] = (
    sympy.expand,
    _rational,
    _radicals,
    _logarithms,
    _exponentials,
    sympy.trigsimp,
    _arcs,
    _algebraic,
    _gammas,
    sympy.simplify,
)


if __name__ == "__main__":
    main()
