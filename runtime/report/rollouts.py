"""rollouts/*.parquet -> histograms over steps, and completions for people, token by token where a tokenizer is at hand.

A run without rollouts may have its answers to held-out problems (runtime/held_out.py), which are for people alone.

Of long runs some steps are read, of large steps some completions, and of long completions the beginning and the end;
each is counted. The trainer's log-probs are in trainer/, under the same names, where the run has recorded them.
"""

import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.held_out import FOLDER as HELD_OUT
from runtime.progress import visible
from runtime.report.read import Run, brief, cut, is_number, number

MOST_SCANNED = 40
"""Steps whose numbers are read."""
MOST_STEPS = 12
"""Steps whose completions are read."""
PER_STEP = 32
"""Completions of a step."""
MOST_BYTES = 2_500_000
"""Of the page, for completions."""
HEAD, TAIL = 900, 300
"""Tokens of a completion that are shown."""
LONGEST_TEXT = 6000
LARGEST_COLUMN = 1 << 26
"""Bytes of token ids beyond which their number isn't counted."""
FOLDER, TRAINER = "rollouts", "trainer"
PART = "rewards/"


@dataclass(frozen=True, kw_only=True)
class Scan:
    """A step's completions in numbers."""

    step: int
    completions: int
    advantages: list[float]
    """Of those that were trained on."""
    groups: int
    equal_high: int
    """Groups whose rewards are all the step's highest."""
    equal_low: int
    """Groups whose rewards are all the step's lowest."""
    length_pays: float
    """Correlation of length and reward within groups; NaN if there is none."""


def files(run: Run, folder: str = FOLDER) -> dict[int, Path]:
    """Step -> its file."""
    found = ((re.fullmatch(r"step-(\d{1,12})\.parquet", path.name), path) for path in (run.path / folder).glob("*"))
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many, evenly, the first and the last among them."""
    if len(items) <= most or most < 2:
        return list(items[:most])
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def scan(run: Run) -> list[Scan]:
    """The numbers of some steps."""
    scans = []
    for step, path in spread(list(files(run).items()), MOST_SCANNED):
        columns = _read(path, ("process", "group", "used", "reward", "advantage"), run.notes)
        if columns is not None and (rows := columns.to_pylist()):
            scans.append(_scan(step, rows, _lengths(path, run.notes)))
    return scans


def _scan(step: int, rows: Sequence[dict[str, Any]], lengths: Sequence[int] | None) -> Scan:
    known = [row["reward"] for row in rows if is_number(row.get("reward"))]
    high, low = max(known, default=math.nan), min(known, default=math.nan)
    equal = [all_equal(group) for group in groups(rows)]
    return Scan(
        step=step,
        completions=len(rows),
        advantages=[
            row["advantage"] for row in rows if row.get("used") is not False and is_number(row.get("advantage"))
        ],
        groups=len(equal),
        equal_high=sum(value is not None and value == high for value in equal),
        equal_low=sum(value is not None and value == low for value in equal),
        length_pays=_correlation(rows, lengths) if lengths is not None else math.nan,
    )


def groups(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows that are of one group, which stand together."""
    return [list(members) for _, members in itertools.groupby(rows, key=_group)]


def _group(row: dict[str, Any]) -> tuple[Any, Any]:
    return row.get("process"), row.get("group")


def all_equal(group: Sequence[dict[str, Any]]) -> float | None:
    """The reward that all of a group have whose reward is known; None if they differ, or nobody's is known."""
    known = {row["reward"] for row in group if is_number(row.get("reward"))}
    return known.pop() if len(known) == 1 else None


def _correlation(rows: Sequence[dict[str, Any]], lengths: Sequence[int]) -> float:
    """Pearson's, of length and reward, each less its group's mean."""
    x: list[float] = []
    y: list[float] = []
    pairs = [{**row, "length": length} for row, length in zip(rows, lengths, strict=True)]
    for group in groups(pairs):
        known = [row for row in group if is_number(row.get("reward"))]
        for values, name in ((x, "length"), (y, "reward")):
            mean = math.fsum(row[name] for row in known) / max(len(known), 1)
            values += [row[name] - mean for row in known]
    norm = math.sqrt(math.fsum(v * v for v in x) * math.fsum(v * v for v in y))
    return math.fsum(a * b for a, b in zip(x, y, strict=True)) / norm if norm else math.nan


def _read(path: Path, wanted: Sequence[str], notes: list[str], *, parts: bool = False) -> Any:
    """Those of the columns that the file has, as a table; None, and a note, if it can't be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            columns = [name for name in names if name in wanted or (parts and name.startswith(PART))]
            return file.read(columns=columns)
    except (pa.ArrowException, OSError, ValueError) as error:
        note = f"{path.parent.name}/{path.name} can't be read: {brief(str(error), 200)}"
        if note not in notes:
            notes.append(note)
        return None


def _lengths(path: Path, notes: list[str]) -> list[int] | None:
    """Tokens of each completion; None where that is not in the file, or too much to read for it."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            about = file.metadata
            chunks = [
                about.row_group(g).column(c) for g in range(about.num_row_groups) for c in range(about.num_columns)
            ]
            sizes = [c.total_uncompressed_size for c in chunks if c.path_in_schema.startswith("completion_ids.")]
            if not sizes or sum(sizes) > LARGEST_COLUMN:
                return None
            ids = file.read(columns=["completion_ids"]).column(0)
            return [n or 0 for n in pc.list_value_length(ids).to_pylist()]
    except (pa.ArrowException, OSError, ValueError):
        return None  # `_read` has said so


# Completions


@dataclass(frozen=True, kw_only=True)
class Browser:
    """The page's completions."""

    prompts: list[str]
    samples: list[dict[str, Any]]
    steps: list[int]
    note: str
    """How many of how many."""
    tokens: bool
    """Whether some are shown token by token."""
    trainer: bool
    """Whether some have the trainer's log-probs."""

    @property
    def equal(self) -> bool:
        """Whether some are of groups whose rewards are all equal."""
        return any(sample["eq"] for sample in self.samples)


def browse(run: Run, wanted: Sequence[int]) -> Browser:
    """Completions of the first, the last and some other steps, those in `wanted` among them."""
    folder = FOLDER if files(run) else HELD_OUT
    there = files(run, folder)
    chosen = {*[step for step in wanted if step in there][: MOST_STEPS // 2]}
    chosen |= set(spread(list(there), MOST_STEPS - len(chosen)))
    pieces = _tokenizer(run)
    prompts: dict[str, int] = {}
    samples: list[dict[str, Any]] = []
    left, seen, steps = MOST_BYTES, 0, []
    share = MOST_BYTES // max(len(chosen), 1)
    # Of held-out problems first what the trained model says.
    for step in sorted(chosen, reverse=folder == HELD_OUT):
        left += share - MOST_BYTES if not samples else share
        rows, total = _step(run, step, there[step])
        seen += total
        steps += [step] if rows else []
        for row in rows:
            size = len(prompts)
            sample = _sample(run, row, pieces, prompts)
            cost = _size(sample) + (len(next(reversed(prompts)).encode()) if len(prompts) > size else 0)
            if cost > left:
                continue
            left -= cost
            samples.append(sample)
    words = f"{len(samples):,} of the {seen:,} completions of {len(steps):,} steps"
    if len(there) > len(steps):
        words += f"; the run has {len(there):,} steps with completions, in {folder}/"
    if folder == HELD_OUT:
        words += ", all to held-out problems, the newest first"
    words += ". Right and wrong are by the reward accuracy, or by the reward's sign where there is none."
    tokens, trainer = (any(name in sample for sample in samples) for name in ("tok", "lr"))
    return Browser(prompts=list(prompts), samples=samples, steps=steps, note=words, tokens=tokens, trainer=trainer)


def _size(sample: dict[str, Any]) -> int:
    """About what it takes in the page."""
    text = sum(len(piece.encode()) + 4 for piece in sample.get("tok", ())) + len(sample.get("text", "").encode())
    return text + 7 * (len(sample.get("lp", ())) + len(sample.get("lr", ()))) + 400


WANTED = (
    *("step", "process", "group", "sample", "used", "prompt_text", "completion_text", "completion_ids", "logprobs"),
    *("finish_reason", "version", "answer", "reward", "advantage", "prompt_index"),
)


def _step(run: Run, step: int, path: Path) -> tuple[list[dict[str, Any]], int]:
    """A step's completions that are shown, and how many it has."""
    names = ("process", "group", "sample", "used", "reward", "finish_reason", "advantage")
    numbers = _read(path, names, run.notes, parts=True)
    if numbers is None or not numbers.num_rows:
        return [], 0
    rows = numbers.to_pylist()
    equal = [all_equal(group) is not None for group in groups(rows) for _ in group]
    for i, row in enumerate(rows):
        row |= {"at": i, "equal": equal[i], "verdict": _verdict(row), "cut": row.get("finish_reason") == "length"}
    picked = [row["at"] for row in pick(rows)]
    table = _read(path, WANTED, run.notes, parts=True)
    if table is None:
        return [], 0
    trainer = _trainer(run, path)
    found = []
    for at, row in zip(picked, table.take(picked).to_pylist(), strict=True):
        key = (row.get("process"), row.get("group"), row.get("sample"))
        found.append({**row, **rows[at], "step": step, "trainer": trainer.get(key)})
    return found, len(rows)


def pick(rows: Sequence[dict[str, Any]], most: int = PER_STEP) -> list[dict[str, Any]]:
    """Whole groups for half of the places; the rest by turns of every kind: right, wrong, unknown, cut or not, trained
    on or not."""
    if len(rows) <= most:
        return list(rows)
    whole = groups(rows)
    largest = max(map(len, whole))
    picked = {row["at"]: row for group in spread(whole, most // 2 // largest) for row in group}
    kinds: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if row["at"] not in picked:
            kinds.setdefault((row["verdict"], row["cut"], row.get("used")), []).append(row)
    turns = itertools.zip_longest(*(spread(kind, most) for kind in kinds.values()))
    for row in (row for turn in turns for row in turn if row is not None):
        if len(picked) >= most:
            break
        picked[row["at"]] = row
    return [picked[at] for at in sorted(picked)]


def _verdict(row: dict[str, Any]) -> str:
    """By the reward for right answers where there is one, else by the reward's sign."""
    value = row.get("rewards/accuracy", row.get("reward"))
    return "unknown" if not is_number(value) or row.get("reward", value) is None else "right" if value > 0 else "wrong"


def _trainer(run: Run, path: Path) -> dict[tuple[Any, ...], list[float]]:
    """(process, group, sample) -> log π_trainer of the completion's tokens, where the run has recorded it."""
    file = run.path / TRAINER / path.name
    if not file.is_file():
        return {}
    table = _read(file, ("process", "group", "sample", "logprobs"), run.notes)
    rows = [] if table is None else table.to_pylist()
    return {(row.get("process"), row.get("group"), row.get("sample")): row.get("logprobs") for row in rows}


def _sample(
    run: Run, row: dict[str, Any], pieces: Callable[[list[int]], list[str]] | None, prompts: dict[str, int]
) -> dict[str, Any]:
    """As the page's script reads it."""
    prompt = cut(str(row.get("prompt_text") or ""), LONGEST_TEXT)
    ids, logprobs, trainer = (row.get(name) or [] for name in ("completion_ids", "logprobs", "trainer"))
    sample: dict[str, Any] = {
        "s": row["step"],
        "p": prompts.setdefault(prompt, len(prompts)),
        "g": row.get("group"),
        "n": row.get("sample"),
        "v": row["verdict"],
        "cut": row["cut"],
        "eq": row["equal"],
        "mask": _mask(run, row),
        "len": len(ids),
        "gold": brief(row.get("answer") or "", 200),
        "chips": _chips(row),
    }
    if len(logprobs) != len(ids) or not ids or not all(0 <= i < 2**31 for i in ids):
        return sample | {"text": cut(str(row.get("completion_text") or ""), LONGEST_TEXT)}
    if pieces is None:
        sample["text"] = cut(str(row.get("completion_text") or ""), LONGEST_TEXT)
    shown = list(range(len(ids))) if len(ids) <= HEAD + TAIL else [*range(HEAD), *range(len(ids) - TAIL, len(ids))]
    if len(shown) < len(ids):
        sample["gap"] = HEAD
    texts = pieces(ids) if pieces else [f"{i} " for i in ids]
    sample["tok"] = [visible(texts[i][:LONGEST_TEXT]) for i in shown]
    sample["lp"] = [_rounded(logprobs[i]) for i in shown]
    if len(trainer) == len(ids):
        cap = math.log(run.setting("loss.importance_cap", 2.0))
        ratios = [_difference(trainer[i], logprobs[i]) for i in shown]
        sample["lr"] = [_rounded(ratio) for ratio in ratios]
        capped = [n for n, ratio in enumerate(ratios) if ratio is not None and ratio > cap]
        if capped and run.config.get("loss.importance") != "none":
            sample["cap"] = capped
    return sample


def _difference(a: Any, b: Any) -> float | None:
    return a - b if is_number(a) and is_number(b) else None


def _rounded(value: Any) -> float | None:
    return float(f"{value:.3g}") if is_number(value) else None


def _mask(run: Run, row: dict[str, Any]) -> str:
    """Why a completion's tokens had no part in the update; "" if they had one."""
    if "used" not in row:
        return "held out: no part in any update"
    if row.get("used") is False:
        return "spare: its group was sampled and not trained on"
    if row["verdict"] == "unknown" or not is_number(row.get("advantage")):
        return "reward unknown: left out of the update"
    if row["cut"] and run.config.get("loss.mask_truncated") is True:
        return "truncated: left out by loss.mask_truncated"
    if row["advantage"] == 0:
        return "advantage 0: nothing to learn from its reward"
    return ""


def _chips(row: dict[str, Any]) -> list[str]:
    chips = [f"reward {number(row['reward'])}"] if "reward" in row else []
    chips += [f"{brief(k[len(PART) :], 60)} {number(row[k])}" for k in row if k.startswith(PART)]
    if is_number(row.get("advantage")):
        chips.append(f"advantage {row['advantage']:+.2f}")
    if row.get("version") is not None:
        chips.append(f"weights {row['version']}")
    return chips


# Tokens


def _tokenizer(run: Run) -> Callable[[list[int]], list[str]] | None:
    """Of the run's newest checkpoint, or of the model it started from where that is a folder; None without one."""
    from tokenizers import Tokenizer

    folders = [run.path / "checkpoints" / "final", *sorted((run.path / "checkpoints").glob("step-*"), reverse=True)]
    folders.append(Path(str(run.config.get("model", "")) or "-"))
    for path in (folder / "tokenizer.json" for folder in folders):
        if path.is_file():
            try:
                tokenizer = Tokenizer.from_file(str(path))
            except Exception as error:  # all that this library raises
                run.notes.append(f"{path.parent.name}/tokenizer.json can't be read: {brief(str(error), 200)}")
                continue
            decode = functools.partial(tokenizer.decode, skip_special_tokens=False)
            return lambda ids, decode=decode: list(token_texts(ids, decode))  # type: ignore[misc]
    return None


def token_texts(ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> Iterator[str]:
    """What each token adds to the text. Of several tokens that are one character, the last adds it."""
    start, before = 0, ""
    for i in range(len(ids)):
        text = decode(ids[start : i + 1])
        if text.endswith("\ufffd") and i + 1 < len(ids) and i + 1 - start < 8:
            yield ""
            continue
        yield text[len(before) :]
        start, before = i, decode(ids[i : i + 1])
