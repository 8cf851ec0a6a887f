"""The words after a number -> a unit: its spelling, what it measures, and how much of it.

Left out: temperatures as values (20 °C is only itself), SI prefixes beyond those people write in answers.
"""

from fractions import Fraction

# What is measured -> unit -> how many of the base unit. Plurals and spellings below lead here.
_TABLE: dict[str, dict[str, Fraction | int]] = {
    "length": {
        "m": 1, "cm": Fraction(1, 100), "mm": Fraction(1, 1000), "km": 1000, "nm": Fraction(1, 10**9),
        "inch": Fraction(254, 10000), "ft": Fraction(3048, 10000), "yd": Fraction(9144, 10000),
        "mile": Fraction(1609344, 1000),
    },
    "mass": {
        "g": 1, "kg": 1000, "mg": Fraction(1, 1000), "tonne": 10**6, "lb": Fraction(45359237, 10**5),
        "oz": Fraction(45359237, 16 * 10**5),
    },
    "time": {"s": 1, "minute": 60, "hour": 3600, "day": 86400, "week": 7 * 86400, "ms": Fraction(1, 1000)},
    "years": {"year": 1, "month": Fraction(1, 12)},
    "volume": {"L": 1, "mL": Fraction(1, 1000), "gallon": Fraction(3785411784, 10**9)},
    "money": {"$": 1, "cent": Fraction(1, 100)},
    "angle": {"°": 1},
    "share": {"%": 1},
    "morning": {"am": 1},
    "afternoon": {"pm": 1},
}  # fmt: skip
_SPELLINGS = {
    "m": "meter metre", "cm": "centimeter centimetre", "mm": "millimeter millimetre", "km": "kilometer kilometre",
    "inch": "inches in", "ft": "foot feet", "yd": "yard", "mile": "mi", "g": "gram gramme", "kg": "kilogram kilo kgs",
    "mg": "milligram", "tonne": "tonnes", "lb": "pound lbs", "oz": "ounce", "s": "second sec secs",
    "minute": "min mins", "hour": "hr hrs h", "ms": "millisecond", "year": "yr yrs", "L": "l liter litre",
    "mL": "ml milliliter millilitre",
    "gallon": "gal", "$": "dollar usd", "cent": "¢", "°": "degree deg", "%": "percent percentage pct",
    "mile/hour": "mph", "km/hour": "kph kmh kmph",
    "square": "sq", "cubic": "cu", "unit": "", "nm": "nanometer", "rad": "radian",
}  # fmt: skip
MULTIPLIERS = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
"""Words after a number that multiply it."""
SHORT = frozenset("mgshlLANJWVKCF")
"""The one-letter units; another letter is a variable."""

_CANONICAL = {spelling: unit for unit, spellings in _SPELLINGS.items() for spelling in (unit, *spellings.split())}
_MEASURES = {unit: (what, Fraction(factor)) for what, units in _TABLE.items() for unit, factor in units.items()}
KNOWN = frozenset(name for name in (*_CANONICAL, *_MEASURES, *(f"{n}s" for n in _CANONICAL)) if len(name) > 1)


def canonical(word: str) -> str:
    """One spelling of a unit's word: `meters` is `m`, `hrs` is `hour`, any other word its lower-case singular."""
    for form in (word, word.lower(), word.lower().removesuffix("s")):
        if form in _CANONICAL or form in _MEASURES:
            return _CANONICAL.get(form, form)
    singular = word.lower()
    if singular.endswith("ies"):
        return singular[:-3] + "y"
    return singular.removesuffix("s") if not singular.endswith("ss") else singular


def spell(words: list[str]) -> str:
    """Words, `^` powers and `/` of one unit in one spelling: square centimeters is cm^2, m per s is m/s."""
    spelled: list[str] = []
    power = ""
    for index, word in reversed(list(enumerate(words))):
        if word.startswith("^-") and index:  # m s^-1
            over = [] if word == "^-1" else [f"^{word[2:]}"]
            words = [*words[: index - 1], "/", words[index - 1], *over, *words[index + 1 :]]
    for word in words:
        name = canonical(word) if word[0] not in "^/" else word
        if name in ("square", "cubic"):
            power = {"square": "^2", "cubic": "^3"}[name]
        elif name == "per":
            spelled.append("/")
        elif name in ("of", "the", "a", "each", "long", "old", "away", "exactly", "about", "in"):
            continue
        else:
            spelled.append(("" if not spelled or name[0] in "^/" or spelled[-1] == "/" else " ") + name + power)
            power = ""
    return "".join(spelled) or "unit"


def measure(unit: str) -> tuple[str, Fraction] | None:
    """What a spelled unit measures and its size in that measure's base unit; None for one not in the table."""
    if unit in _MEASURES:
        return _MEASURES[unit]
    name, _, power = unit.partition("^")
    if name in _MEASURES and power in ("2", "3"):
        what, factor = _MEASURES[name]
        return f"{what}^{power}", factor ** int(power)
    over, _, under = unit.partition("/")
    if under and (top := measure(over)) and (bottom := measure(under)):
        return f"{top[0]}/{bottom[0]}", top[1] / bottom[1]
    return None
