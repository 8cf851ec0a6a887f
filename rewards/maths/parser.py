r"""Tokens of one answer -> its typed tree, by recursive descent with the precedences mathematicians use.

    answer      statement {(, ; and or) statement}
    statement   sets {(= ≠ < ≤ > ≥ ∈ ≈ ≡) sets}
    sets        ratio {(∪ ∩ ∖) ratio}
    ratio       sum {: sum}
    sum         [+ - ±] product {(+ - ±) product}
    product     power {[* /] power} [unit]
    power       atom {! ° % '} [^ power]

A factor may follow another without a sign. Nothing is evaluated. Left out: integrals, limits and derivatives;
they raise Unreadable, and are equal only when written alike.
"""

from fractions import Fraction
from itertools import pairwise

from rewards.maths import units
from rewards.maths.atoms import MAX_DEPTH, MINUS_ONE, Atoms, joined, negative
from rewards.maths.tokens import CONSTANTS, FUNCTIONS, Token, Unreadable, tokenize
from rewards.maths.tree import (
    Collection,
    Constant,
    Either,
    Function,
    Node,
    Number,
    PlusMinus,
    Power,
    Quantity,
    Ratio,
    Relation,
    SetOperation,
    Sum,
    Variable,
)

_RELATIONS = frozenset("=≠<≤>≥∈∉≈≡~")
_ORDINALS = ("st", "nd", "rd", "th")
_CURRENCY = frozenset("$€£¥")


def parse(text: str, *, groups: bool = True) -> Node:
    """The tree of one answer. `groups`: whether the comma of 1,234 separates thousands. Raises Unreadable."""
    parser = _Parser(tokenize(text, groups=groups))
    node = parser.sequence()
    if parser.token:
        raise Unreadable(f"{parser.token.text!r} has no place there")
    return node


class _Parser(Atoms):
    """The grammar above, from the loosest binding to the tightest."""

    def sequence(self) -> Node:
        items, either, lists = [self.statement()], False, False
        ends: list[int] = []
        while True:
            separators = []
            while found := self.accept(",", ";", "and", "or", "And", "Or"):
                separators.append(found.lower())
            if not separators or self.token is None or self.token.text in (")", "]", r"\}", "}", "⟩"):
                break
            if "or" in separators:
                either = True
                ends.append(len(items))
            lists = True
            items.append(self.statement())
        if not lists:
            return items[0]
        if not either:
            return Collection("", tuple(items))
        parts = [items[a:b] for a, b in pairwise([0, *ends, len(items)])]
        if (
            len({len(part) for part in parts}) == 1
            and len(parts[0]) > 1
            and all(isinstance(i, Relation) for i in items)
        ):
            return Either(tuple(Collection("", tuple(part)) for part in parts))  # x = 1, y = 2 or x = 3, y = 4
        return Either(tuple(items))

    def statement(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable(f"nested over {MAX_DEPTH} deep")
        terms, operators = [self.sets()], []
        while self.token and self.token.kind == "sign" and self.token.text in _RELATIONS:
            operators.append(self.take().text)
            terms.append(self.sets())
        if "≡" in operators and isinstance(terms[-1], Function) and terms[-1].name == "mod":
            terms[-1] = Function("modulo", terms[-1].arguments)
        elif modulus := self.modulus():
            terms[-1] = Function("modulo", (terms[-1], modulus))
        self.depth -= 1
        return Relation(tuple(terms), tuple(operators)) if operators else terms[0]

    def modulus(self) -> Node | None:
        if self.accept("pmod", "mod"):
            return self.single()
        if self.next_is("(") and self.next_is("mod", ahead=1):
            self.at += 2
            node = self.sum()
            self.expect(")")
            return node
        return None

    def sets(self) -> Node:
        node = self.ratio()
        while True:
            operator = self.accept("∪", "∩", "∖")
            if not operator and self.next_is("U", "union") and _is_set(node):
                self.take()
                operator = "∪"
            if not operator:
                return node
            right = self.ratio()
            if isinstance(node, SetOperation) and node.operator == operator:
                node = SetOperation(operator, (*node.parts, right))
            else:
                node = SetOperation(operator, (node, right))

    def ratio(self) -> Node:
        parts = [self.sum()]
        while self.inside != r"\{" and self.accept(":", "to"):
            parts.append(self.sum())
        return Ratio(tuple(parts)) if len(parts) > 1 else parts[0]

    def sum(self) -> Node:
        terms = [] if self.next_is("+", "-", "±", "∓") else [self.product()]
        while sign := self.accept("+", "-", "±", "∓"):
            while self.next_is("+", "-"):  # 3 + -2
                sign = {"+-": "-", "--": "+", "++": "+", "-+": "-"}.get(sign + self.take().text, sign)
            term = self.product()
            if sign in "±∓":
                term = PlusMinus(term, 1 if sign == "±" else -1)
            terms.append(_negated(term) if sign == "-" else term)
        if len(terms) == 1:
            return terms[0]
        last = terms[-1]
        if isinstance(last, Quantity) and not any(isinstance(term, Quantity) for term in terms[:-1]):
            return Quantity(Sum((*terms[:-1], last.value)), last.unit)  # (2 + 3) cm
        return Sum(tuple(terms))

    def product(self) -> Node:
        if self.token and self.token.kind == "sign" and self.token.text in _CURRENCY:
            currency = self.take().text
            return Quantity(self.product(), currency)
        factors = [self.power()]
        while True:
            if self.accept("*") or self.x_between_numbers():
                factors.append(self.signed_power())
            elif multiplier := self.multiplier():
                factors.append(multiplier)
            elif self.token and self.token.kind == "sign" and self.token.text in _CURRENCY:
                return Quantity(joined(factors), self.take().text)
            elif self.accept("/"):
                factors.append(Power(self.signed_power(), MINUS_ONE))
            elif self.accept("bmod", "mod"):
                factors = [Function("mod", (joined(factors), self.signed_power()))]
            elif unit := self.unit(factors):
                return Quantity(joined(factors), unit)
            elif self.starts_a_factor():
                factors.append(self.power())
            else:
                return joined(factors)

    def x_between_numbers(self) -> bool:
        """Takes the x of 3 x 10^8."""
        around = self.tokens[self.at - 1 : self.at + 2]
        if [token.kind for token in around] != ["number", "word", "number"] or around[1].text not in ("x", "X"):
            return False
        self.at += 1
        return True

    def multiplier(self) -> Node | None:
        """The million of 3 million."""
        token = self.token
        before = self.tokens[self.at - 1]
        if token is None or token.kind != "word" or before.kind not in ("number", "word"):
            return None
        value = units.MULTIPLIERS.get(token.text.lower())
        if value is None:
            return None
        self.at += 1
        return Number(Fraction(value))

    def signed_power(self) -> Node:
        if self.accept("-"):
            return negative(self.signed_power())
        self.accept("+")
        return self.power()

    def starts_a_factor(self) -> bool:
        token = self.token
        if token is None or token.kind in ("end",):
            return False
        if token.kind == "number":
            before = self.tokens[self.at - 1]
            return before.kind != "number"
        if token.kind == "word":
            return token.text.lower() not in ("and", "or", "mod", "over", "choose", "to") and not (
                token.text in ("U", "union") and self.at + 1 < len(self.tokens) and self.next_is("(", "[", ahead=1)
            )
        if token.kind == "command":
            return token.text not in ("over", "choose", "pmod", "bmod", "mod")
        if token.text == "|":
            return self.inside not in ("|", r"\{")
        if token.text == "(" and self.at + 1 < len(self.tokens) and self.tokens[self.at + 1].text == "mod":
            return False
        if token.text == "[":
            return self.inside not in ("[", "]")
        return token.text in ("(", "{", r"\{", "⌊", "⌈", "⟨", "√") or token.kind == "begin"

    def unit(self, factors: list[Node]) -> str | None:
        """The unit that comes next after these factors, or None if what comes is a factor itself."""
        token = self.token
        if fraction := self.unit_fraction():
            return units.spell(fraction)
        if token is None or not self.is_unit(token, factors):
            return None
        words: list[str] = []
        while (token := self.token) is not None:
            if token.kind == "word" and token.text.lower() not in ("and", "or"):
                words.append(self.take().text)
            elif words and self.accept("^"):
                power = self.single()
                if not isinstance(power, Number):
                    raise Unreadable("a unit to a power that is no number")
                words.append(f"^{power.value}")
            elif (
                words
                and self.next_is("/")
                and self.at + 1 < len(self.tokens)
                and self.tokens[self.at + 1].kind == "word"
            ):
                words.append(self.take().text)
            elif not (words and self.accept("*")):
                break
        return units.spell(words)

    def unit_fraction(self) -> list[str]:
        r"""The words of \frac{m}{s}, if that is what comes next."""
        rest = self.tokens[self.at : self.at + 7]
        if [token.text for token in rest[:1]] == ["frac"] and len(rest) > 6 and rest[2].upright and rest[5].upright:
            if rest[2].kind == rest[5].kind == "word" and rest[3].text == "}" == rest[6].text:
                self.at += 7
                return [rest[2].text, "/", rest[5].text]
        return []

    def is_unit(self, token: Token, factors: list[Node]) -> bool:
        word = token.text
        if token.kind != "word" or word in CONSTANTS or word.lower() in ("and", "or", "mod", "union", "choose", "to"):
            return False
        if (word in FUNCTIONS and word not in ("min", "sec", "deg")) or (
            word in FUNCTIONS and self.next_is("(", "^", ahead=1)
        ):
            return False
        constant = not any(map(_has_variable, factors))
        if token.upright:
            return len(word) > 1 or (word in units.SHORT and constant)
        if len(word) == 1:
            ends = self.at + 1 == len(self.tokens) or self.next_is("^", "/", ahead=1)
            return word in units.SHORT and token.space and constant and ends
        known = word in units.KNOWN or (word.lower() in units.KNOWN and word[1:].islower())
        return constant and (known or (token.space and len(word) > 3))

    def power(self) -> Node:
        node = self.atom()
        while True:
            if self.accept("!"):
                name = "double_factorial" if self.accept("!") else "factorial"
                node = Function(name, (node,))
            elif self.accept("°"):
                node = Quantity(node, self.degree())
            elif self.accept("%"):
                node = Quantity(node, "%")
            elif isinstance(node, Number) and self.accept("_"):  # (101)_2
                node = Quantity(node, f"_{self.base()}")
            elif self.ordinal(node):
                continue
            elif self.accept("^"):
                if self.degrees_in_exponent():
                    node = Quantity(node, self.degree())
                else:
                    node = Power(node, self.exponent())
            else:
                return node

    def ordinal(self, node: Node) -> bool:
        """Takes the th of 5th, 5^th and 5^{th}."""
        if not isinstance(node, Number):
            return False
        token = self.token
        if token and token.text in _ORDINALS and not token.space:
            self.at += 1
            return True
        return any(self.skip("^", ending) or self.skip("^", "{", ending, "}") for ending in _ORDINALS)

    def degree(self) -> str:
        token = self.token
        return f"°{self.take().text}" if token and token.kind == "word" and token.text in ("C", "F") else "°"

    def degrees_in_exponent(self) -> bool:
        if self.accept("°"):
            return True
        if self.next_is("{") and self.next_is("°", ahead=1) and self.next_is("}", ahead=2):
            self.at += 3
            return True
        return False

    def exponent(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable(f"nested over {MAX_DEPTH} deep")
        sign = self.accept("-", "+")
        node = self.single()
        if self.accept("^"):
            node = Power(node, self.exponent())
        self.depth -= 1
        return negative(node) if sign == "-" else node


def _negated(term: Node) -> Node:
    if isinstance(term, PlusMinus):
        return PlusMinus(term.term, -term.upper)
    if isinstance(term, Quantity):
        return Quantity(_negated(term.value), term.unit)
    return negative(term)


def _has_variable(node: Node) -> bool:
    if isinstance(node, Variable):
        return True
    fields = getattr(node, "__dataclass_fields__", {})
    children = [getattr(node, name) for name in fields]
    flat = [item for child in children for item in (child if isinstance(child, tuple) else (child,))]
    return any(_has_variable(child) for child in flat if isinstance(child, Node))


def _is_set(node: Node) -> bool:
    return isinstance(node, Collection | SetOperation) or isinstance(node, Constant)
