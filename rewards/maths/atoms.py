r"""The parts of an answer that stand by themselves: numbers, letters, words, commands, functions, brackets, matrices.

What may stand between brackets is the grammar's (rewards/maths/parser.py), which this class leaves open.
"""

from abc import ABC, abstractmethod
from fractions import Fraction
from string import ascii_uppercase

from rewards.maths.cursor import Cursor
from rewards.maths.tokens import CONSTANTS, FUNCTIONS, GREEK, SETS, Token, Unreadable
from rewards.maths.tree import (
    Collection,
    Constant,
    Dots,
    Function,
    Matrix,
    Node,
    Number,
    Power,
    Product,
    Quantity,
    Relation,
    SetOperation,
    Variable,
    replaced,
)

MAX_DEPTH = 60
_CLOSERS = {"(": (")", "]"), "[": ("]", ")"), r"\{": (r"\}",), "⟨": ("⟩",), "⌊": ("⌋",), "⌈": ("⌉",), "‖": ("‖",)}
_AMONG_WORDS = tuple("arcsin arccos arctan sqrt cbrt sinh cosh tanh sin cos tan cot sec csc log exp ln pi".split())
_BASES = "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()
_MATRICES = frozenset("matrix pmatrix bmatrix Bmatrix smallmatrix array vmatrix Vmatrix cases aligned align".split())
MINUS_ONE = Number(Fraction(-1))


class Atoms(Cursor, ABC):
    """Reads one atom; `sequence` and the rest of the grammar are a subclass's."""

    @abstractmethod
    def sequence(self) -> Node:
        """Statements up to the end or a closing bracket."""

    @abstractmethod
    def statement(self) -> Node:
        """One item of a sequence."""

    @abstractmethod
    def sum(self) -> Node:
        """An expression."""

    @abstractmethod
    def product(self) -> Node:
        """A term of a sum."""

    @abstractmethod
    def power(self) -> Node:
        """An atom with what stands behind and above it."""

    @abstractmethod
    def exponent(self) -> Node:
        """What stands after `^`."""

    @abstractmethod
    def starts_a_factor(self) -> bool:
        """Whether a factor comes next."""

    @abstractmethod
    def is_unit(self, token: Token, factors: list[Node]) -> bool:
        """Whether the token is a unit after these factors."""

    def single(self, *, one_digit: bool = False) -> Node:
        r"""A TeX argument: a group or one thing. `one_digit`: \frac12 takes one digit, but 2^10 the whole number."""
        token = self.take()
        if token.kind == "number" and one_digit and len(token.text) > 1 and token.text.isdigit():
            self.at -= 1
            self.tokens[self.at] = Token("number", token.text[1:])
            return Number(Fraction(int(token.text[0])))
        if token.kind == "number":
            return Number(token.value)
        if token.kind == "word" and len(token.text) > 1 and not token.upright and token.text not in CONSTANTS:
            self.at -= 1
            self.tokens[self.at] = Token("word", token.text[1:])
            return _letter(token.text[0])
        self.at -= 1
        return self.atom()

    def atom(self) -> Node:
        token = self.take()
        if token.kind == "number":
            return self.number(token)
        if token.kind == "word":
            return self.word(token)
        if token.kind == "command":
            return self.command(token.text)
        if token.kind == "begin":
            return self.environment(token.text)
        return self.bracket(token.text)

    def number(self, token: Token) -> Node:
        value = token.value
        if self.accept("_"):
            return Quantity(Number(value), f"_{self.base()}")
        fraction = self.mixed() if token.text.isdigit() else None
        return Number(value + fraction) if fraction is not None else Number(value)

    def base(self) -> Fraction:
        """The 2 of 101_2, in digits or words."""
        base = self.single()
        if isinstance(base, Variable) and base.name in _BASES:
            return Fraction(_BASES.index(base.name) + 2)
        if not isinstance(base, Number):
            raise Unreadable("a base that is no number")
        return base.value

    def mixed(self) -> Fraction | None:
        r"""The fraction of a mixed number, 1\frac{1}{2} or 1 1/2, if that is what comes next."""
        rest = self.tokens[self.at : self.at + 7]
        texts = [token.text for token in rest]
        top = bottom = ""
        if texts[:1] == ["frac"]:
            if texts[1:2] == ["{"] and texts[3:5] == ["}", "{"] and texts[6:7] == ["}"]:
                top, bottom, length = texts[2], texts[5], 7
            elif len(texts) > 1 and rest[1].kind == "number" and len(texts[1]) == 2:
                top, bottom, length = texts[1][0], texts[1][1], 2
            elif len(rest) > 2 and rest[1].kind == rest[2].kind == "number" and len(texts[1]) == 1:
                top, bottom, length = texts[1], texts[2], 3
        elif len(rest) > 2 and rest[0].kind == "number" and rest[0].space and texts[1] == "/":
            top, bottom, length = texts[0], texts[2], 3
        if not (top.isdigit() and bottom.isdigit() and int(top) < int(bottom)):
            return None
        self.at += length
        return Fraction(int(top), int(bottom))

    def word(self, token: Token) -> Node:
        word = token.text
        if word in CONSTANTS or word.lower() == "infinity":
            return Constant(CONSTANTS.get(word, "infinity"))
        if word in FUNCTIONS:
            return self.function(FUNCTIONS[word])
        if len(word) == 1:
            return self.letter(word)
        if token.upright or (len(word) > 4 and not word.startswith(_AMONG_WORDS)):
            return Variable(word.lower() + self.subscript())
        self.at -= 1
        self.tokens[self.at : self.at + 1] = _split(token)
        return self.atom()

    def letter(self, letter: str) -> Node:
        if letter == "d" and self.next_is("/"):
            raise Unreadable("a derivative")
        if letter == "m" and self.next_is("∠"):
            return self.atom()
        name = letter + self.subscript() + self.primes() + self.inverse(letter)
        following = self.token
        if following and following.text in ("(", "[") and not following.space and letter in "fghn" + ascii_uppercase:
            start, inside = self.at, self.inside
            node = self.items(self.take().text)
            simple = isinstance(node, Variable | Number | Collection)
            if letter in "fgh" or (simple and letter != "n") or isinstance(node, Relation | SetOperation):
                return _applied(name, node.items if isinstance(node, Collection) else (node,))
            self.at, self.inside = start, inside
        return _letter(letter) if name == letter else Variable(name)

    def subscript(self) -> str:
        if not self.accept("_"):
            return ""
        start = self.at
        self.single()
        return "_" + "".join(token.text for token in self.tokens[start : self.at]).strip("{}").lower()

    def primes(self) -> str:
        primes = ""
        while self.accept("'") or self.skip("^", "'") or self.skip("^", "{", "'", "}"):
            primes += "'"
        return primes

    def inverse(self, letter: str) -> str:
        """The −1 of f^{-1}(x)."""
        return "^-1" if letter in "fgh" and self.skip("^", "{", "-", "1", "}") else ""

    def skip(self, *texts: str) -> bool:
        """Take these tokens if they all come next."""
        found = [token.text for token in self.tokens[self.at : self.at + len(texts)]] == list(texts)
        self.at += len(texts) * found
        return found

    def command(self, name: str) -> Node:
        if name == "frac":
            return quotient(self.single(one_digit=True), self.single(one_digit=True))
        if name == "binom":
            return Function("binomial", (self.single(one_digit=True), self.single(one_digit=True)))
        if name in ("or", "and"):
            raise Unreadable(f"{name!r} joins nothing")
        if name in ("sum", "prod"):
            return self.big_operator({"sum": "sum", "prod": "product"}[name])
        if name in FUNCTIONS:
            return self.function(FUNCTIONS[name])
        if name in CONSTANTS:
            return Constant(CONSTANTS[name])
        if name in SETS.values():
            return Constant(name + {"^+": "+", "+": "+"}.get(self.plus(), ""))
        if name in GREEK:
            return Variable(name.removeprefix("var") + self.subscript() + self.primes())
        if name == "lim":
            return self.limit()
        if name in ("overline", "bar", "dot", "star", "det", "vec", "overrightarrow", "hat", "widehat"):
            return Function(name, (self.single(),))
        raise Unreadable(rf"\{name}")

    def plus(self) -> str:
        """The + of ℝ^+, if it comes next."""
        if self.next_is("^") and self.next_is("+", ahead=1):
            self.at += 2
            return "+"
        if self.next_is("^") and self.next_is("{", ahead=1) and self.next_is("+", ahead=2):
            self.at += 4
            return "+"
        return ""

    def function(self, name: str) -> Node:
        if name in ("sqrt", "cbrt"):
            degree: Node = Number(Fraction(3 if name == "cbrt" else 2))
            if self.accept("["):
                degree = self.sum()
                self.expect("]")
            radicand = self.single()
            return Power(radicand, Power(degree, MINUS_ONE) if not isinstance(degree, Number) else _over(degree))
        base = None
        if self.accept("_"):
            base = self.single()
        exponent = self.exponent() if self.accept("^") else None
        if base is not None and name != "log":
            raise Unreadable(f"{name} with a subscript")
        arguments = self.arguments()
        if exponent == MINUS_ONE and f"arc{name}" in FUNCTIONS.values():
            name, exponent = f"arc{name}", None
        if name == "lg":
            name, base = "log", Number(Fraction(10))
        node = Function(name, (*arguments, base) if base is not None else arguments)
        return Power(node, exponent) if exponent is not None else node

    def arguments(self) -> tuple[Node, ...]:
        if self.next_is("(", "[", "{", r"\{"):
            bracket = self.take().text
            node = self.items(bracket)
            return node.items if isinstance(node, Collection) else (node,)
        if self.accept("-"):
            return (negative(self.juxtaposed()),)
        return (self.juxtaposed(),)

    def juxtaposed(self) -> Node:
        """What a function without brackets applies to: sin 2πx cos y is sin(2πx)·cos y."""
        factors = [self.power()]
        while self.starts_a_factor() and (token := self.token) and token.text not in ("(", "[", r"\{"):
            if (token.text in FUNCTIONS and token.text not in ("sqrt", "cbrt")) or self.is_unit(token, factors):
                break
            factors.append(self.power())
        return joined(factors)

    def big_operator(self, name: str) -> Node:
        self.expect("_")
        self.expect("{")
        variable = self.atom()
        self.expect("=")
        low = self.sum()
        self.expect("}")
        self.expect("^")
        high = self.single()
        if not isinstance(variable, Variable | Constant):
            raise Unreadable(f"a {name} over something that is no variable")
        index = Variable(variable.name) if isinstance(variable, Constant) else variable  # \sum_{i=1}
        body = self.product()
        return Function(name, (replaced(body, variable, index), index, low, high))

    def limit(self) -> Node:
        self.expect("_")
        self.expect("{")
        variable = self.atom()
        self.expect("→")
        target = self.sum()
        self.expect("}")
        return Function("limit", (self.product(), variable, target))

    def bracket(self, opening: str) -> Node:
        if opening == "|":
            return Function("abs", (self.items("|"),))
        if opening == "‖":
            return Function("norm", (self.items("‖"),))
        if opening in ("⌊", "⌈"):
            return Function("floor" if opening == "⌊" else "ceil", (self.items(opening),))
        if opening == "…":
            return Dots()
        if opening == "°":
            raise Unreadable("degrees of nothing")
        if opening == "∠":
            return Function("angle", (self.product(),))
        if opening == "△":
            return Function("triangle", (self.product(),))
        if opening == "<":
            return self.items("<")
        if opening in ("(", "[", r"\{", "{", "⟨", "]"):
            return self.items(opening)
        raise Unreadable(f"{opening!r} has no place there")

    def items(self, opening: str) -> Node:
        """What stands between brackets, of which the first has been taken: one thing, or a collection."""
        outside, self.inside = self.inside, opening
        closers = {"{": ("}",), "|": ("|",), "<": (">",), "]": ("[", "]")}.get(opening) or _CLOSERS[opening]
        if opening == "[":
            closers = ("]", ")", "[")
        if opening in (r"\{", "{") and self.accept(closers[0]):
            self.inside = outside
            return Constant("empty")
        if opening == "<":
            node: Node = Collection("", tuple(self.vector()))
        else:
            node = self.sequence()
        if opening == "{" and (operator := self.accept("over", "choose")):
            right = self.sequence()
            node = quotient(node, right) if operator == "over" else Function("binomial", (node, right))
        if opening == r"\{" and self.accept("|", ":"):
            condition = self.sequence()
            node = _builder(node, condition)
            self.expect(*closers)
            self.inside = outside
            return node
        closing = self.expect(*closers)
        self.inside = outside
        listed = isinstance(node, Collection) and node.brackets == ""
        if (opening == "{" and not listed) or opening in ("⌊", "⌈", "|", "‖"):
            return node
        if opening in (r"\{", "{"):
            return Collection("{}", node.items if isinstance(node, Collection) and listed else (node,))
        if not listed or not isinstance(node, Collection):
            return node
        if opening in ("⟨", "<"):
            return Collection("<>", node.items)
        left = {"(": "(", "[": "[", "]": "("}[opening]
        right_side = {")": ")", "]": "]", "[": ")"}[closing]
        if opening == "]" and closing == "]":
            right_side = "]"
        return Collection(left + right_side, node.items)

    def vector(self) -> list[Node]:
        items = [self.sum()]
        while self.accept(","):
            items.append(self.sum())
        if len(items) < 2:
            raise Unreadable("'<' has no place there")
        return items

    def environment(self, name: str) -> Node:
        if name not in _MATRICES:
            raise Unreadable(rf"\begin{{{name}}}")
        outside, self.inside = self.inside, "matrix"
        if name in ("aligned", "align"):  # & says where to align
            end = next((i for i in range(self.at, len(self.tokens)) if self.tokens[i].kind == "end"), self.at)
            self.tokens[self.at : end] = [token for token in self.tokens[self.at : end] if token.text != "&"]
        rows: list[tuple[Node, ...]] = []
        while not (self.token and self.token.kind == "end"):
            row = [self.statement()]
            while self.accept("&"):
                row.append(self.statement())
            self.accept(",", ";")
            rows.append(tuple(row))
            if not self.accept("\\\\"):
                break
        if not (self.token and self.token.kind == "end" and self.take().text == name):
            raise Unreadable(f"a {name} that never ends")
        self.inside = outside
        if name in ("cases", "aligned", "align"):
            if all(len(row) == 1 for row in rows):
                return Collection("", tuple(row[0] for row in rows))
            return Function("cases", tuple(entry for row in rows for entry in row))
        if len({len(row) for row in rows}) != 1:
            raise Unreadable("a matrix with rows of different lengths")
        matrix = Matrix(tuple(rows))
        return Function("det", (matrix,)) if name == "vmatrix" else matrix


def negative(node: Node) -> Node:
    """Its negative, with the sign in the number where there is one."""
    return Number(-node.value) if isinstance(node, Number) else Product((MINUS_ONE, node))


def quotient(top: Node, bottom: Node) -> Node:
    """top / bottom; of two numbers still a quotient, so that division by zero is seen where it is evaluated."""
    return Product((top, Power(bottom, MINUS_ONE)))


def joined(factors: list[Node]) -> Node:
    """Their product; one alone as it is."""
    return factors[0] if len(factors) == 1 else Product(tuple(factors))


def _over(degree: Number) -> Node:
    if degree.value == 0:
        raise Unreadable("a root of degree 0")
    return Number(1 / degree.value)


def _letter(letter: str) -> Node:
    return Constant(letter) if letter in ("e", "i") else Variable(letter)


def _applied(name: str, arguments: tuple[Node, ...]) -> Node:
    counts = all(isinstance(node, Number) and node.value.denominator == 1 for node in arguments)
    if name in ("C", "P") and len(arguments) == 2 and counts:
        return Function({"C": "binomial", "P": "permutations"}[name], arguments)
    return Function(name, arguments)


def _split(token: Token) -> list[Token]:
    """A word of several letters as what mathematicians mean by it: 2pir is 2·π·r, sinx is sin x."""
    word = token.text
    parts: list[Token] = []
    while word:
        name = next((name for name in _AMONG_WORDS if word.startswith(name)), word[0])
        parts.append(Token("word", name, token.space and not parts))
        word = word[len(name) :]
    return parts


def _builder(element: Node, condition: Node) -> Node:
    r"""{x : x > 2} as its condition, {x ∈ ℝ : x > 2} too; the set of something else, such as 2k, as a function."""
    name = element.terms[0] if isinstance(element, Relation) and element.operators == ("∈",) else element
    if isinstance(name, Variable):
        return condition
    return Function("set", (element, condition))
