"""A file, a dataset's name or "stories" in; rows with `prompt` and `answer`, and the order to draw them, out.

Reads JSON lines (.jsonl, .json, either with .gz), Parquet, `datasets` names and folders, and the built-in
stories. Layouts: `prompt`/`answer`; GSM8K's `question`/`answer`, where the answer follows `####`;
NuminaMath's `problem`/`answer`. Other columns pass through to the rewards. A bad row is set aside with its
line and the reason, never dropped silently, and a file with many of them is refused. `load_rows` holds
the rows in memory; `read_raw` streams them as they stand, for who has layouts of their own (sft/sources.py).
"""

import functools
import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import numpy as np

from runtime.errors import UserError
from runtime.stories import stories

Row = dict[str, Any]

KINDS = (
    "JSON lines (.jsonl or .json, optionally .gz), Parquet (.parquet), a `datasets` name or folder "
    '("name", "name:split" or "name:config:split"), or "stories" / "stories:heldout"'
)
STORY_ROWS = {"train": 12_000, "heldout": 400}
UNVERIFIABLE = {"proof", "notfound"}
"""What NuminaMath-1.5 writes in `answer` where there is nothing to compare with."""


@dataclass(frozen=True, kw_only=True)
class Reject:
    """A row that was set aside."""

    line: int
    """1-based line of a text file, 1-based row of a Parquet file or dataset."""
    reason: str
    """Why, from a small set, so that it can be counted."""
    text: str
    """The row's first 200 characters."""
    malformed: bool = True
    """False for a sound row of no use; only malformed ones count against `max_bad_fraction`."""


@dataclass(eq=False, repr=False)  # compares and prints as the list it is
class Rows(list[Row]):
    """Normalised rows in the order of their source, and what was set aside on the way."""

    source: str = ""
    lines: list[int] = field(default_factory=list)
    """Where each row stands in the source, 1-based; gaps are rejects and blank lines."""
    rejects: list[Reject] = field(default_factory=list)

    @property
    def reasons(self) -> Counter[str]:
        """How many rows were set aside, by reason."""
        return Counter(reject.reason for reject in self.rejects)

    def summary(self) -> str:
        """One line for the log: how many rows, and how many set aside, by reason."""
        aside = "".join(f"; {n} set aside: {reason}" for reason, n in self.reasons.most_common())
        return f"{self.source}: {len(self)} rows{aside}"


class BadRow(Exception):
    """Why a row can't be used; whoever reads the rows catches it and counts the reason."""

    def __init__(self, reason: str, *, malformed: bool = True) -> None:
        super().__init__(reason)
        self.reason, self.malformed = reason, malformed


def load_rows(source: str, *, limit: int | None = None, max_bad_fraction: float = 0.1) -> Rows:
    """Read and normalise the rows of `source`; with `limit`, stop after that many good ones.

    Raises:
        UserError: nothing there, an unknown kind, no good row, or more than `max_bad_fraction` malformed
        ones.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit}: read at least one row, or leave it out to read all")
    rows = Rows(source=source)
    for line, found in read_raw(source, limit):
        try:
            row = normalise(parse(found) if isinstance(found, bytes) else found)
        except BadRow as bad:
            rows.rejects.append(Reject(line=line, reason=bad.reason, text=excerpt(found), malformed=bad.malformed))
            continue
        rows.append(row)
        rows.lines.append(line)
        if len(rows) == limit:
            break
    malformed = sum(reject.malformed for reject in rows.rejects)
    if not rows or malformed > max_bad_fraction * (len(rows) + len(rows.rejects)):
        raise UserError(_refusal(rows, malformed, max_bad_fraction))
    return rows


def normalise(row: object) -> Row:
    """Return one row in TRL's columns; raise BadRow if it can't be used."""
    if not isinstance(row, dict):
        raise BadRow(f"not an object but {kind(row)}")
    out = dict(row)
    layout = next((key for key in ("prompt", "question", "problem") if row.get(key) is not None), None)
    if layout is None:
        raise BadRow("no prompt, question or problem")
    out["prompt"] = _prompt(row[layout], layout)
    answer = row.get("answer")
    if answer is None:
        answer = ""  # rewards call an empty gold unknown; rewards that need none still work
    elif isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    elif not isinstance(answer, str):
        raise BadRow(f"answer is {kind(answer)}, not a string")
    if layout == "question" and "####" in answer:
        solution, _, final = answer.rpartition("####")
        answer = final.strip().replace(",", "")
        if not answer:
            raise BadRow("no answer after ####")
        out.setdefault("solution", solution.rstrip())
    # Paid by equality, a gold of "proof" would teach the policy to answer "proof".
    if layout == "problem" and (answer.strip().lower() in UNVERIFIABLE or row.get("question_type") == "proof"):
        raise BadRow("nothing to verify (answer is proof or notfound)", malformed=False)
    if layout != "prompt":
        del out[layout]
    out["answer"] = answer
    return out


def order(n: int, *, seed: int, epoch: int) -> list[int]:
    """Return epoch `epoch`'s order of `n` rows: a permutation of 0..n-1, a pure function of its arguments.

    The rows sorted by one 64-bit word each from numpy's PCG64 seeded with (seed, epoch): its stream is
    promised to stay the same in every numpy, which `Generator.permutation` isn't.
    """
    return [int(i) for i in _order(n, seed, epoch)]


def take(n_rows: int, *, seed: int, start: int, count: int) -> list[tuple[int, int]]:
    """Return draws start..start+count-1 of the endless sequence of epochs, as (epoch, row index).

    Pure: a run resumes from `start` alone. Each epoch has every row once; a call may span epochs.
    """
    if n_rows < 1 or start < 0 or count < 0:
        raise ValueError(f"n_rows={n_rows}, start={start}, count={count}: needs rows, and no negative number")
    draws = (divmod(cursor, n_rows) for cursor in range(start, start + count))
    return [(epoch, int(_order(n_rows, seed, epoch)[place])) for epoch, place in draws]


@functools.lru_cache(maxsize=4)  # of a pure function: a step's draws come from one epoch or two
def _order(n: int, seed: int, epoch: int) -> np.ndarray:
    if seed < 0 or epoch < 0:
        raise ValueError(f"seed={seed}, epoch={epoch}: use numbers >= 0")
    words = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(n)
    return np.argsort(words, kind="stable")


def _prompt(value: object, layout: str) -> str | list[dict[str, Any]]:
    if isinstance(value, str):
        if not value.strip():
            raise BadRow(f"empty {layout}")
        return value if layout == "prompt" else [{"role": "user", "content": value}]
    if layout != "prompt":
        raise BadRow(f"{layout} is {kind(value)}, not a string")
    if not isinstance(value, list):
        raise BadRow(f"prompt is {kind(value)}, not a string or a list of messages")
    for message in value:
        if not (isinstance(message, dict) and all(isinstance(message.get(k), str) for k in ("role", "content"))):
            raise BadRow("prompt has a message that isn't an object with the strings role and content")
    if not any(message["content"].strip() for message in value):
        raise BadRow("empty prompt")
    return [dict(message) for message in value]


def kind_of(source: str) -> Literal["stories", "lines", "parquet", "dataset"]:
    """What a source names; UserError if nothing is there or it is of no kind known here."""
    if source.partition(":")[0] == "stories":
        if source.partition(":")[2] not in ("", *STORY_ROWS):
            raise UserError(f'source {source!r}: the built-in stories are "stories" and "stories:heldout"')
        return "stories"
    path = Path(source).expanduser()
    name = path.name.lower()
    if path.is_file() and name.removesuffix(".gz").endswith((".jsonl", ".json")):
        return "lines"
    if path.is_file() and name.endswith(".parquet"):
        return "parquet"
    if path.is_file():
        raise UserError(f"source {source!r}: can't tell what kind of file this is; rows come from {KINDS}")
    looks_like_path = name.endswith((".jsonl", ".json", ".gz", ".parquet")) or source.startswith(("/", ".", "~"))
    if looks_like_path and not Path(source.partition(":")[0]).expanduser().is_dir():
        raise UserError(f"source {source!r}: no such file or folder; rows come from {KINDS}")
    return "dataset"


def read_raw(source: str, limit: int | None = None) -> Iterator[tuple[int, object]]:
    """Yield (1-based line, bytes of JSON or an object) from whatever `source` names; `limit` is for stories only."""
    what = kind_of(source)
    if what == "stories":
        split = source.partition(":")[2] or "train"
        n = limit or STORY_ROWS[split]
        return enumerate(stories(n, split="train" if split == "train" else "heldout", seed=0), start=1)
    if what == "dataset":
        return enumerate(load_dataset(source), start=1)
    path = Path(source).expanduser()
    return read_parquet(path) if what == "parquet" else read_lines(path)


def open_lines(path: Path) -> BinaryIO:
    """A text file's bytes, unpacked if its name ends with .gz."""
    return cast(BinaryIO, gzip.open(path)) if path.name.lower().endswith(".gz") else path.open("rb")


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (1-based line, its bytes) of a file of JSON lines; blank ones are passed over."""
    try:
        with open_lines(path) as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                    if line.strip() in (b"[", b"[]") or line.startswith((b"[{", b"[ ")):
                        raise UserError(
                            f"source {str(path)!r}: holds one JSON array, not one object per line; "
                            "convert it with: jq -c '.[]' in.json > out.jsonl"
                        )
                if line.strip():
                    yield number, line
    except (EOFError, zlib.error, OSError) as error:
        raise UserError(f"source {str(path)!r}: can't be read: {error}") from error


def read_parquet(path: Path) -> Iterator[tuple[int, object]]:
    """Yield (1-based row, its object), or the bytes of a string that isn't UTF-8 in the row's place."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for i in range(batch.num_rows):
                    number += 1
                    try:
                        yield number, batch.slice(i, 1).to_pylist()[0]
                    except UnicodeDecodeError as error:
                        # Parquet doesn't check its strings. The raw bytes go on, to be refused as a line.
                        yield number, bytes(error.object)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"source {str(path)!r}: not a readable Parquet file: {error}") from error


def load_dataset(source: str) -> Any:
    """The split of a `datasets` name or folder, as a Dataset: "name", "name:split" or "name:config:split"."""
    base, *rest = source.split(":")
    folder = Path(base).expanduser()
    if len(rest) > 2 or not (folder.is_dir() or re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base)):
        raise UserError(f"source {source!r}: not a file, a folder or a dataset's name; rows come from {KINDS}")
    split = rest[-1] if rest else "train"

    import datasets

    try:
        if (folder / "state.json").is_file():  # one split, written by save_to_disk
            return datasets.load_from_disk(str(folder))
        if (folder / "dataset_dict.json").is_file():
            return datasets.load_from_disk(str(folder))[split]
        where = str(folder) if folder.is_dir() else base
        return datasets.load_dataset(where, rest[0] if len(rest) == 2 else None, split=split)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, KeyError) as error:
        raise UserError(f"source {source!r}: `datasets` can't load it: {error}; rows come from {KINDS}") from error


def parse(line: bytes) -> object:
    """One line of JSON; BadRow for broken UTF-8 or JSON, and for lone surrogates, which no tokenizer takes."""
    try:
        text = line.decode()
        row = json.loads(text)
        if "\\ud" in text.lower():  # JSON can spell a lone surrogate, which no tokenizer or Parquet file accepts
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeError as error:
        raise BadRow("broken UTF-8") from error
    except (ValueError, RecursionError) as error:  # ValueError: also a number with thousands of digits
        raise BadRow("broken JSON") from error
    return row


def _refusal(rows: Rows, malformed: int, max_bad_fraction: float) -> str:
    total = len(rows) + len(rows.rejects)
    if not total:
        return f"source {rows.source!r}: holds no rows; it needs rows with `prompt` and `answer`"
    first = "".join(f"\n  line {r.line}: {r.reason}: {r.text[:80]!r}" for r in islice(rows.rejects, 3))
    if not rows:
        return (
            f"source {rows.source!r}: none of its {total} rows can be used; "
            f"a row needs `prompt` (or `question`, `problem`) and `answer`:{first}"
        )
    return (
        f"source {rows.source!r}: {malformed} of {total} rows are bad, more than "
        f"max_bad_fraction={max_bad_fraction:g}; repair them or raise it:{first}"
    )


def excerpt(found: object) -> str:
    """The first 200 characters of a raw row."""
    if isinstance(found, bytes):
        return found[:800].decode(errors="backslashreplace").strip()[:200]
    return json.dumps(found, ensure_ascii=False, default=repr)[:200]


def kind(value: object) -> str:
    """A value's type, for a reason."""
    return f"of type {type(value).__name__}" if value is not None else "null"
