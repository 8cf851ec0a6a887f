r"""A bare answer as a string -> what it says: choice letters, words, or trees in one or two readings.

Dressing goes here: maths delimiters, bold, colour, "the answer is", a final full stop. Left out: which part of a
response is its answer (rewards/maths/extract.py).
"""

import functools
import re
from dataclasses import dataclass
from fractions import Fraction

from rewards.maths.parser import parse
from rewards.maths.tokens import CONSTANTS, FUNCTIONS, GREEK, plain
from rewards.maths.tree import Constant, Node, Number, Product, Text

MAX_CHARS = 2000
"""Longer answers are wrong, longer golds unusable; nobody boxes them."""

_DELIMITERS: tuple[tuple[str, str], ...]
_DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("`", "`"), ('"', '"'))
_DELIMITERS += (("“", "”"), ("\\begin{equation}", "\\end{equation}"), ("__", "__"))
_WRAPPER = re.compile(r"\\(?:boxed|fbox|text|textbf|textit|textrm|mathrm|mathbf|mbox|emph|boldsymbol|bm|framebox)\s*\{")
_COLOUR = re.compile(r"\\(?:color\s*\{[A-Za-z!0-9]*\}|textcolor\s*\{[A-Za-z!0-9]*\}|colorbox\s*\{[A-Za-z!0-9]*\})")
_LABEL = re.compile(
    r"\s*(?:so|thus|hence|therefore|and)?,?\s*(?:the|my)?\s*(?:final|correct)?\s*(?:answer|result|solution|option|choice)"
    r"s?\s*(?:is|are|:|=|：)+\s*:?\s*",
    re.IGNORECASE,
)
_NUMBER_SETS = re.compile(r"\\mathbf\s*\{\s*[RZNQ]\s*\}")
_LEADING = re.compile(r"\A(?:=(?!=)\s*|≈\s*|\\approx(?![A-Za-z])\s*|\\text(?:bf)?\s*\{[A-Za-z ]*:\s*\}\s*)")
_TRAILING = re.compile(r"(?:\s|\\[,;:!> ]|(?<!\\)[,;]|\\\\|\\$)+$")
_HALF_DAY = re.compile(r"(?<=[0-9\s{])([ap])\.?\s?m\b\.?(?![A-Za-z])", re.IGNORECASE)
_SPACING = re.compile(r"\\[,;:!> ]|~|\\q?quad(?![A-Za-z])|\\(?:left|right|displaystyle|[bB]igg?[lr]?)(?![A-Za-z])|\s+")
_CHOICE = re.compile(
    r"(?:(?:option|choice|answer)\s*)?(?:\(\s*([A-Ja-j])\s*\)|([A-Ja-j])\s*(?:[.):]|$)|\[([A-Ja-j])\])\s*(.*)",
    re.DOTALL | re.IGNORECASE,
)
_LETTERS = re.compile(r"\(?[A-J]\)?(?:\s*(?:,|and|or|&|;)?\s*\(?[A-J]\)?)*")
_PHRASE = re.compile(r"[A-Za-zÀ-ɏ][A-Za-zÀ-ɏ'’.,\s-]*")
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_THREE_LETTERS = frozenset("yes odd one two six ten all any dne red mon tue wed thu fri sat sun true none even".split())
_SAME_WORDS = {
    "does not exist": "dne", "do not exist": "dne", "d.n.e": "dne", "infinitely many solutions": "infinitely many",
    "infinite": "infinitely many", "infinite solutions": "infinitely many", "infinitely many": "infinitely many",
}  # fmt: skip
_CONSTANTS = {
    "no solution": "empty", "no solutions": "empty", "no real solution": "empty", "no real solutions": "empty",
    "empty set": "empty", "null set": "empty", "all real numbers": "reals", "all reals": "reals", "reals": "reals",
    "real numbers": "reals", "any real number": "reals", "set of all real numbers": "reals",
    "set of real numbers": "reals", "infinity": "infinity",
    "positive infinity": "infinity", "plus infinity": "infinity",
}  # fmt: skip
_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
)
_NUMBERS = {word: value for value, word in enumerate(f"{_ONES} eighteen nineteen".split())}
_NUMBERS |= {w: 10 * n for n, w in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)}
_NUMBERS |= {"hundred": 100, "one hundred": 100}


@dataclass(frozen=True)
class Answer:
    """What a bare answer says."""

    spelling: str
    """Without spacing and dressing: equal spellings are equal answers."""
    letters: str
    """The choice, such as "C" or "AC", in order; "" if it names none."""
    content: str
    """What stands beside the letter of a choice, `5` of `(A) 5`."""
    trees: tuple[Node, ...]
    """Its readings: two where a comma may separate thousands or items. Empty if it is unreadable."""
    problem: str = ""
    """Why it has none."""


@functools.lru_cache(maxsize=20_000)
def read(text: str) -> Answer:
    """Read one bare answer of at most MAX_CHARS characters. Never raises."""
    text = undress(text)
    letters, content = _choice(text)
    spelling = _spelling(text)
    phrase = _phrase(text)
    if phrase is not None:
        return Answer(spelling, letters, content, (phrase,))
    trees: list[Node] = []
    problem = ""
    # 1,234 alone is a number; in (1,234) or 1,234,x the comma may also separate.
    readings = (True, False) if re.search(r"[0-9],[0-9]{3}(?![0-9])", text) and not _is_number(text) else (True,)
    for groups in readings:
        try:
            tree = parse(text, groups=groups)
        except (ValueError, ArithmeticError, LookupError, TypeError, RecursionError) as error:
            problem = str(error)
        else:
            if tree not in trees:
                trees.append(tree)
    return Answer(spelling, letters, content, tuple(trees), problem)


def undress(text: str) -> str:
    """The answer without what is only around it."""
    text = plain(text).strip()
    while True:
        before = text
        text = _HALF_DAY.sub(r"\1m", _COLOUR.sub("", text))
        if text.endswith((".", "。")) and not text.endswith(".."):
            text = text[:-1].rstrip()
        text = _TRAILING.sub("", text).strip()
        if match := _LABEL.match(text):
            text = text[match.end() :]
        for start, end in _DELIMITERS:
            inner = text[len(start) : len(text) - len(end)]
            if (
                len(text) > len(start) + len(end)
                and text.startswith(start)
                and text.endswith(end)
                and start not in inner
            ):
                text = inner.strip()
        if (match := _WRAPPER.match(text)) and not _NUMBER_SETS.fullmatch(text) and _closes_at_end(text, match.end()):
            text = text[match.end() : -1].strip()
        text = _LEADING.sub("", text)
        if text == before:
            return text


def _closes_at_end(text: str, start: int) -> bool:
    """Whether the brace before `start` closes with the text's last character."""
    depth, index = 1, start
    while index < len(text):
        if text[index] == "\\":
            index += 1
        elif text[index] in "{}":
            depth += 1 if text[index] == "{" else -1
            if depth == 0:
                return index == len(text) - 1
        index += 1
    return False


def _spelling(text: str) -> str:
    """One string for spellings that differ in spacing and in the size of fractions and brackets."""
    text = _SPACING.sub(" ", text).replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac").replace("$", " ")
    # Spaces matter only between letters and digits: \pi r is no \pir, 1 2 no 12.
    return re.sub(r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])", "", text).strip()


def _choice(text: str) -> tuple[str, str]:
    bare = _TEXT_COMMAND.sub(r"\1 ", _SPACING.sub(" ", text)).replace("$", "").strip()
    if len(bare) > 1 and _LETTERS.fullmatch(bare):
        letters = re.findall("[A-J]", bare)
        if len(set(letters)) == len(letters):
            return "".join(sorted(letters)), ""
    match = _CHOICE.fullmatch(bare)
    if not match:
        return "", ""
    if re.match(r"(?:or|and)(?![a-z])|[,;&]", match[4], re.IGNORECASE):
        return "?", ""  # (C) or 5: no choice
    return (match[1] or match[2] or match[3]).upper(), match[4].strip()


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[-+\\$€£\s]*[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?[\s\\%A-Za-z{}^0-9/]*", text) is not None


def _phrase(text: str) -> Node | None:
    """The tree of an answer in words; None if it is maths."""
    bare = " ".join(_TEXT_COMMAND.sub(r" \1 ", _SPACING.sub(" ", text)).split())
    if not _PHRASE.fullmatch(bare) or not any(map(_is_english, re.findall(r"[^\s.,-]+", bare), [_upright(text)] * 99)):
        return None
    words = " ".join(w for w in re.findall(r"[^\s,-]+", bare.lower().rstrip(".")) if w not in ("a", "an", "the"))
    if words in _CONSTANTS:
        return Constant(_CONSTANTS[words])
    if words in ("negative infinity", "minus infinity"):
        return Product((Number(Fraction(-1)), Constant("infinity")))
    tens, _, ones = words.partition(" ")
    if words in _NUMBERS:
        return Number(Fraction(_NUMBERS[words]))
    if _NUMBERS.get(tens, 0) >= 20 and 0 < _NUMBERS.get(ones, 0) < 10:
        return Number(Fraction(_NUMBERS[tens] + _NUMBERS[ones]))
    return Text(_SAME_WORDS.get(words, words))


def _upright(text: str) -> bool:
    return r"\text" in text or r"\mathrm" in text or r"\mbox" in text


def _is_english(word: str, upright: bool) -> bool:
    """Whether a word can't be a product of variables or the name of a function."""
    if word in FUNCTIONS or (word in CONSTANTS and word != "infinity") or word in GREEK or len(word) < 2:
        return False
    if word.lower() in ("no", "or", "and", "mod", "in"):
        return word.lower() == "no"
    if len(word) < 4:
        return (
            word.lower() in _THREE_LETTERS or upright or (word[0].isupper() and word[1:].islower() and len(word) == 3)
        )
    name = next((name for name in FUNCTIONS if len(name) > 2 and word.startswith(name)), "")
    return not (name and len(word) - len(name) <= 1)
