"""What was read and found -> one HTML file."""

import base64
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime.files import write_durably
from runtime.report.figures import Figure, compared, derive, figures, others, pass_rates, phase_seconds
from runtime.report.health import Check, Evidence, examine
from runtime.report.ledger import COLUMNS, Answers, browse_answers, read_answers
from runtime.report.read import (
    Metrics,
    Run,
    brief,
    cut,
    duration,
    is_number,
    mean,
    read_json,
    read_run,
    values,
)
from runtime.report.rollouts import Browser, browse, scan
from runtime.report.settings import changed, differences, read_command

REPORT = "report.html"
KINDS = {"grpo": "GRPO", "sft": "SFT", "distill": "Distillation", "reward_model": "Reward model"}
LONGEST_CONFIG = 200_000
MOST_FIGURES = 60
"""Figures of a comparison."""


def write_report(run_dir: str | Path, *, defaults: Any = None, path: str | Path | None = None) -> Path:
    """Write a run's report and return its path.

    defaults: the configuration the run would have had without any setting, to show what differs; a dataclass, or plain
        values. path: where to; None: report.html in the run folder.
    Raises UserError if the folder isn't there, DiskError if the page can't be written.
    """
    run = read_run(run_dir)
    derive(run)
    scans = scan(run)
    answers = read_answers(run)
    pairs = _pairs(run)
    checks = examine(Evidence(run=run, scans=scans, answers=answers, pairs=pairs))
    wanted = [step for check in checks if check.finding for step in check.steps]
    browser = browse_answers(run) or browse(run, wanted)
    drawn = figures(run, scans) + list(pass_rates(answers.pass_rates if answers else ()))
    rest = others(run)
    page = _render(
        "page.html.jinja",
        title=run.name,
        run=run,
        subtitle=_subtitle(run),
        tiles=_tiles(run, answers, pairs),
        findings=[check for check in checks if check.finding],
        checks=checks,
        links={check.name: _links(check, drawn, browser, run.unit) for check in checks},
        figures=drawn,
        others=rest,
        answers=answers,
        columns=COLUMNS,
        data_rows=_data_rows(run.metrics),
        browser=browser,
        changed=None if defaults is None else changed(run, defaults),
        command=read_command(run),
        config=cut(run.config_text, LONGEST_CONFIG),
        environment=_environment(run),
        data={
            "figures": _data([*drawn, *rest]),
            "unit": run.unit,
            "prompts": browser.prompts,
            "samples": browser.samples,
        },
    )
    return _write(Path(path) if path else run.path / REPORT, page)


def write_comparison(run_dirs: Sequence[str | Path], path: str | Path) -> Path:
    """Write a page that compares runs, and return its path. Raises as `write_report` does."""
    runs = [read_run(run_dir) for run_dir in run_dirs]
    for run in runs:
        derive(run)
    runs = _told_apart(runs)
    found = []
    for run in runs:
        evidence = Evidence(run=run, scans=scan(run), answers=read_answers(run), pairs=_pairs(run))
        found.append([check for check in examine(evidence) if check.finding])
    drawn = compared(runs)
    page = _render(
        "compare.html.jinja",
        title=f"{len(runs)} runs compared",
        runs=list(zip(runs, found, map(_subtitle, runs), strict=True)),
        final=_final(runs),
        differences=differences(runs),
        figures=drawn[:MOST_FIGURES],
        left_out=len(drawn) - MOST_FIGURES,
        data={"figures": _data(drawn[:MOST_FIGURES]), "unit": "step", "prompts": [], "samples": []},
    )
    return _write(Path(path), page)


def _render(template: str, *, data: Mapping[str, Any], **context: Any) -> str:
    import jinja2
    from markupsafe import Markup

    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (folder / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Safe: what could end the element, or begin a comment in it, is spelled in JSON's own escapes.
    inert = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        inert = inert.replace(character, f"\\u{ord(character):04x}")
    page: str = environment.get_template(template).render(
        **context,
        style=Markup((folder / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=digest,
        data=Markup(inert),
    )
    return page


def _write(path: Path, page: str) -> Path:
    write_durably(path, page.encode(errors="backslashreplace"))
    return path


def _data(drawn: Sequence[Figure]) -> dict[str, Any]:
    return {figure.id: figure.data for figure in drawn if figure.data}


# In words


def _subtitle(run: Run) -> str:
    if not run.metrics:
        return "No steps recorded yet."
    seconds = math.fsum(sum(phase_seconds(row).values()) or _step_time(row) for row in run.metrics)
    spent = f", {duration(seconds)} of timed work" if seconds else ""
    what = f"{KINDS[run.kind]}, {run.unit}s" if run.kind else "Steps"
    return f"{what} {run.metrics[0]['step']} to {run.metrics[-1]['step']}{spent}."


def _step_time(row: Mapping[str, Any]) -> float:
    seconds = row.get("step_time")
    return float(seconds) if is_number(seconds) else 0.0


def _tiles(run: Run, answers: Answers | None, pairs: Mapping[str, float]) -> list[dict[str, str]]:
    metrics = run.metrics
    tiles = []

    def add(label: str, value: str, note: str) -> None:
        tiles.append({"label": label, "value": value, "note": note})

    def change(key: str, label: str, form: Callable[[float], str], note: str = "first → last step") -> None:
        if seen := values(metrics, key):
            add(label, form(seen[0]) if len(seen) == 1 else f"{form(seen[0])} → {form(seen[-1])}", note)

    change("eval/accuracy", "Held-out accuracy", "{:.1%}".format, _interval(metrics) or "first → last evaluation")
    change("reward", "Reward", "{:.3f}".format)
    if run.kind != "grpo":  # the loss of a policy gradient says nothing
        change("loss", "Loss", "{:.3f}".format)
    change("eval/loss", "Held-out loss", "{:.3f}".format, "first → last evaluation")
    change("completions/mean_length", "Tokens per completion", "{:.1f}".format)
    change("completions/thinking_fraction", "Show their work", "{:.0%}".format)
    if gaps := values(metrics, "sampling/logp_gap/max"):
        add("Largest gap", f"{max(gaps):.3g}", "sampler to trainer, log-prob of a token")
    if speeds := values(metrics, "tokens_per_second"):
        add("Tokens per second", f"{mean(speeds):,.0f}", "mean over steps")
    if fills := values(metrics, "derived/fill")[:-1]:
        add("Packing fill", f"{mean(fills):.1%}", "mean over steps")
    if answers:
        kept = sum(row[COLUMNS.index("kept")] for row in answers.table)
        total = sum(row[COLUMNS.index("answers")] for row in answers.table)
        add("Answers kept", f"{kept:,} of {total:,}", f"{kept / max(total, 1):.0%}")
        if answers.sampled:
            add("Teacher right", f"{answers.right / answers.sampled:.1%}", f"of {answers.sampled:,} sampled and graded")
    if pairs:
        note = f"95 %: {pairs['low']:.1%} to {pairs['high']:.1%}"
        add("Held-out pairs right", f"{pairs['before']:.1%} → {pairs['after']:.1%}", note)
    return tiles


def _interval(metrics: Metrics) -> str:
    low, high = values(metrics, "eval/accuracy_low"), values(metrics, "eval/accuracy_high")
    return f"95 %: {low[-1]:.1%} to {high[-1]:.1%}" if low and high else ""


def _pairs(run: Run) -> dict[str, float]:
    """A reward model's held-out accuracy, from evaluation.json."""
    found = read_json(run.path / "evaluation.json", run.notes)
    try:
        before, after = (found[name]["plain"] for name in ("before", "after"))
        numbers = {"before": before["mean"], "after": after["mean"], "low": after["low"], "high": after["high"]}
    except (KeyError, TypeError):
        return {}
    return {name: float(value) for name, value in numbers.items()} if all(map(is_number, numbers.values())) else {}


def _data_rows(metrics: Metrics) -> list[tuple[str, str]]:
    """What was recorded of the data: name, count."""
    found = {key: row[key] for row in metrics for key in row if key.startswith("data/") and is_number(row[key])}
    return [(brief(key.removeprefix("data/"), 100), f"{value:,.6g}") for key, value in sorted(found.items())][:100]


def _links(check: Check, drawn: Sequence[Figure], browser: Browser, unit: str) -> list[tuple[str, str]]:
    """(address in the page, words) of where a finding shows."""
    links = []
    titles = {figure.id: figure.title for figure in drawn} | {"verdicts": "Verdicts", "data-rows": "Data"}
    if check.figure in titles:
        links.append((f"#{check.figure}", titles[check.figure]))
    if browser.samples and (check.samples or check.steps):
        queries = [check.samples] if check.samples else []
        if check.samples:
            links.append((f"#samples?{check.samples}", "completions"))
        for step in check.steps:
            if step in browser.steps:
                links.append((f"#samples?{'&'.join([*queries, f'step={step}'])}", f"those of {unit} {step}"))
    return links


def _environment(run: Run) -> list[tuple[str, str]]:
    shown = {
        k: v if isinstance(v, str) else json.dumps(v, indent=1, ensure_ascii=False) for k, v in run.environment.items()
    }
    return [(brief(k, 100), cut(v, LONGEST_CONFIG // 10)) for k, v in list(shown.items())[:50]]


# Comparison


def _told_apart(runs: Sequence[Run]) -> list[Run]:
    """Runs of the same name get their folder's, too; the same run twice gets a number."""
    from dataclasses import replace

    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return list(runs)
    longer = [brief(f"{run.path.resolve().parent.name}/{run.name}") for run in runs]
    if len(set(longer)) < len(longer):
        longer = [f"{name} ({i})" for i, name in enumerate(longer, start=1)]
    return [replace(run, name=name) for run, name in zip(runs, longer, strict=True)]


FINAL = (
    ("eval/accuracy", "Held-out accuracy", "{:.1%}"),
    ("reward", "Reward", "{:.3f}"),
    ("eval/loss", "Held-out loss", "{:.4f}"),
    ("loss", "Loss", "{:.4f}"),
    ("accuracy", "Training pairs put right", "{:.1%}"),
    ("accepted", "Answers kept", "{:.1%}"),
    ("completions/mean_length", "Tokens per completion", "{:.1f}"),
    ("completions/clipped_ratio", "Truncated", "{:.1%}"),
    ("frac_reward_zero_std", "All-equal groups", "{:.1%}"),
    ("entropy", "Entropy", "{:.3g}"),
    ("kl", "KL to the reference", "{:.3g}"),
    ("sampling/logp_gap/mean", "Sampler–trainer gap", "{:.2g}"),
    ("tokens_per_second", "Tokens per second", "{:,.0f}"),
    ("step_time", "Seconds per step", "{:.3g}"),
)


def _final(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(figure, each run's): held-out accuracy of the last evaluation with its 95 % interval; of the rest the mean over
    the last quarter of the steps, and their range."""
    rows = []
    for key, label, form in FINAL:
        cells = [_cell(run.metrics, key, form.format) for run in runs]
        if any(cells):
            rows.append((label, [cell or "–" for cell in cells]))
    pairs = [_pairs(run) for run in runs]
    if any(pairs):
        rows.append(
            (
                "Held-out pairs right",
                [f"{p['after']:.1%} [{p['low']:.1%}, {p['high']:.1%}]" if p else "–" for p in pairs],
            )
        )
    return rows


def _cell(metrics: Metrics, key: str, form: Callable[[float], str]) -> str:
    seen = values(metrics, key)
    if not seen:
        return ""
    if key == "eval/accuracy":
        low, high = values(metrics, f"{key}_low"), values(metrics, f"{key}_high")
        return form(seen[-1]) + (f" [{form(low[-1])}, {form(high[-1])}]" if low and high else "")
    if key == "eval/loss":
        return form(seen[-1])
    tail = seen[-max(1, len(seen) // 4) :]
    return form(mean(tail)) + (f" [{form(min(tail))}, {form(max(tail))}]" if len(tail) > 1 else "")
