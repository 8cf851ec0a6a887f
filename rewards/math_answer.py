r"""Completions and gold answers -> 1.0 (equal), 0.0 (wrong or no answer) or None (unusable gold).

The designated answer is the last `\boxed{...}` after the thinking. Two numbers are equal as exact fractions:
`0.5`, `1/2` and `\frac{2}{4}` agree, `0.3333` and `1/3` do not. Anything else is compared as a string after
cosmetic LaTeX is removed. Nothing is evaluated. Left out: algebra, mixed and scientific numbers, sets,
intervals, `x=5` for 5; these are equal only when written alike.

Signs that are read past: `$` and `\$` (currency or maths mode), one trailing full stop, thousands separators
(`1,000`, `1\,000`, `1{,}000`). A percent sign counts: `50\%` equals neither `50` nor `0.5`. A unit (degrees,
`\text{ cm}`) is ignored if only one side gives it; given by both, it must be the same.
"""

import math
import re
import string
from collections.abc import Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any, NamedTuple

from rewards.completions import after_thinking, last_boxed, text_of

MAX_ANSWER_CHARS = 1000
"""Longer answers are wrong and longer golds unusable: keeps every integer and every regex below cheap."""

# Minus sign and full-width characters. Not NFKC: that would turn 10² into 102.
_ALIKE = {0x2212: "-", 0xFF0D: "-"} | {0xFF10 + digit: str(digit) for digit in range(10)}
_INTEGER = r"(?:[0-9]{1,3}(?:(?:,|\{,\}|\\,)[0-9]{3})+|[0-9]+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.[0-9]*)?|\.[0-9]+)"
_SIGN = r"(?:[+-]\s*)?"
_NUMBER = re.compile(
    rf"(?P<sign>{_SIGN})\$?\s*(?:"
    rf"\\[dt]?frac\s*\{{\s*(?P<top>{_SIGN}{_DECIMAL})\s*\}}\s*\{{\s*(?P<bottom>{_SIGN}{_DECIMAL})\s*\}}"
    r"|\\[dt]?frac\s*(?P<top1>[0-9])\s*(?P<bottom1>[0-9])"
    rf"|(?P<left>{_DECIMAL})(?:\s*/\s*(?P<right>{_DECIMAL}))?"
    r")"
)
_SEPARATOR = re.compile(r",|\{,\}|\\,|\s")
_WRAPPED = re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf)\s*\{([^{}]*)\}")
_UNIT = re.compile(
    r"\s*(?:\\text|\\textrm|\\mathrm|\\mbox)\s*\{([A-Za-z\s./-]*)\}\s*(\^\s*(?:[0-9]|\{\s*[0-9]\s*\}))?$"
)
_DEGREE = re.compile(r"\s*(?:°|\^\s*(?:\\circ|\{\s*\\circ\s*\}))$")
_PERCENT = re.compile(r"\s*(?:\\?%|\\(?:text|mathrm)\s*\{\s*(?:\\?%|percent)\s*\})$")
# Words in \text{} that change the value or offer a second answer.
_NOT_UNITS = frozenset("or and hundred thousand million billion trillion dozen percent pi".split())
# The one-letter units; any other single letter may be a variable, i or e.
_SHORT_UNITS = frozenset("mgshlL")
_CHOICE = re.compile(r"\(?\s*([A-J])\s*[.)]?")
_SPACING = re.compile(r"\\[,;:! ]|~|\\(?:left|right|displaystyle)(?![A-Za-z])")
_AROUND_OPERATORS = re.compile(r"\s?([-+*/=<>,;:^_(){}\[\]|])\s?")


class Number(NamedTuple):
    """An exact number as written in an answer."""

    value: Fraction
    percent: bool
    unit: str
    """Without whitespace; "" if none."""


def accuracy(
    prompts: Sequence[Any] | None = None,
    completions: Sequence[str | Sequence[Mapping[str, str]]] = (),
    answer: Sequence[Any] = (),
    **_: Any,
) -> list[float | None]:
    r"""Grade each completion against its gold `answer`; TRL's signature.

    A gold is a string (bare, GSM8K's `... #### 42`, or a solution with a `\boxed{}`) or a number. Returns
    1.0, 0.0, or None where the gold is empty or unusable. Raises ValueError if the lists differ in length.
    """
    if len(completions) != len(answer):
        raise ValueError(f"answer: {len(answer)} golds for {len(completions)} completions; give one for each")
    return [grade(text_of(completion), gold) for completion, gold in zip(completions, answer, strict=True)]


def grade(response: str, gold: object) -> float | None:
    """Grade one response: 1.0 equal, 0.0 different or without an answer, None if the gold is unusable."""
    expected = read_gold(gold)
    if expected is None:
        return None
    text = after_thinking(response)
    given = last_boxed(text) if text is not None else None
    return 0.0 if given is None else float(equal(given, expected))


def read_gold(gold: object) -> str | None:
    """The bare gold answer; None if there is none to compare with."""
    if isinstance(gold, int | float) and not isinstance(gold, bool):
        return format(Decimal(repr(gold)), "f") if math.isfinite(gold) else None
    if not isinstance(gold, str):
        return None
    if "####" in gold:
        gold = gold[gold.rfind("####") + 4 :]
    elif r"\boxed" in gold:
        gold = last_boxed(gold) or ""
    gold = gold.strip()
    if len(gold) > MAX_ANSWER_CHARS:
        return None
    says_something = _canonical(_tidy(gold)).strip(string.punctuation + string.whitespace)
    return gold if says_something else None


def equal(given: str, gold: str) -> bool:
    """Whether two bare answers are the same. Symmetric, but a gold letter A-J also accepts lower case."""
    if len(given) > MAX_ANSWER_CHARS:
        return False
    given, gold = _tidy(given), _tidy(gold)
    left, right = read_number(given), read_number(gold)
    if left and right:
        same_unit = left.unit == right.unit or not left.unit or not right.unit
        return left.value == right.value and left.percent == right.percent and same_unit
    choice = _CHOICE.fullmatch(gold)
    if choice:
        letter = _CHOICE.fullmatch(given.upper())
        return letter is not None and letter[1] == choice[1]
    return _canonical(given) == _canonical(gold)


def read_number(text: str) -> Number | None:
    """Read a tidied answer that is one number, with an optional percent sign or unit; None if it isn't."""
    text = text.lstrip("$").lstrip()
    percent = _PERCENT.search(text)
    unit = ""
    if percent:
        text = text[: percent.start()]
    elif degree := _DEGREE.search(text):
        text, unit = text[: degree.start()], "°"
    elif (found := _UNIT.search(text)) and _is_unit(found[1]):
        text, unit = text[: found.start()], re.sub(r"[\s{}.]", "", found[1] + (found[2] or ""))
    match = _NUMBER.fullmatch(text)
    if not match:
        return None
    top = _fraction(match["left"] or match["top"] or match["top1"])
    bottom = _fraction(match["right"] or match["bottom"] or match["bottom1"] or "1")
    if bottom == 0:
        return None
    value = top / bottom
    return Number(-value if match["sign"].startswith("-") else value, bool(percent), unit)


def _fraction(digits: str) -> Fraction:
    return Fraction(_SEPARATOR.sub("", digits))


def _is_unit(words: str) -> bool:
    found = re.findall("[A-Za-z]+", words)
    return all(word in _SHORT_UNITS or (len(word) > 1 and word.lower() not in _NOT_UNITS) for word in found)


def _tidy(text: str) -> str:
    """Remove what never carries meaning: maths delimiters, a whole-answer wrapper, one trailing full stop."""
    text = text.translate(_ALIKE).replace(r"\!", "").replace(r"\$", "$").strip()
    while True:
        before = text
        if text.endswith(".") and not text.endswith(".."):
            text = text[:-1].rstrip()
        for start, end in (("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
            if len(text) > len(start) + len(end) and text.startswith(start) and text.endswith(end):
                text = text[len(start) : -len(end)].strip()
        if wrapped := _WRAPPED.fullmatch(text):
            text = wrapped[1].strip()
        if text.startswith(r"\boxed{") and text == rf"\boxed{{{(inner := last_boxed(text))}}}":
            text = inner or ""
        if text == before:
            return text


def _canonical(text: str) -> str:
    """One spelling for cosmetic variants of the same LaTeX."""
    text = _SPACING.sub(" ", text).replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac")
    return _AROUND_OPERATORS.sub(r"\1", " ".join(text.split())).strip()
