"""Series of numbers -> a plot as inline SVG, in the page's own colours, so that it follows a dark theme.

Coordinates are those of a WIDTH × HEIGHT box. No text of a run gets into it: legends are the page's.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from markupsafe import Markup, escape

Scale = Callable[[float], float]
"""A number -> its place."""

WIDTH, HEIGHT = 520, 210
LEFT, RIGHT, TOP, BOTTOM = 54, 512, 8, 184
"""The plotting area."""
MOST_POINTS = 300
"""Longer curves are averaged in buckets: more points than pixels only make the page heavy."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """A curve; with `low` and `high`, a band about it."""

    label: str
    colour: int
    """1 to 8, of the page's."""
    steps: Sequence[float]
    values: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    dots: bool = False
    """Few points, marked each."""


@dataclass(frozen=True, kw_only=True)
class Plot:
    """What to draw, and on what scale."""

    series: Sequence[Series] = ()
    scale: Literal["", "share", "log"] = ""
    stacked: bool = False
    """Bars on each other instead of lines; all series have the same steps."""
    cells: Sequence[tuple[float, float, float, float, float]] = field(default_factory=tuple)
    """A heat map instead: left, right, low, high, share of its column."""
    bars: Sequence[tuple[float, float, float]] = field(default_factory=tuple)
    """A histogram instead: left, right, count."""


def thin(numbers: Sequence[float], most: int = MOST_POINTS) -> list[float]:
    """At most so many: means of neighbours."""
    n = min(len(numbers), most)
    edges = [i * len(numbers) // n for i in range(n + 1)] if n else []
    return [math.fsum(numbers[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]


def ticks(low: float, high: float, most: int = 5, *, whole: bool = False) -> list[float]:
    """Round numbers in a range, at most about `most`: multiples of 1, 2 or 5 times a power of ten."""
    if high <= low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    if whole:
        step = max(step, 1.0)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def powers(low: float, high: float, most: int = 6) -> list[float]:
    """Powers of ten in a range of positive numbers."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, math.ceil((last - first) / most))
    return [10.0**i for i in range(first, last + 1, every)]


def draw(plot: Plot, title: str) -> Markup:
    """The plot as an <svg> element with `title` as its label."""
    x_low, x_high = x_range(plot)
    y_low, y_high = _y_range(plot)
    log = plot.scale == "log"

    def x(step: float) -> float:
        return round(LEFT + (step - x_low) / (x_high - x_low) * (RIGHT - LEFT), 1)

    def y(value: float) -> float:
        low, high, at = (math.log10(v) for v in (y_low, y_high, value)) if log else (y_low, y_high, value)
        return round(BOTTOM - (at - low) / (high - low) * (BOTTOM - TOP), 1)

    parts = []
    for tick in powers(y_low, y_high) if log else ticks(y_low, y_high):
        parts.append(f'<path class="grid" d="M{LEFT} {y(tick)}H{RIGHT}"/>')
        parts.append(f'<text class="y" x="{LEFT - 6}" y="{y(tick) + 3.5:.1f}">{_label(tick)}</text>')
    for tick in ticks(x_low, x_high, 8, whole=not plot.bars):
        parts.append(f'<path class="tick" d="M{x(tick)} {BOTTOM}v4"/>')
        parts.append(f'<text class="x" x="{x(tick)}" y="{BOTTOM + 16}">{_label(tick)}</text>')
    for left, right, low, high, share in plot.cells:
        box = f'x="{x(left)}" y="{y(high)}" width="{x(right) - x(left):.1f}" height="{y(low) - y(high):.1f}"'
        parts.append(f'<rect class="fill c1" {box} fill-opacity="{0.12 + 0.88 * share:.2f}"/>')
    for left, right, count in plot.bars:
        box = f'x="{x(left) + 0.5}" y="{y(count)}" width="{x(right) - x(left) - 1:.1f}"'
        parts.append(f'<rect class="fill c1" {box} height="{y(0) - y(count):.1f}"/>')
    if plot.stacked:
        parts += _stack(plot.series, x, y)
    else:
        parts += [band for series in plot.series for band in _band(series, x, y, y_low, y_high)]
        parts += [line for series in plot.series for line in _line(series, x, y, y_low, y_high, log)]
    parts.append(f'<path class="axis" d="M{LEFT} {BOTTOM}H{RIGHT}"/>')
    body = "".join(parts)
    # Safe: numbers of ours alone, and a title that is escaped.
    return Markup(f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{body}</svg>')


def x_range(plot: Plot) -> tuple[float, float]:
    """What the plotting area spans."""
    ends = [v for series in plot.series for v in (series.steps[0], series.steps[-1])]
    ends += [v for cell in plot.cells for v in cell[:2]] + [v for bar in plot.bars for v in bar[:2]]
    low, high = min(ends), max(ends)
    if plot.stacked:
        half = _bar_width(plot.series[0].steps) / 2
        return low - half, high + half
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _y_range(plot: Plot) -> tuple[float, float]:
    if plot.cells:
        return min(cell[2] for cell in plot.cells), max(cell[3] for cell in plot.cells)
    if plot.bars:
        return 0.0, max(bar[2] for bar in plot.bars) * 1.05 or 1.0
    if plot.scale == "share":
        return -0.02, 1.02
    if plot.stacked:
        return 0.0, max(map(math.fsum, zip(*(s.values for s in plot.series), strict=True))) * 1.05 or 1.0
    seen = [v for series in plot.series for v in (*series.values, *series.low, *series.high)]
    if plot.scale == "log":
        positive = [v for v in seen if v > 0] or [1.0]  # a gap of exactly 0 has no place on it
        low, high = 10.0 ** math.floor(math.log10(min(positive))), 10.0 ** math.ceil(math.log10(max(positive)))
        return (low, high) if high > low else (low / 10, high * 10)
    low, high = min(seen), max(seen)
    room = 0.06 * (high - low) or 0.5 * abs(high) or 1.0
    return (0.0 if 0 <= low <= 2 * room else low - room), high + room


def _bar_width(steps: Sequence[float]) -> float:
    return (steps[-1] - steps[0]) / (len(steps) - 1) if len(steps) > 1 else 1.0


def _stack(series: Sequence[Series], x: Scale, y: Scale) -> list[str]:
    base = [0.0] * len(series[0].values)
    half = 0.45 * _bar_width(series[0].steps)
    parts = []
    for one in series:
        tops = [b + v for b, v in zip(base, one.values, strict=True)]
        boxes = "".join(
            f"M{x(s - half)} {y(low)}V{y(high)}H{x(s + half)}V{y(low)}Z"
            for s, low, high in zip(one.steps, base, tops, strict=True)
            if high > low
        )
        parts.append(f'<path class="fill c{one.colour}" d="{boxes}"/>')
        base = tops
    return parts


def _band(series: Series, x: Scale, y: Scale, y_low: float, y_high: float) -> list[str]:
    if not series.low:
        return []
    inside = [
        (x(s), y(max(low, y_low)), y(min(high, y_high)))
        for s, low, high in zip(series.steps, series.low, series.high, strict=True)
    ]
    if len(inside) == 1:
        return [f'<path class="whisker c{series.colour}" d="M{inside[0][0]} {inside[0][1]}V{inside[0][2]}"/>']
    there = " ".join(f"{a} {high}" for a, _, high in inside)
    back = " ".join(f"{a} {low}" for a, low, _ in reversed(inside))
    return [f'<path class="band c{series.colour}" d="M{there} {back}Z"/>']


def _line(series: Series, x: Scale, y: Scale, y_low: float, y_high: float, log: bool) -> list[str]:
    shown = [(s, v) for s, v in zip(series.steps, series.values, strict=True) if v > 0 or not log]
    at = [(x(s), y(min(max(v, y_low), y_high))) for s, v in shown]
    parts = []
    if len(at) > 1:
        parts.append(f'<polyline class="line c{series.colour}" points="{" ".join(f"{a},{b}" for a, b in at)}"/>')
    if series.dots or len(at) == 1:
        parts += [f'<circle class="fill c{series.colour}" cx="{a}" cy="{b}" r="3"/>' for a, b in at]
    return parts


def _label(value: float) -> str:
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:g}" if abs(value) < 1e4 else f"{value:,.0f}"
