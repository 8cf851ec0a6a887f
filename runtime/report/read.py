"""A run folder -> its metrics, configuration and environment, with a note about whatever can't be read."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from runtime.errors import UserError
from runtime.metrics import read_metrics
from runtime.progress import visible

Metrics = list[dict[str, Any]]
"""A row a step, in order; the lines of a step are put together."""

KINDS = {"grpo": "group_size", "sft": "mix", "distill": "experts", "reward_model": "plain_share"}
"""Kind of run -> a setting that only its configuration has."""
LONGEST_FILE = 1_000_000
"""Bytes of a configuration or a JSON file that are looked at."""
LONGEST_VALUE = 400
"""Characters of a setting's value, or of a name, that are shown."""
DEEPEST = 8


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run folder says of its run."""

    path: Path
    name: str
    """Of the folder, fit to be shown."""
    metrics: Metrics = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    """Dotted name -> plain value."""
    config_text: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """What could not be read, in words."""

    @property
    def kind(self) -> str:
        """One of KINDS, or "" where the configuration doesn't say."""
        groups = {name.partition(".")[0] for name in self.config}
        return next((kind for kind, setting in KINDS.items() if setting in groups), "")

    @property
    def unit(self) -> str:
        """What its steps count."""
        return "problem" if self.kind == "distill" else "step"

    def setting(self, name: str, default: float) -> float:
        """A number of the configuration."""
        value = self.config.get(name)
        return float(value) if is_number(value) else default


def read_run(run_dir: str | Path) -> Run:
    """Read a run. Raises UserError if the folder isn't there."""
    path = Path(run_dir)
    if not path.is_dir():
        raise UserError(f"run_dir={str(path)!r}: no such folder; give the folder of a run, such as runs/<name>")
    notes: list[str] = []
    text, config = _config(path / "config.yaml", notes)
    return Run(
        path=path,
        name=brief(path.resolve().name),
        metrics=_metrics(path / "metrics.jsonl", notes),
        config=config,
        config_text=text,
        environment=read_json(path / "environment.json", notes),
        notes=notes,
    )


def is_run(path: Path) -> bool:
    """Whether a folder holds anything of a run."""
    return any((path / name).exists() for name in ("config.yaml", "metrics.jsonl"))


def _metrics(path: Path, notes: list[str]) -> Metrics:
    if not path.is_file():
        return []
    by_step: dict[int, dict[str, Any]] = {}
    rows = [row for row in read_metrics(path) if isinstance(row.get("step"), int)]
    for row in rows:
        by_step.setdefault(row["step"], {}).update(row)  # a line for training and one for evaluation: one step
    if broken := len(path.read_bytes().splitlines()) - len(rows):
        notes.append(f"metrics.jsonl: {broken} unreadable line(s) were left out.")
    return [by_step[step] for step in sorted(by_step)]


def _config(path: Path, notes: list[str]) -> tuple[str, dict[str, Any]]:
    if not path.is_file():
        return "", {}
    with path.open("rb") as file:
        text = file.read(LONGEST_FILE).decode(errors="backslashreplace")
    try:
        tree = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        notes.append("config.yaml is not readable YAML: no settings are compared.")
        return text, {}
    return text, flat(tree) if isinstance(tree, dict) else {}


def flat(tree: Mapping[Any, Any], prefix: str = "", depth: int = 0) -> dict[str, Any]:
    """{"optim": {"lr": 1}} as {"optim.lr": 1}, to a depth that a tree in itself can't exceed."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value and depth < DEEPEST:
            found |= flat(value, f"{prefix}{key}.", depth + 1)
        else:
            found[f"{prefix}{key}"] = value
    return found


def read_json(path: Path, notes: list[str]) -> dict[str, Any]:
    """An object, {} where there is no file or no object in it."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes()[:LONGEST_FILE])
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        notes.append(f"{path.name} is not readable JSON.")
        return {}
    return found


# Metrics


def is_number(value: object) -> TypeGuard[float]:
    """An integer or a finite float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def points(metrics: Metrics, key: str) -> list[tuple[int, float]]:
    """(step, value) where there is one."""
    return [(row["step"], float(row[key])) for row in metrics if is_number(row.get(key))]


def values(metrics: Metrics, key: str) -> list[float]:
    """Those of `points`."""
    return [value for _, value in points(metrics, key)]


def mean(numbers: list[float]) -> float:
    """NaN of none."""
    return math.fsum(numbers) / len(numbers) if numbers else math.nan


# Words


def brief(value: object, most: int = LONGEST_VALUE) -> str:
    """A value on one line, cut, controls spelled out; of a tree, names in order. One that repeats or holds itself is
    not walked further than is shown."""
    length = 0
    parts = []
    for part in _words(value, most):
        parts.append(part)
        length += len(part)
        if length > most:
            break
    text = "".join(parts)
    return visible(text if length <= most else text[:most] + " …", keep="")


def _words(value: object, most: int, depth: int = 0) -> Iterator[str]:
    """What a value is written as, bit by bit."""
    if isinstance(value, dict) and depth < DEEPEST:
        yield "{"
        for i, key in enumerate(sorted(value, key=str)):
            yield f"{', ' if i else ''}{str(key)[:most]}: "
            yield from _words(value[key], most, depth + 1)
        yield "}"
    elif isinstance(value, list | tuple) and depth < DEEPEST:
        yield "["
        for i, item in enumerate(value):
            yield ", " if i else ""
            yield from _words(item, most, depth + 1)
        yield "]"
    elif value is None or isinstance(value, bool):
        yield {None: "null", True: "true", False: "false"}[value]
    elif isinstance(value, str):
        yield value[: most + 1]
    else:
        yield "…" if isinstance(value, list | tuple | dict) else f"{value!r:.100}"


def cut(text: str, most: int) -> str:
    """The beginning of a long text, controls spelled out, and how much is missing."""
    left = len(text) - most
    return visible(text) if left <= 0 else f"{visible(text[:most])}\n… {left:,} more characters"


def number(value: object) -> str:
    """Three digits, or "unknown"."""
    return f"{value:.3g}" if is_number(value) else "unknown"


def duration(seconds: float) -> str:
    """In the two largest units."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours} h {minute} min" if hours else f"{minute} min {second} s" if minute else f"{second} s"
