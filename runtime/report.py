"""A run folder in, `report.html` out: one offline page with curves, sample completions, and the
configuration.

Reads only config.yaml, environment.json, metrics.jsonl and rollouts/*.parquet, so a report can be made of any
run, at any time, on any machine. Whatever is missing or torn is left out and said so. Completions are hostile
text: the template escapes everything, control characters are spelled out, and the page forbids itself scripts
and requests. Leaves out interaction; the parquet files are there for that.
"""

import io
import itertools
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from runtime.errors import UserError
from runtime.files import write_durably
from runtime.metrics import read_metrics
from runtime.progress import visible

Metrics = list[dict[str, Any]]

BLUE, ORANGE, GREEN, PURPLE, RED, GREY = "#2563eb", "#ea580c", "#059669", "#7c3aed", "#dc2626", "#94a3b8"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED, "#0891b2", "#a16207", GREY)
PHASES = (("rollout", BLUE), ("reward", GREEN), ("update", ORANGE), ("sync", PURPLE))
MOST_POINTS = 400
"""Longer curves are averaged in buckets: more points than pixels only make the page heavy."""
SAMPLES = 6
LONGEST_TEXT = 6000
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: searchable, selectable, in the page's font
    "svg.hashsalt": "report",  # the same run gives the same bytes
    "text.parse_math": False,  # a reward named "$x$" is not a formula
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#c4ccd6",
    "axes.labelcolor": "#5c6876",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#eceff3",
    "xtick.color": "#5c6876",
    "ytick.color": "#5c6876",
    "xtick.major.size": 3.0,
    "ytick.major.size": 0.0,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


@dataclass(frozen=True)
class Curve:
    """One metric by step: only the steps that have it, at most MOST_POINTS."""

    steps: list[float]
    values: list[float]


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` into a run folder and return its path.

    Raises:
        UserError: the folder isn't there.
    """
    run = Path(run_dir)
    if not run.is_dir():
        raise UserError(f"run_dir={str(run)!r}: no such folder; give the folder of a run, such as runs/<name>")
    notes: list[str] = []
    metrics = _read_metrics(run / "metrics.jsonl", notes)
    samples = _read_samples(run / "rollouts", notes)
    environment = _environment(run / "environment.json", notes)
    page = _template().render(
        name=visible(run.resolve().name),
        subtitle=_subtitle(metrics),
        tiles=_tiles(metrics),
        notes=[*_health(metrics), *notes],
        plots=_plots(metrics),
        samples=samples,
        sample_rows=max((len(column["cells"]) for column in samples), default=0),
        config=_text(run / "config.yaml"),
        environment=environment,
    )
    path = run / "report.html"
    write_durably(path, page)
    return path


def _template() -> Any:
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html.jinja")


# Reading


def _read_metrics(path: Path, notes: list[str]) -> Metrics:
    if not path.is_file():
        return []
    by_step: dict[int, dict[str, Any]] = {}
    rows = [row for row in read_metrics(path) if isinstance(row.get("step"), int)]
    for row in rows:
        by_step.setdefault(row["step"], {}).update(row)  # a line for training and one for evaluation: one step
    if broken := len(path.read_bytes().splitlines()) - len(rows):
        notes.append(f"metrics.jsonl: {broken} unreadable line(s) were left out.")
    return [by_step[step] for step in sorted(by_step)]


def _read_samples(folder: Path, notes: list[str]) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted(folder.glob("*.parquet"))
    columns = []
    for path in dict.fromkeys([*files[:1], *files[-1:]]):
        try:
            table = pq.read_table(path)
            picked = sorted({i * table.num_rows // SAMPLES for i in range(SAMPLES)}) if table.num_rows else []
            rows = table.take(picked).to_pylist()
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            notes.append(f"rollouts/{path.name} can't be read: {visible(str(error))[:200]}")
            continue
        if rows:
            cells = [_cell(row) for row in rows]
            columns.append({"step": rows[0].get("step", "?"), "total": table.num_rows, "cells": cells})
    return columns


def _cell(row: dict[str, Any]) -> dict[str, Any]:
    text = _cut(str(row.get("completion_text") or ""))
    thinking, close, rest = text.partition("</think>")
    parts = [{"text": thinking + close, "thinking": True}, {"text": rest, "thinking": False}]
    if not close:
        parts = [{"text": text, "thinking": text.lstrip().startswith("<think>")}]
    reward = row.get("reward")
    tone = "" if reward is None or not math.isfinite(reward) else "good" if reward > 0 else "bad"
    chips = [{"text": f"reward {_number(reward)}", "tone": tone}]
    names = [k for k in row if k.startswith("rewards/")]
    chips += [{"text": f"{visible(k[8:], keep='')} {_number(row[k])}", "tone": ""} for k in names]
    if row.get("advantage") is not None:
        chips.append({"text": f"advantage {row['advantage']:+.2f}", "tone": ""})
    if row.get("completion_ids") is not None:
        chips.append({"text": f"{len(row['completion_ids'])} tokens", "tone": ""})
    if row.get("finish_reason") == "length":
        chips.append({"text": "cut at the limit", "tone": "bad"})
    return {"prompt": _cut(str(row.get("prompt_text") or "")), "parts": parts, "chips": chips}


def _cut(text: str) -> str:
    left = len(text) - LONGEST_TEXT
    return visible(text) if left <= 0 else f"{visible(text[:LONGEST_TEXT])}\n… {left:,} more characters"


def _text(path: Path) -> str:
    return visible(path.read_text(encoding="utf-8", errors="backslashreplace")) if path.is_file() else ""


def _environment(path: Path, notes: list[str]) -> list[tuple[str, str]]:
    try:
        found = json.loads(path.read_bytes()) if path.is_file() else {}
    except (ValueError, RecursionError):
        notes.append("environment.json is not readable JSON.")
        return []
    if not isinstance(found, dict):
        found = {"environment": found}
    shown = {k: v if isinstance(v, str) else json.dumps(v, indent=1, ensure_ascii=False) for k, v in found.items()}
    return [(visible(k), visible(v)) for k, v in shown.items()]


# In words


def _subtitle(metrics: Metrics) -> str:
    if not metrics:
        return "No steps recorded yet."
    seconds = sum(sum(_phase_seconds(row).values()) for row in metrics)
    spent = f", {_duration(seconds)} of timed work" if seconds else ""
    return f"Steps {metrics[0]['step']} to {metrics[-1]['step']}{spent}."


def _tiles(metrics: Metrics) -> list[dict[str, str]]:
    tiles = []

    def tile(key: str, label: str, form: Callable[[float], str], note: str = "first → last step") -> None:
        if values := _curve(metrics, key).values:
            change = form(values[0]) if len(values) == 1 else f"{form(values[0])} → {form(values[-1])}"
            tiles.append({"label": label, "value": change, "note": note})

    last = next((row for row in reversed(metrics) if _is_number(row.get("eval/accuracy_low"))), {})
    interval = ""
    if _is_number(last.get("eval/accuracy_high")):
        interval = f"95 %: {last['eval/accuracy_low']:.1%} to {last['eval/accuracy_high']:.1%}"
    tile("eval/accuracy", "Held-out accuracy", "{:.1%}".format, interval or "first → last evaluation")
    tile("reward", "Reward", "{:.3f}".format)
    tile("loss", "Loss", "{:.3f}".format)
    tile("completions/mean_length", "Tokens per completion", "{:.1f}".format)
    tile("completions/thinking_fraction", "Show their work", "{:.0%}".format)
    if gaps := _curve(metrics, "sampling/logp_gap/max").values:
        label, note = "Largest gap", "sampler to trainer, log-prob of a token"
        tiles.append({"label": label, "value": f"{max(gaps):.3g}", "note": note})
    return tiles


def _health(metrics: Metrics) -> list[str]:
    """Plain-language warnings about the last quarter of the run."""
    tail = metrics[-max(1, len(metrics) // 4) :]

    def recent(key: str) -> float:
        values = _curve(tail, key).values
        return math.fsum(values) / len(values) if values else math.nan

    said = []
    if (share := recent("frac_reward_zero_std")) > 0.6:
        said.append(
            f"{share:.0%} of the groups have equal rewards and teach nothing: "
            "use harder or easier prompts, or larger groups."
        )
    if (share := recent("completions/clipped_ratio")) > 0.2:
        said.append(f"{share:.0%} of the completions were cut at the length limit: raise it, or shape length.")
    if (gap := recent("sampling/logp_gap/mean")) > 0.05:
        said.append(f"Sampler and trainer disagree by {gap:.3f} per token on average: check dtype and sync.")
    if (share := recent("rewards/unknown")) > 0.05:
        said.append(f"{share:.0%} of the rewards were unknown: look at the gold answers and the grader's log.")
    entropy = _curve(metrics, "entropy").values
    if len(entropy) > 4 and entropy[-1] < 0.1 * entropy[0]:
        said.append(f"Entropy fell from {entropy[0]:.3g} to {entropy[-1]:.3g}: exploration has nearly ended.")
    return said


# Curves


def _curve(metrics: Metrics, key: str) -> Curve:
    points = [(float(row["step"]), float(row[key])) for row in metrics if _is_number(row.get(key))]
    return Curve(*(_thin([p[i] for p in points]) for i in (0, 1)))


def _thin(values: Sequence[float]) -> list[float]:
    n = min(len(values), MOST_POINTS)
    edges = [i * len(values) // n for i in range(n + 1)] if n else []
    return [math.fsum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]


def _plots(metrics: Metrics) -> list[dict[str, Any]]:
    """The figures this run has data for: title, caption, inline SVG."""
    import matplotlib
    from matplotlib.figure import Figure  # the figure alone, without pyplot's global state or a display
    from matplotlib.ticker import MaxNLocator

    plots: list[dict[str, Any]] = []

    def add(title: str, caption: str, draw: Callable[[Any], bool]) -> None:
        figure = Figure(figsize=(5.2, 2.5), layout="constrained")
        axes = figure.add_subplot()
        if not draw(axes):
            return
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        if len(axes.get_legend_handles_labels()[1]) > 1:
            axes.legend(loc="upper left", bbox_to_anchor=(0, 1.16), ncols=4, fontsize=8, handlelength=1.2)
        plots.append({"title": title, "caption": caption, "svg": _svg(figure, f"p{len(plots)}-", title)})

    def lines(*wanted: tuple[str, str, str], scale: Literal["", "share", "log"] = "") -> Callable[[Any], bool]:
        def draw(axes: Any) -> bool:
            found = [(label, colour, c) for key, label, colour in wanted if (c := _curve(metrics, key)).steps]
            for label, colour, curve in found:
                marker = "o" if len(curve.steps) == 1 else None
                axes.plot(curve.steps, curve.values, color=colour, label=label, marker=marker, markersize=4)
            if scale == "share":
                axes.set_ylim(-0.03, 1.03)
            if scale == "log" and any(v > 0 for _, _, c in found for v in c.values):
                axes.set_yscale("log", nonpositive="mask")  # a gap of exactly 0 has no place on it
                axes.yaxis.set_major_formatter("{x:g}")
            return bool(found)

        return draw

    with matplotlib.rc_context(STYLE):
        add(
            "Reward and held-out accuracy",
            "Band: 95 % interval over the held-out problems.",
            _draw_reward(metrics),
        )
        parts = sorted({k for row in metrics for k in row if k.startswith("rewards/") and k.endswith("/mean")})
        if len(parts) > 1:
            named = [(k, visible(k[8:-5], keep=""), COLOURS[i % len(COLOURS)]) for i, k in enumerate(parts)]
            add("Reward by part", "Mean of each reward function before its weight.", lines(*named))
        add("Loss", "", lines(("loss", "loss", BLUE)))
        length = lines(("completions/mean_length", "mean length", BLUE))
        add("Length", "Mean tokens per completion.", length)
        habit = lines(("completions/thinking_fraction", "non-empty thinking", GREEN), scale="share")
        add("Completions that show work", "Share with something between <think> and </think>.", habit)
        lost = lines(
            ("frac_reward_zero_std", "groups of equal reward", ORANGE),
            ("completions/clipped_ratio", "cut at the limit", PURPLE),
            ("rewards/unknown", "reward unknown", RED),
            scale="share",
        )
        add("Where signal is lost", "Groups of equal reward have zero variance and no gradient.", lost)
        gap = lines(("sampling/logp_gap/mean", "mean", BLUE), ("sampling/logp_gap/max", "max", GREY), scale="log")
        add("Sampler-trainer gap", "|log-prob difference| per sampled token, log scale.", gap)
        spread = lines(("entropy", "entropy", BLUE), ("kl", "KL to reference", ORANGE))
        add("Entropy", "Per token, in nats.", spread)
        add("Time by phase", "Seconds per step.", _draw_time(metrics))
    return plots


def _draw_reward(metrics: Metrics) -> Callable[[Any], bool]:
    def draw(axes: Any) -> bool:
        reward, held_out = _curve(metrics, "reward"), _curve(metrics, "eval/accuracy")
        if reward.steps:
            marker = "o" if len(reward.steps) == 1 else None
            axes.plot(reward.steps, reward.values, color=BLUE, label="reward", marker=marker, markersize=4)
        if held_out.steps:
            low, high = _curve(metrics, "eval/accuracy_low"), _curve(metrics, "eval/accuracy_high")
            if low.steps == high.steps == held_out.steps:
                axes.vlines(held_out.steps, low.values, high.values, color=ORANGE, alpha=0.4, linewidth=2.5)
                axes.fill_between(held_out.steps, low.values, high.values, color=ORANGE, alpha=0.12, linewidth=0)
            label = "held-out accuracy"
            axes.plot(held_out.steps, held_out.values, color=ORANGE, marker="o", markersize=4, label=label)
        values = reward.values + held_out.values
        if values and min(values) >= 0 and max(values) <= 1:
            axes.set_ylim(-0.03, 1.03)
        return bool(values)

    return draw


def _draw_time(metrics: Metrics) -> Callable[[Any], bool]:
    def draw(axes: Any) -> bool:
        timed = [(float(row["step"]), seconds) for row in metrics if (seconds := _phase_seconds(row))]
        names = [n for n, _ in PHASES if any(n in s for _, s in timed)]
        names += sorted({n for _, s in timed for n in s} - set(names))
        if not names:
            return False
        steps = _thin([step for step, _ in timed])
        width = 0.9 * (steps[-1] - steps[0]) / (len(steps) - 1) if len(steps) > 1 else 0.9
        base = [0.0] * len(steps)
        known = dict(PHASES)
        for i, name in enumerate(names):
            heights = _thin([seconds.get(name, 0.0) for _, seconds in timed])
            colour = known.get(name, COLOURS[(i + 4) % len(COLOURS)])
            axes.bar(steps, heights, width, bottom=base, color=colour, label=visible(name, keep=""), linewidth=0)
            base = [b + h for b, h in zip(base, heights, strict=True)]
        return True

    return draw


def _svg(figure: Any, prefix: str, label: str) -> Any:
    """The figure as an inline <svg>, its ids made unique in the page."""
    from markupsafe import Markup, escape

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)  # it would apply to the whole page
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", svg)
    # Safe: matplotlib escapes the labels it writes, and nothing else in it comes from the run.
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1))


def _phase_seconds(row: dict[str, Any]) -> dict[str, float]:
    timed = {k.removeprefix("time/"): v for k, v in row.items() if k.startswith("time/")}
    return {k: float(v) for k, v in timed.items() if _is_number(v)}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) and math.isfinite(value) else "unknown"


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours} h {minute} min" if hours else f"{minute} min {second} s" if minute else f"{second} s"
