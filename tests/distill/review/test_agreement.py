"""Cohen's κ against cases worked by hand and against its definition on a table of counts."""

import random
from fractions import Fraction

import numpy as np
import pytest

from distill.review.agreement import agreements, cohen_kappa


def pairs(table: dict[str, int]) -> list[tuple[str, str]]:
    """{"ab": 3} is three things that the first calls a and the second b."""
    return [(labels[0], labels[1]) for labels, count in table.items() for _ in range(count)]


@pytest.mark.parametrize(
    ("table", "kappa"),
    [
        ({"aa": 20, "ar": 5, "ra": 10, "rr": 15}, Fraction(2, 5)),  # p_o 35/50, p_e .5 × .6 + .5 × .4
        ({"aa": 45, "ar": 15, "ra": 25, "rr": 15}, Fraction(3, 23)),  # p_o .6, p_e .6 × .7 + .4 × .3 = .54
        ({"aa": 25, "ar": 35, "ra": 5, "rr": 35}, Fraction(7, 27)),  # p_o .6, p_e .6 × .3 + .4 × .7 = .46
        ({"aa": 1, "ee": 1, "rr": 1}, Fraction(1)),
        ({"ar": 1, "ra": 1}, Fraction(-1)),
        ({"ae": 1, "er": 1, "ra": 1}, Fraction(-1, 2)),  # p_o 0, p_e 1/3
        ({"aa": 1, "ar": 1}, Fraction(0)),  # a second who tosses coins, a first who always accepts
    ],
)
def test_kappa_of_cases_worked_by_hand(table: dict[str, int], kappa: Fraction) -> None:
    assert cohen_kappa(pairs(table)) == pytest.approx(float(kappa))


def test_kappa_is_undefined_without_rows_and_without_variety() -> None:
    assert cohen_kappa([]) is None
    assert cohen_kappa(pairs({"aa": 7})) is None
    assert cohen_kappa(pairs({"ar": 7})) == 0


def test_kappa_is_the_definition_on_the_table_of_counts() -> None:
    rng = random.Random(0)
    for _ in range(200):
        said = [(rng.choice("aer"), rng.choice("aaer")) for _ in range(rng.randint(1, 30))]
        table = np.zeros((3, 3))
        for first, second in said:
            table["aer".index(first), "aer".index(second)] += 1 / len(said)
        p_o, p_e = np.trace(table), table.sum(1) @ table.sum(0)
        if p_e < 1 - 1e-9:
            assert cohen_kappa(said) == pytest.approx((p_o - p_e) / (1 - p_e))
        else:
            assert cohen_kappa(said) is None


def test_every_pair_is_compared_on_the_rows_it_shares() -> None:
    said = [
        {"raj": "accept", "ana": "accept"},
        {"ana": "reject", "raj": "accept", "zoe": "edit"},
        {"zoe": "accept"},
        {"ana": "reject", "raj": "reject"},
        {},
    ]
    found = {(a.first, a.second): (a.rows, a.raw, a.kappa) for a in agreements(said)}
    assert found == {
        ("ana", "raj"): (3, pytest.approx(2 / 3), pytest.approx(0.4)),  # p_e = 1/3 × 2/3 + 2/3 × 1/3
        ("ana", "zoe"): (1, 0.0, 0.0),
        ("raj", "zoe"): (1, 0.0, 0.0),
    }
