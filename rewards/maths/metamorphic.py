r"""Golden cases -> more cases whose verdict is known without a solver: reworded, spoilt and swapped.

A gold reworded is still right, a gold with another digit, bracket or item is wrong, and what is right one way
round is right the other. The rules work on characters, away from the parser they test. Left out: algebra (the
golden file has it).
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

OTHER = "7919"
"""A number that no golden answer has."""

_INTEGER = re.compile(r"-?\d+")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_FRACTION = re.compile(r"(-?)\\frac\{(\d+)\}\{(\d+)\}")
_WORD = re.compile(r"\\text\{([A-Za-z]+)\}")
_CHOICE = re.compile(r"\(?[A-E]\b|\\text(?:bf)?\{\(?[A-E]\b")
_PAIR = re.compile(r"([(\[])([^()\[\],;]+)([,;])([^()\[\],;]+)([)\]])")
_SYMBOLS = {r"\pi": "π", r"\infty": "∞", r"\cup": "∪", r"\cdot": "·", r"\times": "×", r"\pm": "±"}
_RELATIONS = {
    **{r"\le": r"\leq", r"\leq": "≤", r"\ge": r"\geq", r"\geq": "≥", r"\ne": r"\neq", r"\neq": "≠"},
    **{"<": r"\lt ", ">": r"\gt "},
}

Rule = Callable[[str], str | None]
"""A gold -> a response, or None where the rule doesn't apply."""


def cases(rows: Iterable[Mapping[str, Any]], rules: int | None = None) -> Iterator[dict[str, Any]]:
    """Golden rows -> new rows of the same columns; a gold gets `rules` of each table, in turn, or all for None."""
    rows = list(rows)
    golds = {row["gold"]: row for row in rows if row["want"] != "unknown" and is_bare(row["gold"])}
    for number, (gold, row) in enumerate(golds.items()):
        for table, want in ((PARAPHRASES, "right"), (PERTURBATIONS, "wrong")):
            made = [(why, text) for why, rule in table.items() if (text := rule(gold)) not in (None, gold)]
            start = number if rules is not None else 0
            for why, text in (made[start % len(made) :] + made[: start % len(made)])[:rules]:
                yield {**row, "why": why, "want": want, "kind": "metamorphic", "response": text}
    for row in rows:
        # A gold may leave out what a response may not: its percent sign, and everything when it is hostile.
        if row["want"] == "right" and is_bare(row["gold"]) and is_bare(row["response"]) and "%" not in row["gold"]:
            swapped = {"gold": row["response"], "response": row["gold"]}
            yield {**row, **swapped, "why": f"the other way round: {row['why']}", "kind": "metamorphic"}


def is_bare(text: object) -> bool:
    """An answer and nothing around it."""
    return isinstance(text, str) and not re.search(r"box|####|</?(?:think|answer)>|(?<!\\)\$|\*\*|\\[(\[]", text)


def _matching(rule: Rule, shape: re.Pattern[str]) -> Rule:
    return lambda gold: rule(gold) if shape.fullmatch(gold) else None


def _template(template: str) -> Rule:
    return lambda gold: template.replace("@", gold)


def _replaced(table: Mapping[str, str]) -> Rule:
    """LaTeX names and signs by other ones; not next to words, where a letter may follow."""
    names = "|".join(re.escape(name) + "(?![A-Za-z])" * name.startswith("\\") for name in table)
    return lambda gold: None if "\\text" in gold else re.sub(names, lambda match: table[match[0]], gold)


def _sized(gold: str) -> str | None:
    """Sized outer brackets, if the first one closes at the end."""
    if not gold or gold[0] not in "([" or gold[-1] not in ")]":
        return None
    depth = 0
    for position, sign in enumerate(gold):
        depth += (sign in "([") - (sign in ")]")
        if depth == 0:
            return rf"\left{gold[:-1]}\right{gold[-1]}" if position == len(gold) - 1 else None
    return None


def _scaled(gold: str) -> str | None:
    match = _FRACTION.fullmatch(gold)
    return rf"{match[1]}\frac{{{3 * int(match[2])}}}{{{3 * int(match[3])}}}" if match else None


def _slashed(gold: str) -> str | None:
    match = _FRACTION.fullmatch(gold)
    return f"{match[1]}{match[2]}/{match[3]}" if match else None


def _grouped(separator: str) -> Rule:
    return _matching(lambda gold: f"{int(gold):,}".replace(",", separator), re.compile(r"-?[1-9]\d{3,}"))


def _last_digit(gold: str) -> str | None:
    """One more; not in a binomial, which is symmetric, nor in the value behind a letter, which decides."""
    found = list(re.finditer(r"\d", gold))
    if not found or r"\binom" in gold or _CHOICE.match(gold):
        return None
    position = found[-1].start()
    return f"{gold[:position]}{(int(gold[position]) + 1) % 10}{gold[position + 1 :]}"


def _negated(gold: str) -> str | None:
    if not (_NUMBER.fullmatch(gold) or _FRACTION.fullmatch(gold)) or not re.search("[1-9]", gold):
        return None
    return gold[1:] if gold.startswith("-") else f"-{gold}"


def _pair(change: Callable[[re.Match[str]], str]) -> Rule:
    def rule(gold: str) -> str | None:
        match = _PAIR.fullmatch(gold)
        return change(match) if match and match[2].strip() != match[4].strip() else None

    return rule


def _other_bracket(match: re.Match[str]) -> str:
    """The left bracket changed; the right one if infinity is on the left."""
    left, right = match[1], match[5]
    if "infty" in match[2]:
        right = {")": "]", "]": ")"}[right]
    else:
        left = {"(": "[", "[": "("}[left]
    return f"{left}{match[2]}{match[3]}{match[4]}{right}"


_BY_NUMBER: dict[str, Rule] = {
    "as x = ...": _matching(_template("x = @"), _NUMBER),
    "full-width digits": _matching(lambda gold: re.sub(r"\d", lambda d: chr(0xFF10 + int(d[0])), gold), _NUMBER),
    "as a fraction": _matching(lambda gold: rf"\frac{{{2 * int(gold)}}}{{2}}", re.compile(r"-?\d{1,12}")),
    "with .0": _matching(_template("@.0"), _INTEGER),
    "one more zero": _matching(_template("@0"), re.compile(r"-?\d+\.\d+")),
    "commas": _grouped(","),
    "LaTeX commas": _grouped("{,}"),
    "thin spaces": _grouped(r"\,"),
    "fraction not reduced": _scaled,
    "fraction with a slash": _slashed,
}
PARAPHRASES: dict[str, Rule] = {
    "boxed in a sentence": _template(r"Hence the answer is $\boxed{@}$."),
    "boxed after thinking": _template(f"<think>\nIt might be {OTHER}.\n</think>\n" r"So \(\boxed{@}\)."),
    "boxed twice": _template(r"So \boxed{@}. Another way also gives \boxed{@}."),
    "in answer tags": _template(f"<think>\n{OTHER}?\n</think>\n<answer>@</answer>"),
    "in maths mode": _template("$@$"),
    "bold": _template("**@**"),
    "full stop": lambda gold: None if gold.endswith((".", "!", "dots")) else f"{gold}.",
    "invisible characters around": _template("\u200b@\u00a0"),
    "spaces around": _template("  @\n"),
    "display fractions": lambda gold: gold.replace(r"\frac", r"\dfrac"),
    "sized brackets": _sized,
    "spaces at =": lambda gold: re.sub(r"(?<![<>!=])\s*=\s*(?!=)", " = ", gold),
    "Unicode symbols": _replaced(_SYMBOLS),
    "Unicode minus": _replaced({"-": "−"}),
    "other relation signs": _replaced(_RELATIONS),
    "other text font": _matching(lambda gold: gold.replace(r"\text", r"\textbf"), _WORD),
    "capitals": _matching(lambda gold: rf"\text{{{gold[6:-1].upper()}}}", _WORD),
    **_BY_NUMBER,
}
"""Why a response still means the gold -> how to write it. `@` stands for the gold."""

PERTURBATIONS: dict[str, Rule] = {
    "last digit": _last_digit,
    "sign": _negated,
    "times ten": _matching(_template("@0"), re.compile(r"-?[1-9]\d*")),
    "plus one": _matching(lambda gold: str(int(gold) + 1), re.compile(r"-?\d{1,12}")),
    "a bit more": _matching(_template("@+10^{-40}"), re.compile(rf"{_NUMBER.pattern}|{_FRACTION.pattern}")),
    "a false link": _matching(_template(f"@ = {OTHER}"), _NUMBER),
    "items swapped": _pair(lambda match: f"{match[1]}{match[4]}{match[3]}{match[2]}{match[5]}"),
    "other bracket": _pair(_other_bracket),
    "an item more": lambda gold: None if _CHOICE.match(gold) else f"{gold}, {OTHER}",
    "or": _template(rf"@ \text{{ or }} {OTHER}"),
    "denied": _matching(lambda gold: gold.replace("{", "{not "), _WORD),
    "cut off": _template(r"The answer is \boxed{@"),
    "only thought": _template(r"<think>So \boxed{@}.</think>"),
    "still thinking": _template(r"<think>So \boxed{@}."),
    "withdrawn": _template(r"First \boxed{@}, but then \boxed{"),
    "changed": _template(rf"First \boxed{{@}}, but that is wrong: \boxed{{{OTHER}}}."),
}
"""Why a response doesn't mean the gold -> how to write it."""
