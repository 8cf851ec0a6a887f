r"""Completions -> the share of the reasoning's words that are in the asked language (arXiv 2501.12948, section 2.3.2).

Words are told apart by script, so `en` means any language in Latin letters: English against Chinese is seen, against
French it is not. Maths (`$...$`, `\(...\)`, `\[...\]`, commands, formulas in the open) and code (fences, backticks)
are not words, but letters of other scripts inside them are: nothing is hidden there. Left out: whether the words
make sense.

Weights: where a script has no spaces, a word is so many characters, about as many as a word of running text has.
"""

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rewards.completions import CLOSE, OPEN, text_of
from rewards.options import per_row

SCRIPTS = {
    "latin": r"A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u02af\u0300-\u036f\u1e00-\u1eff\uff21-\uff3a\uff41-\uff5a",
    "greek": r"\u0370-\u03ff\u1f00-\u1fff",
    "cyrillic": r"\u0400-\u052f",
    "hebrew": r"\u05d0-\u05ea",
    "arabic": r"\u0620-\u065f\u066e-\u06d3\u0750-\u077f",
    "devanagari": r"\u0900-\u0963\u0971-\u097f",
    "hangul": r"\u1100-\u11ff\u3130-\u318f\uac00-\ud7a3",
    "han": r"\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff",
    "kana": r"\u3041-\u3096\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9d",
    "thai": r"\u0e01-\u0e3a\u0e40-\u0e4e",
}
"""Script -> its letters, as in a character class."""
LANGUAGES = {
    **dict.fromkeys("en fr de es it pt nl sv da no fi pl cs ro hu tr id vi".split(), ("latin",)),
    "zh": ("han",),
    "ja": ("han", "kana"),
    "ko": ("hangul",),
    **dict.fromkeys("ru uk bg".split(), ("cyrillic",)),
    **dict.fromkeys("ar fa".split(), ("arabic",)),
    "he": ("hebrew",),
    "hi": ("devanagari",),
    "el": ("greek",),
    "th": ("thai",),
}
"""Language -> the scripts it is written in."""
CHARACTERS_A_WORD = {"han": 1.5, "kana": 2.0, "thai": 4.0}
"""Rounded averages; other scripts have spaces."""
NOT_WORDS = frozenset(
    "sin cos tan cot sec csc log ln lg exp lim max min mod gcd lcm det deg pi mm cm dm km mg kg ml hz".split()
)
"""Written alike in every language."""

_LETTERS = {
    script: re.compile(f"[{letters}]" + ("" if script in CHARACTERS_A_WORD else "+"))
    for script, letters in SCRIPTS.items()
} | {"other": re.compile(rf"(?:(?![{''.join(SCRIPTS.values())}])[^\W\d_])+")}
# A pair that never closes is text, but for a fence. No branch reads past the next opening, so the text is read once.
_NOT_TEXT = re.compile(
    r"```(?:[^`]|`(?!``))*+(?:```|\Z)"
    r"|`[^`\n]*+`"
    r"|\$\$(?:[^$]|\$(?!\$))*+\$\$"
    r"|\$(?=\S)[^$\n]*+(?<=\S)\$(?!\d)"
    r"|\\\[(?:[^\\]|\\(?![\[\]]))*+\\\]"
    r"|\\\((?:[^\\]|\\(?![()]))*+\\\)"
)
# In the open, an unbroken run of ASCII with a digit, a sign or a backslash in it.
_FORMULA = re.compile(r"(?<![!-~])[!-*,-/:;?-\[\]_`a-z~]*+[0-9=+^\\<>|{}][!-~]*")
_OF_FORMULAS = re.compile(r"[\x00-\u03ff]+")  # Latin and Greek


def language_reward(
    completions: Sequence[str | Sequence[Mapping[str, str]]],
    *,
    language: str | Sequence[str | None] = "en",
    **_: Any,
) -> list[float | None]:
    """Score the reasoning of each completion between 0 and 1; TRL's signature.

    language: a code such as "zh" or "en-GB", or a data column with each row's; None for rows whose column holds none.
    Reasoning without a word scores 0: saying nothing must not be the best way to stay in a language.
    differs: R1's count isn't published; see the weights above.
    """
    if isinstance(language, str) and scripts_of(language) is None:
        near = difflib.get_close_matches(language, LANGUAGES, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"language={language!r} is unknown{hint}: give one of {', '.join(LANGUAGES)}")
    return [
        share(reasoning(text_of(completion)), scripts) if (scripts := scripts_of(code)) else None
        for completion, code in zip(completions, per_row(language, len(completions)), strict=True)
    ]


def scripts_of(language: object) -> tuple[str, ...] | None:
    """The scripts of a language code, whatever country or variant follows it; None for anything else."""
    return LANGUAGES.get(re.split("[-_]", language.lower())[0]) if isinstance(language, str) else None


def reasoning(text: str) -> str:
    """What comes before the last `</think>`, or all of a response without one."""
    end = text.rfind(CLOSE)
    return (text if end < 0 else text[:end]).replace(OPEN, " ").replace(CLOSE, " ")


def share(text: str, scripts: Sequence[str]) -> float:
    """Share of a text's words that are in these scripts; 0 for a text without words."""
    words = count_words(text)
    return math.fsum(words[script] for script in scripts) / (math.fsum(words.values()) or 1.0)


def count_words(text: str) -> dict[str, float]:
    """Script -> how many words a text has in it, without maths and code."""
    text = _NOT_TEXT.sub(lambda found: _OF_FORMULAS.sub(" ", found[0]), text)
    text = _FORMULA.sub(" ", text)
    words = {
        script: len(letters.findall(text)) / CHARACTERS_A_WORD.get(script, 1.0) for script, letters in _LETTERS.items()
    }
    for script in ("latin", "greek"):
        words[script] = sum(map(_is_word, _LETTERS[script].findall(text)))
    words["other"] = sum(map(str.isalpha, _LETTERS["other"].findall(text)))  # ½ and ② are none
    return words


def _is_word(letters: str) -> bool:
    """Not a variable (x, π), a name of points or quantities (ABC, GDP), a function or a unit."""
    name = len(letters) == 1 or (len(letters) <= 4 and letters.isupper())
    return not name and letters.lower() not in NOT_WORDS
