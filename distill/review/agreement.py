"""What reviewers said about the same rows -> how far they agree, pair by pair."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Of two reviewers."""

    first: str
    second: str
    rows: int
    """Rows that both have judged."""
    raw: float
    """Share of them on which they said the same: accept, edit or reject."""
    kappa: float | None
    """Cohen's κ; None where each always says the same one thing."""


def cohen_kappa(pairs: Sequence[tuple[str, str]]) -> float | None:
    """κ = (p_o − p_e) / (1 − p_e) of two raters' labels for the same things (Cohen 1960).

    p_o is the share of equal labels, p_e what chance would make it, if each rater kept the shares of his own labels. 1:
    they always agree; 0: no better than chance. None where p_e is 1 (κ is 0/0) or there are no pairs.
    """
    n = len(pairs)
    if not n:
        return None
    first, second = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    chance = sum(first[label] * second[label] for label in first)  # n² p_e
    if chance == n * n:
        return None
    return (n * sum(a == b for a, b in pairs) - chance) / (n * n - chance)


def agreements(judgements: Iterable[Mapping[str, str]]) -> list[Agreement]:
    """Of every two reviewers who share a row; judgements: for each row, reviewer -> label."""
    pairs: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for said in judgements:
        for a, b in combinations(sorted(said), 2):
            pairs.setdefault((a, b), []).append((said[a], said[b]))
    return [
        Agreement(
            first=a, second=b, rows=len(both), raw=sum(x == y for x, y in both) / len(both), kappa=cohen_kappa(both)
        )
        for (a, b), both in sorted(pairs.items())
    ]
