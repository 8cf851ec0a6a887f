"""Plots: points where they belong, ticks that are round, long curves averaged."""

import re
from typing import Any

import pytest

from runtime.report.figures import histogram
from runtime.report.svg import BOTTOM, LEFT, RIGHT, TOP, Plot, Series, draw, powers, thin, ticks


def series(values: list[float], **more: Any) -> Series:
    return Series(label="x", colour=1, steps=list(range(len(values))), values=values, **more)


def points(svg: str) -> list[tuple[float, float]]:
    (found,) = re.findall(r'<polyline class="line c1" points="([^"]*)"', svg)
    return [tuple(map(float, pair.split(","))) for pair in found.split()]  # type: ignore[misc]


def test_a_share_goes_from_corner_to_corner() -> None:
    (left, bottom), (right, top) = points(draw(Plot(series=[series([-0.02, 1.02])], scale="share"), "t"))
    assert (left, bottom, right, top) == (LEFT, BOTTOM, RIGHT, TOP)


def test_decades_are_as_far_apart_as_each_other() -> None:
    at = points(draw(Plot(series=[series([1e-6, 1e-5, 0.0, 1e-4])], scale="log"), "t"))
    assert [y for _, y in at] == [BOTTOM, (TOP + BOTTOM) / 2, TOP]  # the 0 has no place
    assert [x for x, _ in at][1:] == pytest.approx([LEFT + (RIGHT - LEFT) / 3, RIGHT], abs=0.1)


def test_a_band_goes_there_above_and_back_below() -> None:
    svg = draw(Plot(series=[series([0.5, 0.5], low=[0.0, 0.25], high=[1.0, 0.75])], scale="share"), "t")
    (band,) = re.findall(r'<path class="band c1" d="M([^"]*)Z"', svg)
    heights = [float(pair.split()[1]) for pair in re.findall(r"[\d.]+ [\d.]+", band)]
    assert heights[0] < heights[1] < heights[2] < heights[3]  # high, high, low, low; SVG's y grows downwards


def test_bars_stand_on_each_other() -> None:
    svg = draw(Plot(series=[series([1.0, 2.0]), series([3.0, 2.0])], stacked=True), "t")
    first, second = re.findall(r'<path class="fill c1" d="([^"]*)"', svg)
    tops = [float(y) for y in re.findall(r"V([\d.]+)H", first)]
    feet = [float(y) for y in re.findall(r"M[\d.]+ ([\d.]+)V", second)]
    assert tops == feet
    assert len({float(y) for y in re.findall(r"V([\d.]+)H", second)}) == 1  # 4 in all, both times


def test_a_single_point_is_a_dot() -> None:
    svg = draw(Plot(series=[series([3.0])]), "t")
    assert svg.count("<circle") == 1 and "polyline" not in svg


def test_the_title_is_escaped() -> None:
    assert 'aria-label="&lt;b&gt;&#34;"' in draw(Plot(series=[series([1.0])]), '<b>"')


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 25, [0, 5, 10, 15, 20, 25]), (-3, 7, [-2, 0, 2, 4, 6]), (5, 5, [5])],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_ticks_of_steps_are_whole() -> None:
    assert ticks(1, 3, 8, whole=True) == [1, 2, 3]


def test_powers_of_ten() -> None:
    assert powers(1e-4, 1) == pytest.approx([1e-4, 1e-3, 1e-2, 0.1, 1])
    assert len(powers(1e-30, 1)) <= 7


def test_long_curves_are_averaged_not_sampled() -> None:
    thinned = thin([float(i) for i in range(9_000)])
    assert len(thinned) == 300
    assert thinned[0] == 14.5  # the mean of 0..29
    assert thin([1.0, 2.0]) == [1.0, 2.0]


def test_counts_between_edges() -> None:
    assert histogram([0.0, 0.1, 0.1 * 3, 0.99, 1.0, 5.0], [i / 10 for i in range(11)]) == [1, 1, 0, 1, 0, 0, 0, 0, 0, 3]
