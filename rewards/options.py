"""A reward's name with options -> the two apart: `"length(max_tokens=4096, buffer=512)"`.

Options are numbers, true, false, null or words, as YAML writes them; nothing is evaluated. Left out: which options a
reward has (`rewards.resolve` asks its signature).
"""

import re
from collections.abc import Sequence
from typing import Any

Option = int | float | bool | str | None

_CALL = re.compile(r"(?P<name>[^()\s]+)\s*\((?P<options>[^()]*)\)\s*")
_OPTION = re.compile(r"\s*(?P<name>[A-Za-z_]\w*)\s*=\s*(?P<value>[^,=\s](?:[^,=]*[^,=\s])?)\s*")
_WORDS: dict[str, Option] = {"true": True, "false": False, "null": None, "none": None}


def split_options(name: str) -> tuple[str, dict[str, Option]]:
    """The bare name and its options; none where there are no parentheses. Raises ValueError for anything else."""
    if "(" not in name:
        return name, {}
    call = _CALL.fullmatch(name)
    given = call["options"].split(",") if call and call["options"].strip() else []
    options = [_OPTION.fullmatch(option) for option in given]
    if call is None or None in options:
        raise ValueError(f"reward {name!r}: options are written name(option=value, option=value)")
    pairs = [(option["name"], _value(option["value"])) for option in options if option]
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"reward {name!r}: an option is given twice")
    return call["name"], dict(pairs)


def per_row(option: Any, count: int) -> list[Any]:
    """An option for each of `count` rows: a data column of its name gives every row its own."""
    if isinstance(option, Sequence) and not isinstance(option, str):
        return list(option)
    return [option] * count


def _value(text: str) -> Option:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text.strip("'\"")
