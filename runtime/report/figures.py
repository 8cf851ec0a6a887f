"""Metrics of a run, or of several -> the figures they have data for; what no figure here asks for gets one of its own.

A figure is a title, a caption, inline SVG, a legend, and its numbers for the page's readout.
"""

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from markupsafe import Markup

from runtime.report.read import Metrics, Run, brief, is_number, points
from runtime.report.rollouts import Scan
from runtime.report.svg import Plot, Series, draw, thin, x_range

COLOURS = 8
PHASES = ("rollout", "reward", "update", "sync")
HOUSEKEEPING = {"step", "final", "epoch", "num_tokens", "step_time", "updates/skipped", "eval/problems"}
MOST_OTHERS = 18
"""Figures for metrics that no figure asks for."""
MOST_CURVES = 8
BINS = 21


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A metric in a figure."""

    key: str
    label: str
    low: str = ""
    """Metric that is its band's lower edge; `high` is the upper."""
    high: str = ""
    spread: str = ""
    """Metric that the band reaches to either side."""
    dots: bool = False


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A figure to make of metrics, if they are there."""

    id: str
    title: str
    caption: str
    curves: Sequence[Curve]
    scale: Literal["", "share", "log"] = ""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure of the page."""

    id: str
    title: str
    caption: str
    svg: Markup
    legend: Sequence[tuple[int, str]]
    """(colour, label)"""
    data: Mapping[str, Any]
    """What the plotting area spans, and its curves: label, steps, values."""


def specs(metrics: Metrics) -> list[Spec]:
    """The figures that are worth a place of their own, in the order in which to read them."""
    parts = _named(metrics, r"rewards/(.+)/mean")
    sources = _named(metrics, r"eval/(.+)/loss")
    distilled = any("accepted" in row for row in metrics)
    return [
        Spec(
            id="reward",
            title="Reward and held-out accuracy",
            caption="Bands: the mean spread within a group, and the 95 % interval over held-out problems.",
            curves=[
                Curve(key="reward", label="reward", spread="reward_std"),
                Curve(key="eval/accuracy", label="held-out accuracy", low="_low", high="_high", dots=True),
            ],
        ),
        Spec(
            id="parts",
            title="Right answers by expert" if distilled else "Reward by part",
            caption="Of those that could be graded, in each batch."
            if distilled
            else "Mean of each reward function before its weight; bands: one standard deviation.",
            curves=[
                Curve(key=f"rewards/{name}/mean", label=brief(name, 60), spread=f"rewards/{name}/std") for name in parts
            ],
        ),
        Spec(
            id="signal",
            title="Where signal is lost",
            caption="Groups whose rewards are all equal have no advantage and no gradient.",
            curves=[
                Curve(key="frac_reward_zero_std", label="all-equal groups"),
                Curve(key="completions/clipped_ratio", label="truncated completions"),
                Curve(key="rewards/unknown", label="unknown rewards"),
            ],
            scale="share",
        ),
        Spec(
            id="length",
            title="Length",
            caption="Tokens per completion; band: shortest to longest. Truncated ones have the limit's length.",
            curves=[
                Curve(
                    key="completions/mean_length",
                    label="all",
                    low="completions/min_length",
                    high="completions/max_length",
                ),
                Curve(key="completions/mean_terminated_length", label="finished"),
            ],
        ),
        Spec(
            id="thinking",
            title="Completions that show work",
            caption="Share with something between <think> and </think>, and of held-out ones in the right layout.",
            curves=[
                Curve(key="completions/thinking_fraction", label="thinking"),
                Curve(key="eval/format", label="held-out: right layout", dots=True),
            ],
            scale="share",
        ),
        Spec(
            id="loss",
            title="Loss",
            caption="Of the training step.",
            curves=[Curve(key="loss", label="loss"), Curve(key="mtp_loss", label="multi-token prediction")],
        ),
        Spec(
            id="held-out",
            title="Held-out loss",
            caption="Mean over the trained tokens of each source, nats.",
            curves=[
                Curve(key="eval/loss", label="all sources", dots=True),
                *(Curve(key=f"eval/{name}/loss", label=brief(name, 60), dots=True) for name in sources),
            ],
        ),
        Spec(
            id="pairs",
            title="Pairs put right",
            caption="Share of the step's pairs whose better response scores higher.",
            curves=[Curve(key="accuracy", label="accuracy")],
            scale="share",
        ),
        Spec(
            id="scores",
            title="Scores",
            caption="Of the step's responses; margin: the better one's less the other's.",
            curves=[
                Curve(key="mean_reward", label="mean", low="min_reward", high="max_reward"),
                Curve(key="margin", label="margin"),
            ],
        ),
        Spec(id="entropy", title="Entropy", caption="Nats per token.", curves=[Curve(key="entropy", label="entropy")]),
        Spec(
            id="kl",
            title="KL to the reference",
            caption="The penalty's estimate, nats per token.",
            curves=[Curve(key="kl", label="KL")],
        ),
        Spec(
            id="clip",
            title="Clip fraction",
            caption="Share of trained tokens whose ratio the clip holds back. 0 with one update a rollout.",
            curves=[Curve(key="clip_ratio/region_mean", label="clipped")],
        ),
        Spec(
            id="gap",
            title="Sampler–trainer gap",
            caption="|log π_trainer − log π_sampler| per sampled token, and the canary after a sync; log scale.",
            curves=[
                Curve(key="sampling/logp_gap/mean", label="mean"),
                Curve(key="sampling/logp_gap/max", label="max"),
                Curve(key="weights/canary_max", label="canary, max"),
            ],
            scale="log",
        ),
        Spec(
            id="version",
            title="Weights version",
            caption="Of the sampler after each step; on policy it is the step.",
            curves=[Curve(key="weights/version", label="version")],
        ),
        Spec(
            id="gradient",
            title="Gradient norm",
            caption="Before clipping.",
            curves=[Curve(key="grad_norm", label="norm")],
        ),
        Spec(id="rate", title="Learning rate", caption="", curves=[Curve(key="learning_rate", label="rate")]),
        Spec(
            id="speed",
            title="Tokens per second",
            caption="",
            curves=[Curve(key="tokens_per_second", label="tokens/s")],
        ),
        Spec(
            id="fill",
            title="Packing fill",
            caption="Tokens of a step over the places in its rows.",
            curves=[Curve(key="derived/fill", label="fill")],
            scale="share",
        ),
        Spec(
            id="kept",
            title="Answers kept",
            caption="Of each batch: chosen, and impossible to judge.",
            curves=[Curve(key="accepted", label="kept"), Curve(key="unknown", label="unknown")],
            scale="share",
        ),
    ]


def derive(run: Run) -> None:
    """Add to the metrics what follows from them and the configuration."""
    places = run.setting("rows_per_step", 0) * run.setting("row_length", 0)
    if run.kind == "sft" and places:
        for row in run.metrics:
            if is_number(row.get("num_tokens")):
                row["derived/fill"] = row["num_tokens"] / places


def figures(run: Run, scans: Sequence[Scan]) -> list[Figure]:
    """What there is to draw of a run."""
    drawn = []
    for spec in specs(run.metrics):
        series = [one for i, curve in enumerate(spec.curves) for one in _series(run.metrics, curve, i % COLOURS + 1)]
        if series:
            drawn.append(_figure(spec, series[:MOST_CURVES], dropped=len(series) - MOST_CURVES))
        if spec.id == "signal":
            drawn += _advantages(scans)
    return [*drawn, *_times(run.metrics)]


def others(run: Run) -> list[Figure]:
    """Every other number that was recorded, those of one family together."""
    shown = {curve.key for spec in specs(run.metrics) for curve in spec.curves} | HOUSEKEEPING
    for spec in specs(run.metrics):
        for curve in spec.curves:
            shown |= {curve.spread, *_edges(curve)}
    keys = dict.fromkeys(key for row in run.metrics for key in row if is_number(row[key]))
    left = [key for key in keys if key not in shown and not key.startswith(("time/", "data/"))]
    families = itertools.groupby(sorted(left, key=_family), key=_family)
    drawn = []
    for i, (family, members) in enumerate(families):
        if i == MOST_OTHERS:
            break
        curves = [Curve(key=key, label=brief(key.removeprefix(family + "/"), 60)) for key in members]
        spec = Spec(id=f"other-{i}", title=brief(family, 80), caption="", curves=curves)
        series = [one for n, curve in enumerate(curves) for one in _series(run.metrics, curve, n % COLOURS + 1)]
        drawn.append(_figure(spec, series[:MOST_CURVES], dropped=len(series) - MOST_CURVES))
    return drawn


def compared(runs: Sequence[Run]) -> list[Figure]:
    """Each metric that two runs have, or that the first has alone, with a curve for every run."""
    drawn: list[Figure] = []
    every = {
        (spec.id, curve.key): (spec, curve) for run in runs for spec in specs(run.metrics) for curve in spec.curves
    }
    order = {spec.id: i for i, spec in enumerate(specs([]))}
    for (_, key), (spec, curve) in sorted(every.items(), key=lambda item: order[item[0][0]]):
        series = [
            replace(one, label=run.name)
            for i, run in enumerate(runs)
            for one in _series(run.metrics, curve, i % COLOURS + 1)
        ]
        if series:
            title = spec.title if len(spec.curves) == 1 else f"{spec.title}: {curve.label}"
            named = replace(spec, id=f"{spec.id}-{len(drawn)}", title=title, caption=brief(key, 100))
            drawn.append(_figure(named, series, named=True))
    return drawn


def _named(metrics: Metrics, pattern: str) -> list[str]:
    """What stands in the place of the parenthesis, of the keys that fit."""
    keys = dict.fromkeys(key for row in metrics for key in row)
    return sorted(found[1] for key in keys if (found := re.fullmatch(pattern, key, re.DOTALL)))


def _family(key: str) -> str:
    return key.rpartition("/")[0] or key


def _edges(curve: Curve) -> tuple[str, str]:
    """The metrics of a band's edges; "_low" is short for the curve's own key and it."""
    low, high = curve.low, curve.high
    return (curve.key + low if low.startswith("_") else low), (curve.key + high if high.startswith("_") else high)


def _series(metrics: Metrics, curve: Curve, colour: int) -> list[Series]:
    at = points(metrics, curve.key)
    if not at:
        return []
    steps, numbers = [float(step) for step, _ in at], [value for _, value in at]
    low: list[float] = []
    high: list[float] = []
    if curve.spread and len(spread := points(metrics, curve.spread)) == len(at):
        low = [v - s for v, (_, s) in zip(numbers, spread, strict=True)]
        high = [v + s for v, (_, s) in zip(numbers, spread, strict=True)]
    if curve.low:
        edges = [points(metrics, key) for key in _edges(curve)]
        if all([step for step, _ in edge] == [step for step, _ in at] for edge in edges):
            low, high = ([value for _, value in edge] for edge in edges)
    dots = curve.dots and len(at) <= 40
    steps, numbers, low, high = (thin(part) for part in (steps, numbers, low, high))
    return [Series(label=curve.label, colour=colour, steps=steps, values=numbers, low=low, high=high, dots=dots)]


def _figure(spec: Spec, series: Sequence[Series], *, dropped: int = 0, named: bool = False) -> Figure:
    scale = spec.scale
    if scale == "log" and not any(v > 0 for one in series for v in one.values):
        scale = ""
    if spec.id in ("reward", "parts") and all(0 <= v <= 1 for one in series for v in one.values):
        scale = "share"
    plot = Plot(series=series, scale=scale)
    caption = f"{spec.caption} {dropped} more are not drawn." if dropped > 0 else spec.caption
    return _made(spec.id, spec.title, caption, plot, legend=named or len(series) > 1)


def _made(name: str, title: str, caption: str, plot: Plot, *, legend: bool = True) -> Figure:
    numbers = [
        {"label": one.label, "steps": [_short(s) for s in one.steps], "values": [_short(v) for v in one.values]}
        for one in plot.series
    ]
    low, high = x_range(plot)
    entries = [(one.colour, one.label) for one in plot.series] if legend else []
    return Figure(
        id=name,
        title=title,
        caption=caption,
        svg=draw(plot, title),
        legend=entries,
        data={"low": low, "high": high, "series": numbers} if numbers else {},
    )


def _short(value: float) -> float:
    return float(f"{value:.4g}") if abs(value) < 1e4 else round(value)


def _times(metrics: Metrics) -> Iterator[Figure]:
    timed = [(float(row["step"]), seconds) for row in metrics if (seconds := phase_seconds(row))]
    found = {name for _, seconds in timed for name in seconds}
    names = [*(name for name in PHASES if name in found), *sorted(found - {*PHASES, "other"})][: COLOURS - 1]
    if not names:
        return
    names += ["other"] * ("other" in found)
    steps = thin([step for step, _ in timed], 120)
    series = [
        Series(
            label=brief(name, 60),
            colour=i % COLOURS + 1,
            steps=steps,
            values=thin([seconds.get(name, 0.0) for _, seconds in timed], 120),
        )
        for i, name in enumerate(names)
    ]
    yield _made("time", "Time by phase", "Seconds per step, stacked.", Plot(series=series, stacked=True))


def phase_seconds(row: Mapping[str, Any]) -> dict[str, float]:
    """Phase -> seconds of a step; "other" is what its phases leave of it."""
    timed = {str(k)[5:]: max(float(v), 0.0) for k, v in row.items() if str(k).startswith("time/") and is_number(v)}
    if timed and is_number(row.get("step_time")) and (rest := row["step_time"] - math.fsum(timed.values())) > 0:
        timed["other"] = timed.get("other", 0.0) + rest
    return timed


def _advantages(scans: Sequence[Scan]) -> Iterator[Figure]:
    """A histogram for each step, side by side."""
    seen = [(scan.step, scan.advantages) for scan in scans if scan.advantages]
    if not seen:
        return
    reach = max(max(map(abs, numbers)) for _, numbers in seen) or 1.0
    edges = [reach * (2 * i / BINS - 1) for i in range(BINS + 1)]
    steps = [float(step) for step, _ in seen]
    borders = [(a + b) / 2 for a, b in itertools.pairwise(steps)]
    first, last = (borders[0] - steps[0], steps[-1] - borders[-1]) if borders else (0.5, 0.5)
    borders = [steps[0] - first, *borders, steps[-1] + last]
    cells = []
    for (_, numbers), left, right in zip(seen, borders, borders[1:], strict=False):
        counts = histogram(numbers, edges)
        cells += [
            (left, right, low, high, count / max(counts))
            for count, low, high in zip(counts, edges, edges[1:], strict=False)
            if count
        ]
    caption = "A column for each step read: the fuller a bin, the darker, as a share of the column's fullest."
    yield _made("advantages", "Advantages", caption, Plot(cells=cells), legend=False)


def pass_rates(rates: Sequence[float]) -> Iterator[Figure]:
    """How many problems have which pass rate."""
    if rates:
        edges = [i / 10 - 0.05 for i in range(12)]
        bars = list(zip(edges, edges[1:], histogram(rates, edges), strict=False))
        caption = "Problems by the share of their sampled answers that are right."
        yield _made("pass-rates", "Pass rates", caption, Plot(bars=bars), legend=False)


def histogram(numbers: Iterable[float], edges: Sequence[float]) -> list[int]:
    """How many lie between neighbouring edges, which are as far apart as each other; the last includes its end."""
    counts = [0] * (len(edges) - 1)
    for value in numbers:
        place = (value - edges[0]) / (edges[-1] - edges[0]) * len(counts)
        counts[min(max(math.floor(place + 1e-9), 0), len(counts) - 1)] += 1
    return counts
