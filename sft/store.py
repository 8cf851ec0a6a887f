"""Sources of a mix -> token ids and masks, tokenised once, in an Arrow store on disk with cheap random access.

A source's folder is named by a hash of all that its contents depend on: the rows, the tokenizer, the template, the
settings. In it are shards, Arrow IPC files with the columns `ids`, `trained` and `line`, each named by its number and
the hash of its bytes, so that one found there is whole and right or is made again. `source.json` says that all are
there; `rejects.jsonl` holds the rows that couldn't be used. One process at a time builds a source; its children only
compute. Left out: which samples an epoch holds (sft/mix.py) and who shares a row (sft/pack.py).
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import logging
import multiprocessing
import os
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import tokenizers
import xxhash
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from runtime.environment import environment
from runtime.errors import UserError
from runtime.files import make_folder, replacing, write_durably
from runtime.progress import track_steps, visible
from runtime.settings import require
from sft.chat import template_hash
from sft.mix import SourceConfig, check_mix
from sft.shards import (
    Chunk,
    Ids,
    Row,
    Settings,
    encode_chunk,
    is_whole,
    read_facts,
    read_index,
    shard_number,
)
from sft.sources import UNREVIEWED, Source

logger = logging.getLogger(__name__)

FORMAT = 2
"""Raise it when sft/sources.py or sft/shards.py makes other samples of the same rows: stores are made anew."""
ROWS, CHARACTERS = 8192, 1 << 25
"""A shard is closed at so many rows or characters: what a kill loses, and what a process holds in memory."""
MOST_WORKERS = 16
"""Where their number isn't given: memory for each one's chunk is needed here, and the builder writes what all make."""
IN_PLACE_SECONDS = 10.0
"""So long the tokenizer's own threads do it. More processes would take seconds to start, and pay off behind that."""
PLAIN_SECONDS = 10.0
"""Between two lines of progress where there is no terminal."""
THREADS = "TOKENIZERS_PARALLELISM"
"""Whether a tokenizer uses threads of its own; it looks there at every call."""
MOST_OPEN = 256
"""Files that a store keeps open at once."""

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class SourceReport:
    """A tokenised source."""

    name: str
    """As the mix has it."""
    folder: Path
    """Where its shards, `source.json` and `rejects.jsonl` are."""
    shards: tuple[str, ...]
    """Files in the order of the source's rows."""
    samples: int
    """Rows that became samples."""
    tokens: int
    """Of all samples."""
    rejects: dict[str, int]
    """Rows set aside, by reason."""

    @property
    def rows(self) -> int:
        """Rows that were read."""
        return self.samples + sum(self.rejects.values())

    def summary(self) -> str:
        """One line for the log: how many samples, and how many rows set aside, by reason."""
        aside = "".join(f"; {n:,} set aside: {reason}" for reason, n in Counter(self.rejects).most_common())
        return f"{visible(self.name)}: {self.samples:,} samples, {self.tokens:,} tokens{aside}"


class Store:
    """The samples of all sources, numbered through; `store[i]` is (ids int32, trained bool), True = a target.

    Samples are read from the files, whose pages the system keeps. Mapping them instead would be slower (7 µs to 5) and
    would count as this process's memory: each read maps up to 2 MiB around it, so 1.5M examples would be 4.5 GB.
    """

    def __init__(self, sources: Sequence[SourceReport]) -> None:
        self.sources = list(sources)
        self.sizes = [source.samples for source in self.sources]
        """Samples of each source."""
        self.source_of = np.repeat(np.arange(len(self.sizes), dtype=np.int16), self.sizes)
        """(samples,) index of each sample's source."""
        self._paths = [source.folder / shard for source in self.sources for shard in source.shards]
        self._files: dict[int, FileIO] = {}
        shards = [read_index(path) for path in self._paths]
        self.lengths: Ids = np.concatenate([np.diff(shard.offsets) for shard in shards])
        """(samples,) tokens of each."""
        self._ids_at = [shard.ids_at for shard in shards]
        self._starts = np.concatenate([shard.offsets[:-1] for shard in shards])
        self._shard_of = np.repeat(np.arange(len(shards), dtype=np.int32), [len(shard.lines) for shard in shards])
        self._lines = np.concatenate([shard.lines for shard in shards])
        self._trained = np.concatenate([shard.trained for shard in shards])
        self._trained_ends = np.cumsum(np.concatenate([np.diff(shard.trained_offsets) for shard in shards]))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[Ids, Mask]:
        return self.gather([index])

    def gather(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> tuple[Ids, Mask]:
        """Ids and masks of several samples end to end: a packed row."""
        at = np.asarray(indices, np.int64)
        if not ((at >= 0) & (at < len(self))).all():
            raise IndexError(f"samples {at.tolist()}: there are {len(self)}, from 0")
        lengths = self.lengths[at]
        ends = np.cumsum(lengths)
        ids = np.empty(ends[-1] if len(at) else 0, np.int32)
        memory = memoryview(ids.data).cast("B")
        places = (self._shard_of[at].tolist(), self._starts[at].tolist(), lengths.tolist(), ends.tolist())
        for shard, start, length, end in zip(*places, strict=True):
            part = memory[4 * (end - length) : 4 * end]
            if os.preadv(self._file(shard), [part], self._ids_at[shard] + 4 * start) != len(part):
                raise OSError(errno.EIO, "cut short while it was in use", str(self._paths[shard]))
        return ids, self._masks(at, ends - lengths, len(ids))

    def _masks(self, at: npt.NDArray[np.int64], begins: npt.NDArray[np.int64], total: int) -> Mask:
        """The masks of samples that begin at these places of a row of `total` tokens."""
        lasts = self._trained_ends[at]
        counts = lasts - np.where(at > 0, self._trained_ends[at - 1], 0)
        places = np.arange(counts.sum()) + np.repeat(lasts - np.cumsum(counts), counts)
        edges = self._trained[places] + np.repeat(begins, counts)
        inside = np.arange(len(edges) + 1) % 2 == 1
        return np.repeat(inside, np.diff(edges, prepend=0, append=total))

    def where(self, index: int) -> tuple[str, int]:
        """The source a sample comes from, and its 1-based line there."""
        return self.sources[self.source_of[index]].name, int(self._lines[index])

    def _file(self, shard: int) -> int:
        if (file := self._files.get(shard)) is None:
            if len(self._files) >= MOST_OPEN:
                self._files.pop(next(iter(self._files))).close()
            file = self._files[shard] = self._paths[shard].open("rb", buffering=0)
        return file.fileno()


def build_store(
    sources: Sequence[SourceConfig],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    settings: Settings,
    max_bad_fraction: float = 0.1,
    workers: int | None = None,
    console: Console | None = None,
) -> Store:
    """Open the store of a mix in `folder`; what isn't there yet is tokenised, in `workers` processes.

    workers: unset, one per CPU, 16 at the most. Others that ask for the same source meanwhile wait. Raises UserError
    for a source that can't be read or of which more than `max_bad_fraction` of the rows can't be used: what was
    tokenised stays, and so does the rejects file that the error names.
    """
    check_mix(sources)
    require(0 <= max_bad_fraction <= 1, f"max_bad_fraction={max_bad_fraction}: a share, from 0 to 1")
    count = min(_cpus(), MOST_WORKERS) if workers is None else max(1, workers)
    reports = []
    for config in sources:
        builder = _Builder(config, tokenizer, folder, settings, max_bad_fraction, count, console)
        reports.append(builder.report())
        logger.info("%s", reports[-1].summary())
    return Store(reports)


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of all that decides which ids a conversation becomes: vocabulary, merges, added tokens, template."""
    if tokenizer.is_fast:
        parts = json.loads(tokenizer.backend_tokenizer.to_str())
        del parts["padding"], parts["truncation"]  # encoding turns them off
    else:
        parts = [type(tokenizer).__name__, tokenizer.get_vocab(), repr(tokenizer.added_tokens_decoder)]
    return _hash([parts, template_hash(tokenizer)])


class _Builder:
    """One source on its way into the store."""

    def __init__(
        self,
        config: SourceConfig,
        tokenizer: PreTrainedTokenizerBase,
        folder: Path,
        settings: Settings,
        max_bad_fraction: float,
        workers: int,
        console: Console | None,
    ) -> None:
        self.source = Source(config.path, max_examples=config.max_examples)
        self.tokenizer, self.settings, self.workers, self.console = tokenizer, settings, workers, console
        self.max_bad_fraction = max_bad_fraction
        depends_on = [
            *(FORMAT, ROWS, CHARACTERS, tokenizers.__version__),
            *(self.source.fingerprint(), tokenizer_hash(tokenizer), dataclasses.asdict(settings)),
        ]
        self.folder = folder / _hash(depends_on)
        self.finished, self.rejects_file = self.folder / "source.json", self.folder / "rejects.jsonl"

    def report(self) -> SourceReport:
        """What is there, or is made now."""
        make_folder(self.folder)
        with self._lock(fcntl.LOCK_SH):
            report = self._found()
        if report is None:
            with self._lock(fcntl.LOCK_EX):
                report = self._found() or self._build()
        self._refuse_bad(report.rejects, report.rows)
        return report

    def _found(self) -> SourceReport | None:
        """The report of a source all of whose shards are there and whole."""
        try:
            found = json.loads(self.finished.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        damaged = [shard for shard in found["shards"] if not is_whole(self.folder / shard)]
        if damaged:
            logger.warning("%s: damaged, made again: %s", self.folder, ", ".join(damaged))
            return None
        return SourceReport(name=self.source.name, folder=self.folder, **{**found, "shards": tuple(found["shards"])})

    def _build(self) -> SourceReport:
        for leftover in self.folder.glob(".*.tmp"):
            leftover.unlink()
        shards = {shard_number(path.name): path.name for path in self.folder.glob("*.arrow") if is_whole(path)}
        for path in self.folder.glob("*.arrow"):
            if path.name not in shards.values():
                path.unlink()
        total = self.source.count()
        rejects: Counter[str] = Counter()
        samples = tokens = new = 0
        title = f"tokenising {self.source.name}"
        with (
            track_steps(total, title, unit="row", console=self.console) as tracker,
            contextlib.closing(self._shards(dict(shards))) as made,
        ):
            began = shown = time.monotonic()
            for name, data in made:
                if data is not None:
                    write_durably(self.folder / name, data)
                shards[shard_number(name)] = name
                facts = read_facts(self.folder / name)
                samples, tokens = samples + facts.samples, tokens + facts.tokens
                new += facts.tokens if data is not None else 0
                rejects.update(reason for _, reason, _ in facts.rejects)
                now = time.monotonic()
                if tracker.live_view or now - shown > PLAIN_SECONDS:
                    shown = now
                    tracker.update(samples + rejects.total(), {"tokens_per_second": new / (now - began)})
                if _bad(rejects) > self.max_bad_fraction * total:
                    break  # whatever follows: too many, and what was done is kept
            else:
                total = samples + rejects.total()  # blank lines were counted too
        in_order = tuple(shards[number] for number in sorted(shards))
        self._write_rejects(in_order)
        self._refuse_bad(rejects, total)
        fields: dict[str, Any] = dict(shards=in_order, samples=samples, tokens=tokens, rejects=dict(rejects))
        write_durably(self.finished, json.dumps(fields, indent=2))
        return SourceReport(name=self.source.name, folder=self.folder, **fields)

    def _shards(self, there: dict[int, str]) -> Generator[tuple[str, bytes | None], None, None]:
        """Name of every shard, in no order; its bytes, or None for one that is there already."""
        yield from ((name, None) for name in there.values())
        missing = (chunk for chunk in _chunks(self.source) if chunk[0] not in there)
        began = time.monotonic()
        for chunk in missing:
            with environment(THREADS, str(self.workers > 1).lower()):
                made = encode_chunk(self.tokenizer, chunk, self.settings)
            yield made
            if self.workers > 1 and time.monotonic() - began > IN_PLACE_SECONDS:
                break
        else:
            return
        yield from _in_processes(missing, self.tokenizer, self.settings, self.workers)

    def _write_rejects(self, shards: Iterable[str]) -> None:
        """One JSON object a line, in ASCII: what a row holds can't act on a terminal."""
        with replacing(self.rejects_file) as aside, aside.open("w", encoding="ascii") as file:
            for shard in shards:
                for line, reason, text in read_facts(self.folder / shard).rejects:
                    row = {"source": self.source.name, "line": line, "reason": reason, "excerpt": text}
                    file.write(json.dumps(row) + "\n")

    def _refuse_bad(self, rejects: Mapping[str, int], rows: int) -> None:
        bad, unreviewed = _bad(rejects), rejects.get(UNREVIEWED, 0)
        if not rows:
            raise UserError(f"source {self.source.name!r}: holds no rows")
        if bad <= self.max_bad_fraction * rows and bad + unreviewed < rows:
            return
        if bad <= self.max_bad_fraction * rows and unreviewed:
            raise UserError(
                f"source {self.source.name!r}: {unreviewed} of {rows} rows wait for review, and none is left; have "
                "them read with python -m distill review, or train on them as they are with unreviewed=keep"
            )
        common = Counter({reason: n for reason, n in rejects.items() if reason != UNREVIEWED}).most_common(3)
        with self.rejects_file.open(encoding="ascii") as file:
            example = next(row for row in map(json.loads, file) if row["reason"] == common[0][0])
        allowed = f", more than max_bad_fraction={self.max_bad_fraction:g} allows" if bad < rows else ""
        raise UserError(
            f"source {self.source.name!r}: {bad} of {rows} rows can't be used{allowed}: "
            f"{', '.join(f'{n} × {reason}' for reason, n in common)}. The first of these, line {example['line']}: "
            f"{example['excerpt'][:200]!a}. All of them, with line and reason, to repair: {self.rejects_file}"
        )

    @contextlib.contextmanager
    def _lock(self, how: int) -> Iterator[None]:
        """Hold the folder, with others (LOCK_SH) or alone (LOCK_EX); a process that dies lets go."""
        with (self.folder / "lock").open("w") as file:
            try:
                fcntl.flock(file, how | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("%s: another process tokenises it; waiting", visible(self.source.name))
                fcntl.flock(file, how)
            yield


def _chunks(rows: Iterable[Row]) -> Iterator[Chunk]:
    number, chunk, characters = 0, list[Row](), 0
    for row in rows:
        chunk.append(row)
        characters += _characters(row[1])
        if len(chunk) == ROWS or characters >= CHARACTERS:
            yield number, chunk
            number, chunk, characters = number + 1, [], 0
    if chunk:
        yield number, chunk


def _characters(value: object) -> int:
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list) else 8


def _in_processes(
    chunks: Iterator[Chunk], tokenizer: PreTrainedTokenizerBase, settings: Settings, count: int
) -> Iterator[tuple[str, bytes]]:
    """`encode_chunk` of each, in the order they are done."""
    processes: dict[Connection, subprocess.Popen[bytes]] = {}

    def send_next(pipe: Connection) -> bool:
        if (chunk := next(chunks, None)) is not None:
            pipe.send(chunk)
        return chunk is not None

    try:
        for _ in range(count):
            ours, theirs = multiprocessing.Pipe()
            with theirs:
                processes[ours] = _start_process(theirs.fileno())
        for pipe in processes:  # all start at once; the first message waits until a process has
            pipe.send((tokenizer, settings))
        busy = [pipe for pipe in processes if send_next(pipe)]
        while busy:
            for pipe in cast(list[Connection], wait(busy)):
                result = pipe.recv()
                if isinstance(result, str):
                    raise RuntimeError(f"a tokenising process failed:\n{result}")
                if not send_next(pipe):
                    busy.remove(pipe)
                yield result
    except (EOFError, ConnectionError) as error:
        raise RuntimeError("a tokenising process was killed, perhaps for want of memory; use fewer workers") from error
    finally:
        for pipe, process in processes.items():
            pipe.close()
            process.kill()
            process.wait()


def _start_process(pipe: int) -> "subprocess.Popen[bytes]":
    # A fresh interpreter: a fork would inherit locks of the tokenizer's threads. Our import path, but without the
    # current directory in front (-P). A session of its own: Ctrl-C is for the builder.
    return subprocess.Popen(
        [sys.executable, "-P", "-c", f"from sft.store import answer_chunks; answer_chunks({pipe})"],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path),
            THREADS: "false",
        },
        stdin=subprocess.DEVNULL,
        pass_fds=[pipe],
        start_new_session=True,
    )


def answer_chunks(pipe: int) -> None:
    """A tokenising process: answers each chunk with its shard, or with a traceback, until the builder is gone."""
    connection = Connection(pipe)
    with contextlib.suppress(EOFError, ConnectionError):
        tokenizer, settings = connection.recv()
        while True:
            chunk = connection.recv()
            try:
                answer: object = encode_chunk(tokenizer, chunk, settings)
            except Exception:
                answer = traceback.format_exc()
            connection.send(answer)


def _bad(rejects: Mapping[str, int]) -> int:
    """Rows that something is wrong with."""
    return sum(rejects.values()) - rejects.get(UNREVIEWED, 0)


def _hash(value: object) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
