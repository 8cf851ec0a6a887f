"""Steps and metrics in; on a terminal a live panel, elsewhere one plain line per step, out.

The panel shows a bar with elapsed and remaining time, the phase the step is in, a small table and sparklines.
A pipe, a log file, CI or a notebook gets no control codes. At the end, `terminal_plot` draws series as small
charts. Titles, lines and metric names may hold model or user text: all of it passes `visible` and is never
parsed as markup. Leaves out recording: metrics.jsonl is written elsewhere.
"""

import itertools
import math
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

# What is shown of a step's metrics, in this order: (key, label, format). `rewards/<name>/mean` follow the
# reward.
SHOWN: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("loss", "loss", "{:.4f}".format),
    ("mean_token_accuracy", "token accuracy", "{:.3f}".format),
    ("reward", "reward", "{:.3f}".format),
    ("rewards/*/mean", "", "{:.3f}".format),
    ("eval/accuracy", "held-out", "{:.3f}".format),
    ("completions/mean_length", "length", "{:.1f}".format),
    ("completions/thinking_fraction", "thinking", "{:.2f}".format),
    ("frac_reward_zero_std", "equal groups", "{:.2f}".format),
    ("sampling/logp_gap/mean", "gap", "{:.4f}".format),
    ("entropy", "entropy", "{:.3f}".format),
    ("kl", "kl", "{:.4f}".format),
    ("tokens_per_second", "tokens/s", "{:,.0f}".format),
)
SPARKLINES = (("loss", "loss"), ("reward", "reward"), ("completions/mean_length", "length"))
BLOCKS = "▁▂▃▄▅▆▇█"
T = TypeVar("T")


def visible(text: str, *, keep: str = "\n") -> str:
    """Return `text` with every character that could act on a terminal or hide in a page spelled out.

    Control, bidirectional, zero-width and other format characters and lone surrogates become their Python
    escapes (`\\x1b`, `\\u202e`): unlike control pictures, every font has those. Characters in `keep` stay.
    """
    if text.isprintable():  # nearly always, and far faster than looking at every character
        return text
    hidden = ("Cc", "Cf", "Cs", "Zl", "Zp")
    return "".join(
        c.encode("unicode_escape").decode() if c not in keep and unicodedata.category(c) in hidden else c for c in text
    )


@dataclass
class Phase:
    """A timed part of a step."""

    name: str
    seconds: float = 0.0
    """Wall-clock seconds; set when the phase ends, also by an error."""


@contextmanager
def track_steps(
    total: int, title: str, *, start: int = 0, unit: str = "step", console: Console | None = None
) -> "Iterator[StepTracker]":
    """Show the progress of a run of `total` steps, or of what `unit` names, `start` of them done (a resumed run).

    Yields a StepTracker: `.update(step, metrics)` after each step, `.phase(name)` around its parts,
    `.log(line)`.
    """
    console = console or Console()
    tracker = StepTracker(total, title, start=start, unit=unit, console=console)
    if not tracker.live_view:
        tracker.log(f"{title}: {total} {unit}s" + (f", from {unit} {start + 1}" if start else ""))
        yield tracker
        return
    with Live(get_renderable=tracker.render, console=console, refresh_per_second=4):
        yield tracker


class StepTracker:
    """What `track_steps` yields."""

    def __init__(self, total: int, title: str, *, start: int = 0, unit: str = "step", console: Console) -> None:
        self.total, self.title, self.unit, self.console = total, visible(title, keep=""), unit, console
        self.start = self.step = start
        # A forced colour setting makes rich call a pipe a terminal: ask the file itself.
        isatty = getattr(console.file, "isatty", lambda: False)()
        encodes_blocks = console.encoding.lower().startswith("utf")
        self.live_view: bool = isatty and console.is_interactive and not console.is_jupyter and encodes_blocks
        self._began = self._last = time.monotonic()
        self._phase: str | None = None
        self._metrics: dict[str, float] = {}
        self._series: dict[str, list[float]] = {key: [] for key, _ in SPARKLINES}
        self._spinner = Spinner("dots")

    def update(self, step: int, metrics: Mapping[str, object]) -> None:
        """Show that `step` (counted from 1) is done, with its metrics; values that aren't numbers are passed
        over."""
        now = time.monotonic()
        numbers = {k: float(v) for k, v in metrics.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        for key, series in self._series.items():
            if math.isfinite(numbers.get(key, math.nan)):
                series.append(numbers[key])
        # Held-out accuracy comes every so many steps; the panel keeps the last one.
        kept = {k: v for k, v in self._metrics.items() if k.startswith("eval/")}
        self._metrics = kept | numbers
        self.step = step
        if not self.live_view:
            shown = "  ".join(f"{label} {value}" for label, value in _shown(numbers))
            eta = f"  eta {_clock(self._remaining(now))}" if step < self.total else ""
            self._plain(f"{self.unit} {step}/{self.total}  {shown}  {now - self._last:.1f}s{eta}")
        self._last = now

    @contextmanager
    def phase(self, name: str) -> Iterator[Phase]:
        """Show that the step is now `name` ("sampling", "scoring", ...) and time it: `.seconds` of what is
        yielded."""
        before, self._phase = self._phase, visible(name, keep="")
        phase, began = Phase(name), time.perf_counter()
        try:
            yield phase
        finally:
            phase.seconds = time.perf_counter() - began
            self._phase = before

    def log(self, line: str) -> None:
        """Print a line above the panel."""
        if self.live_view:
            self.console.print(Text(visible(line)))
        else:
            self._plain(visible(line))

    def render(self) -> Panel:
        """Return the panel as of now."""
        now = time.monotonic()
        head = Table.grid(expand=True, padding=(0, 1))
        head.add_column(ratio=1)
        head.add_column(justify="right")
        times = f"{self.step}/{self.total}  {_clock(now - self._began)} < {_clock(self._remaining(now))}"
        head.add_row(ProgressBar(self.total, self.step), Text(times))
        numbers = Table.grid(padding=(0, 2))
        cells = [(Text(visible(k, keep=""), style="dim"), Text(v, style="bold")) for k, v in _shown(self._metrics)]
        for row in _rows_of(cells, 3):
            numbers.add_row(*(cell for pair in row for cell in pair))
        lines = Table.grid(padding=(0, 2))
        for key, label in SPARKLINES:
            if len(series := self._series[key]) > 1:
                ends = Text(f"{series[0]:.3g} → {series[-1]:.3g}", style="dim")
                lines.add_row(Text(label, style="dim"), Text(sparkline(series, width=40), style="cyan"), ends)
        parts: list[RenderableType] = [head]
        if self._phase:
            self._spinner.update(text=Text(self._phase))
            parts.append(self._spinner)
        parts += [table for table in (numbers, lines) if table.row_count]
        return Panel(Group(*parts), title=Text(self.title, style="bold"), title_align="left", border_style="dim")

    def _remaining(self, now: float) -> float:
        done = self.step - self.start
        return (now - self._began) / done * max(0, self.total - self.step) if done > 0 else math.nan

    def _plain(self, line: str) -> None:
        encoding = self.console.encoding or "ascii"
        line = line.encode(encoding, "backslashreplace").decode(encoding)
        print(line, file=self.console.file, flush=True)


def sparkline(values: Sequence[float], *, width: int = 40) -> str:
    """Return `values` as one line of block characters, at most `width`: a longer series is averaged in
    buckets."""
    values = [v for v in values if math.isfinite(v)]
    n = min(width, len(values))
    edges = [round(i * len(values) / n) for i in range(n + 1)] if n else []
    means = [math.fsum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    top = len(BLOCKS) - 1
    return "".join(BLOCKS[round((v - low) / (high - low) * top) if high > low else top // 2] for v in means)


def terminal_plot(
    series: Mapping[str, Sequence[float | None]],
    *,
    steps: Sequence[int] | None = None,
    width: int = 80,
    height: int = 12,
) -> str:
    """Return small charts of `series` by step, two to a row, as plain text `width` columns wide.

    Value i of a series stands at `steps[i]`, or at i + 1. Missing and non-finite values leave a gap in the
    line's points; a series without values is left out.
    """
    import plotext

    charts = []
    for name, values in series.items():
        at = steps if steps is not None else range(1, len(values) + 1)
        points = [(x, y) for x, y in zip(at, values, strict=True) if y is not None and math.isfinite(y)]
        if points:
            charts.append((visible(name, keep=""), points))
    rows = []
    for row in _rows_of(charts, 2):
        drawn = []
        for name, points in row:
            plotext.clear_figure()  # plotext draws on one global figure
            plotext.limit_size(False, False)  # or a pipe's imaginary terminal would clip it
            plotext.theme("clear")
            plotext.plot_size(width // len(row), height)
            plotext.title(name)
            xs = [x for x, _ in points]
            ticks = sorted({xs[round(i * (len(xs) - 1) / 3)] for i in range(4)})  # whole steps
            plotext.xticks(ticks, [str(x) for x in ticks])
            plotext.yfrequency(4)
            plotext.plot(xs, [y for _, y in points], marker="braille")
            drawn.append(plotext.uncolorize(plotext.build()).splitlines())
            plotext.clear_figure()
        rows.append("\n".join("".join(parts).rstrip() for parts in zip(*drawn, strict=True)))
    return "\n".join(rows)


def _shown(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    shown = []
    for key, label, form in SHOWN:
        if key == "rewards/*/mean":
            parts = [k for k in metrics if k.startswith("rewards/") and k.endswith("/mean")]
            shown += [
                (visible(k.removeprefix("rewards/").removesuffix("/mean"), keep=""), form(metrics[k])) for k in parts
            ]
        elif key in metrics:
            shown.append((label, form(metrics[key])))
    return shown


def _rows_of(items: Sequence[T], n: int) -> list[Sequence[T]]:
    return [items[i : i + n] for i in range(0, len(items), n)]


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "-:--"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
