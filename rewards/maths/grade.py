"""A gold answer and a response -> a verdict: right, wrong, or unknown where the gold is of no use.

Golds and pairs are remembered, so a group's completions are graded against a gold that was read once. Nothing in
either text is ever evaluated as code, and nothing here uses signals: safe in threads, asyncio and workers.
"""

import functools
import logging
import math
import string
import time
from decimal import Decimal

from rewards.maths.answer import MAX_CHARS, Answer, read
from rewards.maths.compare import Finding, compare
from rewards.maths.extract import boxes, extract, joined
from rewards.maths.tree import Text
from rewards.verdict import Verdict

log = logging.getLogger(__name__)


def grade_math(gold: object, response: str, *, boxed_only: bool = False) -> Verdict:
    r"""Whether the response's answer is the gold one.

    gold: a string (a bare answer, GSM8K's `... #### 42`, or a solution with a `\boxed{}`) or a number.
    response: a whole completion, with or without thinking, or a bare answer. `boxed_only`: a bare one is no answer.
    """
    start = time.perf_counter()
    expected = read_gold(gold)
    extracted = extract(response, boxed_only=boxed_only)
    if expected is None:
        outcome, reason = "unknown", "gold-unparsable"
    elif extracted.answer is None:
        outcome, reason = "wrong", extracted.reason
    else:
        try:
            finding = equal(expected, extracted.answer)
        except RuntimeError as error:  # sympy's process can't be started: nobody can say
            log.warning("grading is out: %s", error)
            outcome, reason = "unknown", "grader-fault"
        else:
            outcome = "right" if finding.equal else "wrong"
            reason = f"{'equal' if finding.equal else 'unequal'}/{finding.reason}"
    milliseconds = (time.perf_counter() - start) * 1000
    return Verdict(outcome=outcome, reason=reason, answer=extracted.answer, ms=milliseconds)  # type: ignore[arg-type]


def read_gold(gold: object) -> str | None:
    """The bare gold answer; None if there is none that anything could equal."""
    if isinstance(gold, int | float) and not isinstance(gold, bool):
        return format(Decimal(repr(gold)), "f") if math.isfinite(gold) else None
    return _gold(gold) if isinstance(gold, str) else None


@functools.lru_cache(maxsize=20_000)
def _gold(gold: str) -> str | None:
    if "####" in gold:
        gold = gold[gold.rfind("####") + 4 :]
    elif found := boxes(gold):
        gold = joined(gold, found).answer or ""
    gold = gold.strip()
    if not gold or len(gold) > MAX_CHARS:
        return None
    answer = read(gold)
    says_something = answer.spelling.strip(string.punctuation + string.whitespace)
    return gold if answer.trees or answer.letters or (says_something and _is_whole(gold)) else None


def _is_whole(gold: str) -> bool:
    """Whether notation unknown here (an integral, a limit) is at least complete, so that it can be written again."""
    plain = gold.replace(r"\{", "").replace(r"\}", "")
    pairs = [("{", "}"), (r"\begin", r"\end"), ("(", ")")]
    whole = all(plain.count(a) == plain.count(b) for a, b in pairs) and "{}" not in plain
    opened = sum(map(gold.count, "([")) == sum(map(gold.count, ")]"))  # [0, 1) is whole
    cut = gold.rstrip().endswith(("\\", "=", "+", "^", "_", r"\frac")) or gold.lstrip().startswith(("^", "_"))
    return whole and opened and not cut


@functools.lru_cache(maxsize=50_000)
def equal(gold: str, given: str) -> Finding:
    """Whether two bare answers are the same; remembered."""
    left, right = read(gold), read(given)
    variable = len(left.spelling) == 1 and left.spelling.islower()
    if left.letters and not variable and (finding := _choices(left, right)) is not None:
        return finding
    if left.spelling == right.spelling:
        trees = left.trees[:1]
        return compare(trees[0], trees[0])._replace(reason="string") if trees else Finding(True, "string")
    texts = [tree for answer in (left, right) for tree in answer.trees if isinstance(tree, Text)]
    if texts and left.spelling.casefold() == right.spelling.casefold():
        return Finding(True, "text")
    if not right.trees:
        return Finding(False, "answer-unparsable")
    if not left.trees:
        return Finding(False, "spelling")
    finding = Finding(False, "kind")
    for a in left.trees:
        for b in right.trees:
            try:
                finding = compare(a, b)
            except (ValueError, ArithmeticError, LookupError, TypeError, RecursionError) as error:
                # Nothing known does; but a completion nobody foresaw must cost its own verdict only.
                finding = Finding(False, f"error/{type(error).__name__}")
            if finding.equal:
                return finding
    return finding


def _choices(gold: Answer, given: Answer) -> Finding | None:
    """A gold that is a letter (or letters) wants this letter, whatever stands beside it."""
    if given.letters:
        same = given.letters == gold.letters
        if same and gold.content and given.content and gold.content != given.content:
            return equal(gold.content, given.content)
        return Finding(same, "choice")
    if gold.content and gold.content != given.spelling:
        return equal(gold.content, given.spelling) if given.spelling else None
    return None
