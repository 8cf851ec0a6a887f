"""What came out of the jail, beside what was expected: plain bytes, and values by their exact types.

Runs outside, and only on bytes and JSON: no candidate's class, method or hash takes part, and no set or dict is
built of what a candidate chose (colliding integers would cost minutes). Left out: floats that are only near.
"""

import json
import math
from typing import Any

from rewards.sandbox.values import MAX_DEPTH


def same_output(expected: str, output: bytes) -> bool:
    """Whether all lines are equal but for white space at their ends and empty lines at the end of the whole."""
    return _lines(expected.encode("utf-8", "surrogateescape")) == _lines(output)


def _lines(text: bytes) -> list[bytes]:
    return [line.rstrip() for line in text.rstrip().split(b"\n")]


def same_value(expected: Any, got: Any, *, exact: bool) -> bool:
    """Compare two values as rewards/sandbox/values.py encodes them.

    `exact`: by JSON's types, so that 1, 1.0 and true are three values, and a tuple is a list, since JSON has
    no tuple. Otherwise as Python's `==` does for built-in types. NaN equals nothing. Raises ValueError if `got`
    isn't an encoded value.
    """
    got_text = canonical(got, exact)  # first: it may be no value at all
    return got_text is not None and got_text == canonical(expected, exact)


def canonical(node: Any, exact: bool, depth: int = MAX_DEPTH) -> str | None:
    """A text that two values share if and only if they are equal; None for what equals nothing, as NaN."""
    if depth == 0:
        raise ValueError("a value too deep")
    if isinstance(node, str):
        return json.dumps(node)
    if node is None or (exact and isinstance(node, bool)):
        return str(node)
    if isinstance(node, int | float):
        return _number(node, exact)
    if isinstance(node, list):
        return _joined("list", node, exact, depth)
    if not isinstance(node, dict) or len(node) != 1:
        raise ValueError("not a value")
    ((kind, content),) = node.items()
    if kind in ("tuple", "complex", "range", "iterator", "set", "frozenset", "dict") and isinstance(content, list):
        if kind == "dict" and not all(isinstance(pair, list) and len(pair) == 2 for pair in content):
            raise ValueError("a dict that is no list of pairs")
        if kind == "iterator" or (exact and kind not in ("tuple", "dict")):
            _joined(kind, content, exact, depth)  # it must be a value, though it equals none
            return None
        return _joined("list" if exact and kind == "tuple" else kind, content, exact, depth)
    if kind == "int" and isinstance(content, str):
        return _number(int(content, 16), exact)
    if kind == "bytes" and isinstance(content, str):
        return None if exact else f"bytes {json.dumps(content)}"
    if kind == "float" and content in ("inf", "-inf", "nan"):
        return None if exact or content == "nan" else content
    raise ValueError(f"a value of kind {kind!r}")


def _joined(kind: str, items: list[Any], exact: bool, depth: int) -> str | None:
    parts = [canonical(item, exact, depth - 1) for item in items]
    texts = [part for part in parts if part is not None]
    if len(texts) < len(parts):
        return None
    if kind in ("set", "frozenset"):
        kind, texts = "set", sorted(set(texts))
    if kind == "dict":
        texts.sort()
    return f"{kind}({','.join(texts)})"


def _number(number: int | float, exact: bool) -> str:
    if isinstance(number, float):
        if not math.isfinite(number):
            raise ValueError("a number that is not finite")
        if exact or not number.is_integer():
            return repr(number + 0.0)
    return hex(int(number))
