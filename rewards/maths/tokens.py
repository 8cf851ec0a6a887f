r"""An answer as a string -> tokens: LaTeX, plain text and Unicode in one spelling.

Styling, spacing and invisible characters go here; what is left are numbers (exact), words, commands and signs.
The words inside `\text{}` are words like any other, marked upright. Left out: what tokens mean together
(rewards/maths/parser.py).
"""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction

MAX_TOKENS = 600
MAX_NESTED_TEXT = 4
MAX_EXPONENT = 400
"""Of a number written 1e400; a larger one is a cost, not an answer."""

GREEK = frozenset(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi omicron rho varrho "
    "sigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Upsilon Phi Psi Omega ell "
    "hbar".split()
)
TRIGONOMETRIC = ("sin", "cos", "tan", "cot", "sec", "csc")
_INVERSE = (*TRIGONOMETRIC, "sinh", "cosh", "tanh", "coth")
# Written name -> the name in the tree.
FUNCTIONS = (
    {name: name for name in (*_INVERSE, "exp", "log", "det", "gcd", "lcm", "max", "min", "floor", "ceil", "abs", "arg")}
    | {f"{prefix}{name}": f"arc{name}" for name in _INVERSE for prefix in ("arc", "ar", "a") if name != "sec"}
    | {"ln": "log", "lg": "lg", "tg": "tan", "ctg": "cot", "cosec": "csc", "arctg": "arctan", "Re": "re", "Im": "im"}
    | {"arcsec": "arcsec", "sgn": "sgn", "dim": "dim", "rank": "rank", "sqrt": "sqrt", "cbrt": "cbrt", "lub": "sup"}
    | {"sup": "sup", "deg": "deg", "tr": "tr", "vol": "vol"}
)
CONSTANTS = {"pi": "pi", "infty": "infinity", "infinity": "infinity", "inf": "infinity", "oo": "infinity"} | {
    "emptyset": "empty", "varnothing": "empty"
}  # fmt: skip
SETS = {"R": "reals", "Z": "integers", "N": "naturals", "Q": "rationals", "C": "complexes"}

# Command -> the sign, word or command it is read as.
_SAME = {
    "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "dbinom": "binom", "tbinom": "binom", "surd": "sqrt",
    "times": "*", "cdot": "*", "ast": "*", "bullet": "*", "div": "/", "pm": "±", "mp": "∓", "le": "≤", "leq": "≤",
    "leqslant": "≤", "leqq": "≤", "ge": "≥", "geq": "≥", "geqslant": "≥", "geqq": "≥", "lt": "<", "gt": ">", "ne": "≠",
    "neq": "≠", "in": "∈", "notin": "∉", "approx": "≈", "approxeq": "≈", "simeq": "≈", "equiv": "≡", "sim": "~",
    "cong": "~", "cup": "∪", "bigcup": "∪", "cap": "∩", "setminus": "∖", "backslash": "∖", "ldots": "…", "cdots": "…",
    "dots": "…", "dotsc": "…", "dotsb": "…", "dotsm": "…", "vdots": "…", "ddots": "…", "lbrace": r"\{",
    "rbrace": r"\}", "{": r"\{", "}": r"\}", "lbrack": "[", "rbrack": "]", "lparen": "(", "rparen": ")", "langle": "⟨",
    "rangle": "⟩", "vert": "|", "lvert": "|", "rvert": "|", "mid": "|", "lVert": "‖", "rVert": "‖", "Vert": "‖",
    "|": "‖", "circ": "°", "degree": "°", "prime": "'", "%": "%", "colon": ":", "$": "$", "dollar": "$", "euro": "€",
    "pounds": "£", "to": "→", "rightarrow": "→", "mapsto": "→", "Rightarrow": "⇒", "implies": "⇒", "iff": "⇒",
    "Leftrightarrow": "⇒", "lfloor": "⌊", "rfloor": "⌋", "lceil": "⌈", "rceil": "⌉", "angle": "∠", "triangle": "△",
    "perp": "⊥", "parallel": "∥", "exponentialE": "e", "imaginaryI": "i", "imath": "i", "jmath": "j", "slash": "/",
}  # fmt: skip
_AND_OR = {"lor": "or", "vee": "or", "land": "and", "wedge": "and", "&": "and"}
# How a thing is drawn, not what it is.
_DRAWN = frozenset(
    "left right middle big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr bigm displaystyle textstyle "
    "scriptstyle limits nolimits quad qquad thinspace medspace thickspace enspace negthinspace hfill rm bf it sf tt "
    "large Large LARGE small normalsize nonumber noindent null relax hline mathstrut strut , ; : ! > /".split()
)
# Around a group that is maths all the same; around words. `\mathrm{cm}` may be either: its letters stay together.
_STYLES = frozenset(
    "mathrm mathbf mathit mathsf mathtt mathcal mathfrak mathscr boldsymbol bm pmb mathnormal operatorname boxed fbox "
    "framebox tilde underline ensuremath mathop mathbin".split()
)
_WORDS = frozenset("text textbf textit textrm textsf texttt textnormal mbox hbox emph textup textsc".split())
_UPRIGHT = _WORDS | {"mathrm", "operatorname", "mathsf", "mathtt"}

# One character -> its spelling here. Invisible ones (zero width, right to left) are removed, whatever they hide.
_CHARACTERS = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "﹣": "-", "×": "*", "⋅": "*", "·": "*", "∙": "*", "•": "*",
    "∗": "*", "÷": "/", "⁄": "/", "∕": "/", "≦": "≤", "≧": "≥", "⩽": "≤", "⩾": "≥", "∼": "~", "≅": "~", "≃": "≈",
    "√": r"\sqrt ", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]", "∞": r"\infty ", "∅": r"\emptyset ", "º": "°", "˚": "°",
    "′": "'", "’": "'", "‘": "'", "″": "''", "⋯": "…", "〈": "⟨", "〉": "⟩", "∣": "|", "∥": "‖", "、": ",", "。": ".",
    "“": "", "”": "", "∧": r"\land ", "∨": r"\lor ", "∶": ":", "∑": r"\sum ", "∏": r"\prod ", "∫": r"\int ",
    "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}", "⟶": "→",
    "⟹": "⇒", "⟺": "⇒", "⇔": "⇒", "µ": r"\mu ", "∆": r"\Delta ", "Ω": r"\Omega ", "Å": "Å",
}  # fmt: skip

_GROUPED = r"[0-9]{{1,3}}(?:{separator}[0-9]{{3}})+(?![0-9])"
_SAFE_GROUPS = "|".join(_GROUPED.format(separator=s) for s in (r"\{,\}", r",?\\[,!:]\s?,?", r"(?:\\?\s|~)"))
_NUMBER = r"(?:(?:{integer})(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]+(?![0-9A-Za-z]))?"
# A comma between groups of three digits is a separator in one reading, and between the items of a list in another.
_GROUPS_READ = re.compile(_NUMBER.format(integer=f"{_GROUPED.format(separator=',')}|{_SAFE_GROUPS}|[0-9]+"))
_GROUPS_SPLIT = re.compile(_NUMBER.format(integer=f"{_SAFE_GROUPS}|[0-9]+"))
_SEPARATOR = re.compile(r"[^0-9.eE+-]")
_REPEATING = re.compile(r"([0-9]*)\.([0-9]*)(?:\\(?:overline|bar|dot|underline)\s*\{?([0-9]+)\}?|\(([0-9]+)\))")
_PERIODIC = re.compile(r"([0-9]*)\.([0-9]+)\s*(?:\\[cl]?dots[bc]?|…|\.\.\.+)(?!\s*,)")
_PERIOD = re.compile(r"([0-9]*?)(?:([0-9])\2{2,}|([0-9]{2,4}?)\3+)")
# Old or roundabout TeX.
_REWRITTEN = (
    (re.compile(r"\\(q?quad)(?=[A-Za-z])"), r"\\\1 "),
    (re.compile(r"\{\s*\\(?:rm|sf|text|bf|it)\s+([^{}]*)\}"), r"\\mathrm{\1}"),
    (re.compile(r"\\not\s*="), r"\\ne "),
    (re.compile(r"\\not\s*\\in(?![A-Za-z])"), r"\\notin "),
)
_COMMAND = re.compile(r"\\(?:[A-Za-z]+|\\(?:\[[^\]]*\])?|.)", re.DOTALL)
_ENVIRONMENT = re.compile(r"\s*\{\s*([A-Za-z]+)\*?\s*\}")
_SIGNS = re.compile(r"<=|>=|==|=>|->|\*\*|\+/-|\.\.\.+|…|[-+*/^_()\[\]{}|,;:=<>≤≥≠≈≡~∈∉!'%°$€£¥±∓∪∩∖→⇒⌊⌋⌈⌉⟨⟩‖&∠△⊥]")
_SIGN_SAME = {"<=": "≤", ">=": "≥", "==": "=", "=>": "⇒", "->": "→", "**": "^", "+/-": "±"}
_LETTERS = re.compile(r"[A-Za-z]+")
_SUPERSCRIPTS = re.compile(r"([⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ]+)|[₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₐₑₒₓₙᵢⱼₖ]+")
_FOREIGN = re.compile(r"[^\W\d_a-zA-Z]+")


class Unreadable(ValueError):
    """Text that is no answer in any notation known here."""


@dataclass(frozen=True, slots=True)
class Token:
    """One token."""

    kind: str
    """`number`, `word`, `command`, `sign`, or `begin` and `end` of an environment."""
    text: str
    """Digits without separators, the letters, the command without its backslash, the sign, or the environment."""
    space: bool = False
    """Whether space stands before it."""
    upright: bool = False
    r"""Whether it stood in `\text{}` or `\mathrm{}`: cm there is a unit, not c times m."""

    @property
    def value(self) -> Fraction:
        """The number, exactly as written."""
        return Fraction(self.text)


def tokenize(text: str, *, groups: bool = True) -> list[Token]:
    """Tokens of one answer; `groups`: whether the comma of 1,234 separates thousands.

    Raises Unreadable for a character or a length that no answer has.
    """
    tokens: list[Token] = []
    for token in _scan(plain(text), groups, upright=False, depth=0):
        tokens.append(token)
        if len(tokens) > MAX_TOKENS:
            raise Unreadable(f"over {MAX_TOKENS} tokens")
    return tokens


def plain(text: str) -> str:
    """The text with Unicode's mathematical characters spelled in ASCII and LaTeX, without invisible ones."""
    for pattern, spelling in _REWRITTEN:
        text = pattern.sub(spelling, text)
    if text.isascii():
        return text
    text = _SUPERSCRIPTS.sub(_raised, unicodedata.normalize("NFC", text))
    return "".join(map(_spell, text))


def _raised(match: re.Match[str]) -> str:
    """⁻³ as ^{-3}, ₁₀ as _{10}."""
    return f"{'^' if match[1] else '_'}{{{unicodedata.normalize('NFKC', match[0]).replace('−', '-')}}}"


def _spell(character: str) -> str:
    if character.isascii():
        return character
    if character in _CHARACTERS:
        return _CHARACTERS[character]
    if unicodedata.category(character) in ("Cf", "Cc", "Mn") or character == "\u034f":
        return ""
    name = unicodedata.name(character, "")
    if name.startswith("GREEK ") and " LETTER " in name and " WITH " not in name:
        letter = name.rpartition(" ")[2].lower()
        letter = {"lamda": "lambda", "final": "sigma"}.get(letter, letter)
        return rf"\{letter.capitalize() if 'CAPITAL' in name else letter} "
    kind, _, _ = unicodedata.decomposition(character).partition("> ")
    if kind in ("<super", "<sub", "<fraction", "<wide", "<font", "<compat", "<noBreak", "<small", "<narrow"):
        spelled = "".join(map(_spell, unicodedata.normalize("NFKC", character)))
        if kind == "<fraction":
            top, _, bottom = spelled.partition("/")
            return rf"\frac{{{top}}}{{{bottom}}}"
        return {"<super": f"^{{{spelled}}}", "<sub": f"_{{{spelled}}}"}.get(kind, spelled)
    return character


def _scan(text: str, groups: bool, *, upright: bool, depth: int) -> Iterator[Token]:
    number = _GROUPS_READ if groups else _GROUPS_SPLIT
    position, space = 0, False
    # An odd number of bare dollars is money, an even one opens and closes maths.
    money = len(re.findall(r"(?<!\\)\$", text)) % 2 == 1
    while position < len(text):
        character = text[position]
        if text.startswith("{}", position) and len(text) > 2:
            position += 2
            continue
        if character.isspace() or (character == "~" and text[position - 1 : position] != " "):
            position, space = position + 1, True
            continue
        if character == "\\":
            match = _COMMAND.match(text, position)
            if not match:
                raise Unreadable("it ends in a backslash")
            position = match.end()
            name = match[0][1:]
            if name in _WORDS or name in _STYLES or name == "mathbb":
                inner, position = _group(text, position)
                if depth > MAX_NESTED_TEXT:
                    raise Unreadable("text in text in text")
                letter = inner.strip()
                if name == "mathbb" or (name == "mathbf" and letter in SETS and len(text) < 20):
                    yield Token("command", SETS[letter], space) if letter in SETS else Token("word", letter, space)
                else:
                    deeper = upright or name in _UPRIGHT
                    inside = _scan(inner, groups, upright=deeper, depth=depth + 1)
                    for index, token in enumerate(inside):
                        yield replace(token, space=True) if index == 0 and (space or inner[:1].isspace()) else token
                    space = inner[-1:].isspace()
                    continue
            elif name in ("begin", "end"):
                environment = _ENVIRONMENT.match(text, position)
                if not environment:
                    raise Unreadable(rf"\{name} of nothing")
                position = environment.end()
                if name == "begin" and environment[1] == "array" and text[position : position + 1] == "{":
                    _, position = _group(text, position)
                yield Token(name, environment[1], space)
            elif name in _DRAWN or name.isspace():
                if name in ("left", "right") and text[position : position + 1] == ".":
                    position += 1
                space = True
                continue
            elif name.startswith("\\"):
                yield Token("sign", "\\\\", space)
            elif name in _AND_OR:
                yield Token("word", _AND_OR[name], space, upright=True)
            else:
                same = _SAME.get(name, name)
                yield Token("command" if len(same) > 1 and same[0] != "\\" else "sign", same, space)
        elif (match := _PERIODIC.match(text, position)) and (period := _PERIOD.fullmatch(match[2])):
            position = match.end()
            yield Token("number", _repeating(match[1], period[1], period[2] or period[3]), space, upright)
        elif match := _REPEATING.match(text, position):
            position = match.end()
            yield Token("number", _repeating(match[1], match[2], match[3] or match[4]), space, upright)
        elif match := number.match(text, position):
            digits = _SEPARATOR.sub("", match[0])
            mantissa, _, exponent = digits.lower().partition("e")
            if len(mantissa) > 1000 or len(exponent) > 4 or abs(int(exponent or 0)) > MAX_EXPONENT:
                raise Unreadable("a number of that size")
            position = match.end()
            yield Token("number", digits, space, upright)
        elif match := _LETTERS.match(text, position):
            position = match.end()
            yield Token("word", match[0], space, upright)
        elif (match := _SIGNS.match(text, position)) and match[0] == "$" and not money:
            position = match.end()
            continue
        elif match:
            position = match.end()
            sign = "…" if match[0].startswith("...") else _SIGN_SAME.get(match[0], match[0])
            if sign == "!" and space and text[position : position + 1] == "=":
                position, sign = position + 1, "≠"
            yield Token("sign", sign, space)
        elif upright and character == ".":
            position += 1
            continue
        elif upright and (match := _FOREIGN.match(text, position)):
            position = match.end()
            yield Token("word", match[0], space, upright)
        else:
            raise Unreadable(f"the character {character!r}")
        space = False


def _repeating(whole: str, fixed: str, period: str) -> str:
    """0.1(6) as the fraction 1/6."""
    if len(fixed) + len(period) > 100:
        raise Unreadable("a period of that length")
    scale, nines = 10 ** len(fixed), 10 ** len(period) - 1
    return str(int(whole or 0) + Fraction(int(fixed or 0), scale) + Fraction(int(period), nines * scale))


def _group(text: str, position: int) -> tuple[str, int]:
    """What stands in the braces at `position` (or the one character there), and where they end."""
    while position < len(text) and text[position].isspace():
        position += 1
    if text[position : position + 1] != "{":
        return text[position : position + 1], position + 1
    depth, index = 0, position
    while index < len(text):
        if text[index] == "\\":
            index += 1
        elif text[index] == "{":
            depth += 1
        elif text[index] == "}":
            depth -= 1
            if depth == 0:
                return text[position + 1 : index], index + 1
        index += 1
    raise Unreadable("a brace that never closes")
