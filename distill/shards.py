"""A ledger in; Parquet shards for SFT, the problems with their pass rates for GRPO, a manifest, a card, and what people
are to judge, out.

What is written is a function of the ledger and of people's decisions alone, in the order of the problems, without times
and paths: a run that was killed and one that wasn't leave the same bytes. The manifest comes last; without it the rest
is unfinished. Problems are JSON lines, because the tests of programming problems have no common columns.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from distill.ledger import Ledger, Row
from distill.review.decisions import load_decisions
from distill.review.queue import QUEUE
from distill.teacher import conversation
from distill.types import Decision, row_name
from runtime.failpoints import failpoint
from runtime.files import make_folder, replacing, write_durably, writing
from runtime.progress import visible

MANIFEST, CARD, PROBLEMS = "manifest.json", "README.md", "problems.jsonl"
SHARDS = "shards"
CHUNK = 1000
"""Problems held at a time."""
SCHEMA = pa.schema(
    {
        "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
        "id": pa.string(),
        "problem_id": pa.string(),
        "kind": pa.string(),
        "domain": pa.string(),
        "teacher": pa.string(),
        "weights_hash": pa.string(),
        "verdict": pa.string(),
        "pass_rate": pa.float64(),
        "seed": pa.int64(),
        "tokens": pa.int64(),
        "reviewed": pa.bool_(),
        "reviewer": pa.string(),
    }
)


@dataclass(kw_only=True)
class Yield:
    """What became of the answers of one kind in one domain."""

    domain: str
    kind: str
    problems: int = 0
    answers: int = 0
    right: int = 0
    wrong: int = 0
    unknown: int = 0
    hard_to_read: int = 0
    """Would have been eligible but for how they are written."""
    kept: int = 0
    """Written."""
    waiting: int = 0
    """Of those, not reviewed yet."""
    rejected: int = 0
    """Chosen, and then rejected by people."""
    tokens: int = 0
    """Of what is written."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """What was written."""

    folder: Path
    rows: int
    table: list[Yield]
    aside: dict[str, int]
    """Rows of the sources that nobody was asked to answer, by reason."""


@dataclass(kw_only=True)
class _Counts:
    table: dict[tuple[str, str], Yield] = field(default_factory=dict)
    verdicts: Counter[str] = field(default_factory=Counter)
    choices: Counter[str] = field(default_factory=Counter)
    pass_rates: dict[int, float] = field(default_factory=dict)


def export_run(ledger: Ledger, run_dir: Path, *, rows_per_shard: int = 50_000) -> Export:
    """Write a run's queue for people, and its shards with what they have decided by now. Raises DiskError."""
    queue = run_dir / QUEUE
    waiting = 0
    with replacing(queue) as aside, aside.open("w", encoding="utf-8") as file:
        for row in _written(ledger, {}, _Counts()):
            if row["reviewed"] is not None:
                waiting += 1
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    if not waiting:
        queue.unlink()
    return export(ledger, run_dir / SHARDS, rows_per_shard=rows_per_shard, decisions=decisions_of(run_dir))


def decisions_of(run_dir: Path) -> dict[str, Decision]:
    """What people say of a run's rows, by the row's name."""
    return load_decisions(run_dir / QUEUE) if (run_dir / QUEUE).exists() else {}


def export(
    ledger: Ledger, folder: Path, *, rows_per_shard: int = 50_000, decisions: Mapping[str, Decision] | None = None
) -> Export:
    """Write all that is chosen; decisions: what people said, by the row's name. Raises DiskError."""
    with writing(folder):
        make_folder(folder)
        (folder / MANIFEST).unlink(missing_ok=True)
    counts = _Counts()
    names: list[str] = []
    rows = 0
    for shard in _shards(_written(ledger, decisions or {}, counts), rows_per_shard):
        names.append(f"data-{len(names):05d}.parquet")
        rows += len(shard)
        failpoint("distill/before-shard")
        with replacing(folder / names[-1]) as aside:
            pq.write_table(pa.Table.from_pylist(shard, SCHEMA), aside, compression="zstd")
    with replacing(folder / PROBLEMS) as aside, aside.open("w", encoding="utf-8") as file:
        for problem in _problems(ledger, counts.pass_rates):
            file.write(json.dumps(problem, ensure_ascii=False) + "\n")
    table = [counts.table[key] for key in sorted(counts.table)]
    exported = Export(folder=folder, rows=rows, table=table, aside=ledger.aside())
    write_durably(folder / CARD, card(ledger, exported))
    for left_over in set(folder.glob("data-*.parquet")) - {folder / name for name in names}:
        left_over.unlink()  # an earlier export had more
    manifest = {
        "format": 1,
        "rows": rows,
        "files": {name: _sha256(folder / name) for name in (*names, PROBLEMS, CARD)},
        "answers": [asdict(part) for part in table],
        "set aside": exported.aside,
        "verdicts": dict(sorted(counts.verdicts.items())),
        "choices": dict(sorted(counts.choices.items())),
        "teachers": [asdict(teacher) for teacher in ledger.teachers().values()],
        "settings": ledger.settings(),
    }
    failpoint("distill/before-manifest")
    write_durably(folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    failpoint("distill/after-manifest")
    return exported


def needs_review(settings: Mapping[str, Any], domain: str) -> bool:
    """Whether a domain's rows wait for people, by the ledger's settings."""
    return bool(settings.get(f"experts.{domain}.review", settings.get("experts.others.review", False)))


def _written(ledger: Ledger, decisions: Mapping[str, Decision], counts: _Counts) -> Iterator[dict[str, Any]]:
    """The rows of the shards, counted on the way."""
    settings = ledger.settings()
    for position, group in groupby(ledger.rows(), key=lambda row: row.problem.position):
        rows = list(group)
        if (rate := _pass_rate(rows)) is not None:
            counts.pass_rates[position] = rate
        for kind in {row.sample.kind for row in rows}:
            domain = rows[0].problem.domain
            counts.table.setdefault((domain, kind), Yield(domain=domain, kind=kind)).problems += 1
        for row in rows:
            part = counts.table[row.problem.domain, row.sample.kind]
            decision = decisions.get(row_name(row.problem.id, row.sample.kind, row.sample.index))
            kept = _count(row, part, counts)
            if kept and decision is not None and not decision.accepted:
                part.rejected += 1
            elif kept:
                review = needs_review(settings, row.problem.domain)
                part.kept += 1
                part.waiting += review and decision is None
                part.tokens += row.sample.tokens
                yield _shard_row(row, rate, decision, review=review)


def _count(row: Row, part: Yield, counts: _Counts) -> bool:
    """Count an answer; whether it was chosen."""
    part.answers += 1
    if row.finding is not None:
        setattr(part, row.finding.outcome, getattr(part, row.finding.outcome) + 1)
        counts.verdicts[f"{row.finding.outcome}: {row.finding.reason}"] += 1
    if row.choice is None:
        return False
    counts.choices[row.choice.reason] += 1
    part.hard_to_read += row.finding is not None and row.choice.reason in row.finding.complaints
    return bool(row.choice.kept)


def _pass_rate(rows: list[Row]) -> float | None:
    """Share of a problem's sampled answers that are right, of those that can be graded: the reasoning ones if any."""
    sampled = [row for row in rows if row.teacher.id != "source"]
    sampled = [row for row in sampled if row.sample.kind == "reasoning"] or sampled
    outcomes = [row.finding.outcome for row in sampled if row.finding is not None]
    known = [outcome for outcome in outcomes if outcome != "unknown"]
    return known.count("right") / len(known) if known else None


def _shard_row(row: Row, rate: float | None, decision: Decision | None, *, review: bool) -> dict[str, Any]:
    problem, sample, teacher = row.problem, row.sample, row.teacher
    text = decision.text if decision is not None and decision.text is not None else sample.text
    prompt = conversation(problem, sample.kind, teacher.settings.get("system", ""))
    return {
        "messages": [*prompt, {"role": "assistant", "content": text}],
        "id": row_name(problem.id, sample.kind, sample.index),
        "problem_id": problem.id,
        "kind": sample.kind,
        "domain": problem.domain,
        "teacher": _short(teacher.model),
        "weights_hash": teacher.weights_hash,
        "verdict": row.finding.outcome if row.finding else None,
        "pass_rate": rate,
        "seed": sample.seed,
        "tokens": sample.tokens,
        "reviewed": decision is not None if review else None,
        "reviewer": decision.reviewer if decision is not None else None,
    }


def _shards(rows: Iterator[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    """Rows in lists of `size`; one empty list of none."""
    shard: list[dict[str, Any]] = []
    written = False
    for row in rows:
        shard.append(row)
        if len(shard) == size:
            yield shard
            shard, written = [], True
    if shard or not written:
        yield shard


def _problems(ledger: Ledger, pass_rates: Mapping[int, float]) -> Iterator[dict[str, Any]]:
    """Every problem with its pass rate, as python -m recipes.grpo reads them."""
    positions = [place.position for place in ledger.places()]
    for start in range(0, len(positions), CHUNK):
        for problem in ledger.problems(positions[start : start + CHUNK]):
            known = {"id": problem.id, "domain": problem.domain, "prompt": problem.prompt, "answer": problem.answer}
            yield {**problem.columns, **known, "pass_rate": pass_rates.get(problem.position)}


def card(ledger: Ledger, exported: Export) -> str:
    """Markdown with the metadata block that dataset hubs read. Names come from data: shown as code, escaped."""
    settings = ledger.settings()
    files = [{"split": "train", "path": "data-*.parquet"}]
    metadata = {"configs": [{"config_name": "default", "data_files": files}], "tags": ["distillation", "sft"]}
    heads = [
        "domain",
        "kind",
        "problems",
        "answers",
        "right",
        "wrong",
        "unknown",
        "hard to read",
        "kept",
        "waiting for people",
    ]
    lines = [
        f"| {_code(p.domain)} | {p.kind} | {p.problems:,} | {p.answers:,} | {p.right:,} | {p.wrong:,} | {p.unknown:,} "
        f"| {p.hard_to_read:,} | {p.kept:,} | {p.waiting:,} |"
        for p in exported.table
    ]
    teachers = [
        f"| {_code(_short(t.model))} | `{t.weights_hash or 'unknown'}` | {_code(t.settings.get('domain') or 'others')} "
        f"| {t.settings.get('temperature', '')} | {t.settings.get('max_tokens', '')} |"
        for t in ledger.teachers().values()
    ]
    aside = [f"| {_code(reason)} | {count:,} |" for reason, count in exported.aside.items()] or ["| none | 0 |"]
    benchmarks = ", ".join(_code(_short(name)) for name in settings["benchmarks"]) or "none: no problem was compared"
    parts = [
        "---\n" + yaml.safe_dump(metadata, sort_keys=False) + "---",
        "# Distilled answers",
        f"{exported.rows:,} conversations whose last turn a teacher wrote, with its reasoning between `<think>` tags. "
        "Rows of domains that people review have `reviewed`; `pass_rate` is the teacher's on the problem. "
        f"`{PROBLEMS}` holds every problem with it. `{MANIFEST}` holds hashes, counts by reason, and all settings.",
        "\n".join([f"| {' | '.join(heads)} |", "|---|---|" + "---:|" * 8, *lines]),
        f"Kept: at most {settings['keep']} of a problem and kind, by the policy `{settings['policy']}`, among those "
        "that are right and readable.",
        "\n".join(["| teacher | weights | domain | temperature | most tokens |", "|---|---|---|---|---|", *teachers]),
        "\n".join(["| rows set aside | |", "|---|---:|", *aside]),
        f"Benchmarks kept out, by {settings['ngram']} words in a row: {benchmarks}.",
    ]
    return "\n\n".join(parts) + "\n"


def _code(text: str) -> str:
    return "`" + visible(text, keep="").replace("`", "'").replace("|", r"\|") + "`"


def _short(name: str) -> str:
    """A model's or file's name without the folders it lies in; a hub's name whole."""
    return Path(name).name if name.startswith((".", "/", "~")) else name


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
