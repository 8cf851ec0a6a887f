"""Seconds from lengths to packed rows for 1.5M examples, fill, and memory: ours against `trl.pack_dataset`.

    python -m benchmarks.packing [--examples 1500000] [--rounds 7]

Lengths are those of a mix: seven in ten log-normal around 250 tokens (instructions and chat), three in ten around 900
(worked reasoning), cut at 4096. Ids are random. Ours: the epoch is drawn from the store, planned, and every packed row
gathered, ids and mask. TRL's: `pack_dataset` by "bfd", with the number of processes and the batch size that are fastest
here, of the ids and labels, as its trainer packs them, and of the ids alone; its rows come to lie on disk. Two times
are taken: until any row can be asked for, which to ours is the plan and to TRL all of `pack_dataset`; and until every
row was read once as arrays. Everyone finds what it reads in the system's cache. All must hold every example once, or
nothing is timed. The exit code is 1 for that, for a fill below 99.5 %, and for more than 2 GiB of resident memory above
what ours held before it opened the store.
"""

import argparse
import hashlib
import itertools
import resource
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from benchmarks._common import Contestant, Turns, alternate, ratio, setting, spread, table, timed
from benchmarks.head import peak, reset_peak

ROW_LENGTH = 4096
MOST_MEMORY = 2 << 30
LEAST_FILL = 0.995
AT_ONCE = 8192
"""Examples of a shard, and of a batch of TRL's file."""
ROWS_AT_ONCE = 64
"""Rows that ours gathers with one call, 1 MB of ids."""


class Turn(NamedTuple):
    """What one turn took."""

    seconds: float
    cpu_seconds: float
    """Of all its threads and processes: what a busy machine leaves alone."""
    held: int
    """Most bytes of memory until now, above those before the first."""
    packing: float
    """Of the seconds, those until any row can be asked for."""


def cpu_seconds() -> float:
    """Of this process so far, with those of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in used)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=1_500_000)
    parser.add_argument("--threads", type=int, default=2, help="most processes of TRL's; ours has one thread")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    print(f"{setting(args.threads, 'trl', 'datasets', 'pyarrow', 'numpy')}  ", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokens = generate(folder, args.examples)
        print(f"{args.examples:,} examples, {tokens:,} tokens, rows of {ROW_LENGTH}", end="; ", flush=True)
        contestants: list[Contestant] = []
        try:
            contestants.append(Contestant("ours", serve_ours, folder, threads=1))
            for system, columns in (("TRL", ["input_ids", "labels"]), ("TRL, ids only", ["input_ids"])):
                peer = Contestant(system, serve_trl, folder, args.threads, columns, threads=args.threads)
                contestants.append(peer)
            return compare(contestants, args.rounds)
        finally:
            for contestant in contestants:
                contestant.close()


def compare(contestants: list[Contestant], rounds: int) -> int:
    """Parity, then times; prints the table."""
    made = {contestant.name: contestant.turn("check") for contestant in contestants}
    if len({checked["examples"] for checked in made.values()}) > 1:
        print("parity: they don't hold the same examples")
        return 1
    print(f"all in each; {'; '.join(c.ready['chose'] for c in contestants)}\n", flush=True)
    turns: dict[str, list[Turn]] = {name: [] for name in made}
    for r, these in groupby(alternate(contestants, rounds), key=lambda turn: turn[0]):
        for _, contestant in these:
            turns[contestant.name].append(contestant.turn("time"))
        print(f"round {r + 1} of {rounds}", file=sys.stderr)
    seconds = {name: [turn.seconds for turn in taken] for name, taken in turns.items()}
    peak_bytes = {name: max(turn.held for turn in taken) for name, taken in turns.items()}
    packing = {name: [turn.packing for turn in taken] for name, taken in turns.items()}
    rows = [
        [
            name,
            spread(packing[name], ".2f"),
            "1" if name == "ours" else ratio(packing["ours"], packing[name]),
            spread(taken, ".1f"),
            "1" if name == "ours" else ratio(seconds["ours"], taken),
            spread([turn.cpu_seconds for turn in turns[name]], ".1f"),
            f"{made[name]['fill']:.2%}",
            f"{peak_bytes[name] / 2**20:,.0f}",
        ]
        for name, taken in seconds.items()
    ]
    times = ["packed, s", "times ours", "and all rows read, s", "times ours"]
    print(table(["system", *times, "CPU seconds", "fill", "peak MiB above imports"], rows))
    failed = [
        *(["fill"] if made["ours"]["fill"] < LEAST_FILL else []),
        *(["memory"] if peak_bytes["ours"] > MOST_MEMORY else []),
    ]
    print("".join(f"\nours misses the bound on {name}" for name in failed), end="")
    return int(bool(failed))


def warm(paths: Iterable[Path]) -> None:
    """Have the system cache files."""
    for path in paths:
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


def serve_ours(turns: Turns, folder: Path) -> None:
    """Answers "time" with seconds, bytes held at the most, seconds of planning; "check" with examples and fill."""
    from sft.mix import SourceConfig, epoch_examples
    from sft.pack import Plan, plan_rows
    from sft.store import SourceReport, Store

    shards = tuple(sorted(path.name for path in folder.glob("*.arrow")))
    samples = int((folder / "samples").read_text())
    report = SourceReport(name="generated", folder=folder, shards=shards, samples=samples, tokens=0, rejects={})
    before = reset_peak()
    store = Store([report])

    def plan() -> tuple[Plan, Any]:
        examples = epoch_examples([SourceConfig(path="generated")], store.sizes, seed=0, epoch=0)
        return plan_rows(store.lengths[examples], ROW_LENGTH), examples

    def rows(plan: Plan, examples: Any) -> Iterator[tuple[Any, Any]]:
        """Ids and mask of each."""
        for first in range(0, len(plan), ROWS_AT_ONCE):
            starts = plan.starts[first : first + ROWS_AT_ONCE + 1]
            numbers = examples[plan.samples[starts[0] : starts[-1]]]
            ids, trained = store.gather(numbers)
            ends = np.concatenate([[0], np.cumsum(store.lengths[numbers])])[starts - starts[0]].tolist()
            for begin, end in itertools.pairwise(ends):
                yield ids[begin:end], trained[begin:end]

    turns.answer({"chose": "ours with one thread"})
    for request in turns:
        warm(folder.glob("*.arrow"))
        began, used = time.perf_counter(), cpu_seconds()
        planned, (planning, examples) = timed(plan)
        if request == "time":
            for _ in rows(planning, examples):
                pass
            turns.answer(Turn(time.perf_counter() - began, cpu_seconds() - used, peak() - before, planned))
            continue
        lengths = store.lengths[examples]
        packed = ((ids, lengths[planning.row(row)]) for row, (ids, _) in enumerate(rows(planning, examples)))
        turns.answer({"examples": fingerprint(packed), "fill": planning.fill})


def serve_trl(turns: Turns, folder: Path, most: int, columns: list[str]) -> None:
    """The same, with the fastest settings."""
    import datasets
    from trl import pack_dataset

    datasets.disable_progress_bars()
    datasets.disable_caching()
    dataset = datasets.Dataset.from_file(str(folder / "trl.stream")).select_columns(columns)
    before = reset_peak()

    def pack(rows: Any, **settings: Any) -> Any:
        return pack_dataset(rows, ROW_LENGTH, "bfd", settings)

    choices = list(itertools.product((None, *range(2, most + 1)), (1000, 10_000)))
    some = dataset.select(range(min(100_000, len(dataset))))
    took = {
        (processes, size): timed(lambda p=processes, s=size: pack(some, num_proc=p, batch_size=s))[0]
        for processes, size in choices
    }
    processes, size = min(took, key=lambda choice: took[choice])
    turns.answer({"chose": f"pack_dataset with num_proc={processes}, batch_size={size}"})
    for request in turns:
        warm([folder / "trl.stream"])
        began, used = time.perf_counter(), cpu_seconds()
        seconds, packed = timed(lambda: pack(dataset, num_proc=processes, batch_size=size))
        if request == "time":
            for part in packed.with_format("arrow").iter(batch_size=ROWS_AT_ONCE):
                for column in columns:
                    part[column].combine_chunks().flatten().to_numpy()
            turns.answer(Turn(time.perf_counter() - began, cpu_seconds() - used, peak() - before, seconds))
            forget(packed)
            continue
        tables = packed.with_format("arrow").iter(batch_size=1000)
        parts = ((part["input_ids"].combine_chunks(), part["seq_lengths"].combine_chunks()) for part in tables)
        examples = fingerprint((ids.flatten().to_numpy(), lengths.flatten().to_numpy()) for ids, lengths in parts)
        tokens = pc.sum(pc.list_value_length(dataset.data["input_ids"])).as_py()
        turns.answer({"examples": examples, "fill": tokens / len(packed) / ROW_LENGTH})
        forget(packed)


def forget(packed: Any) -> None:
    """Free the disk of what was packed."""
    for file in packed.cache_files:
        Path(file["filename"]).unlink(missing_ok=True)


def fingerprint(rows: Iterable[tuple[Any, Any]]) -> str:
    """Hash of all examples in whichever order they come: of each its length, and two sums of its ids."""
    seen = []
    for ids, lengths in rows:
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        places = np.arange(len(ids)) - np.repeat(starts, lengths)
        wide = ids.astype(np.int64)
        seen.append(np.stack([lengths, np.add.reduceat(wide, starts), np.add.reduceat(wide * places, starts)]))
    found = np.concatenate(seen, axis=1).astype(np.int64)
    return hashlib.sha256(found[:, np.lexsort(found)].tobytes()).hexdigest()


def generate(folder: Path, examples: int) -> int:
    """Write the examples as shards and as one Arrow stream for `datasets`; returns the number of their tokens."""
    from sft.shards import write_shard

    chance = np.random.default_rng(0)
    typical = np.where(chance.random(examples) < 0.7, 250, 900)
    lengths = np.clip(typical * chance.lognormal(0, 0.9, examples), 16, ROW_LENGTH).astype(np.int64)
    schema = pa.schema({"input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int64())})
    with pa.ipc.new_stream(folder / "trl.stream", schema) as stream:
        for number, start in enumerate(range(0, examples, AT_ONCE)):
            these = lengths[start : start + AT_ONCE]
            ids = chance.integers(0, 129_280, these.sum(), dtype=np.int32)
            offsets = np.concatenate([[0], np.cumsum(these)])
            places = np.arange(len(ids)) - np.repeat(offsets[:-1], these)
            trained = places >= np.repeat(these // 5, these)
            stretches = [[length // 5, length] for length in these.tolist()]
            samples = list(zip(np.split(ids, offsets[1:-1]), stretches, strict=True))
            name, data = write_shard(number, samples, range(start + 1, start + 1 + len(these)))
            (folder / name).write_bytes(data)
            labels = np.where(trained, ids, -100).astype(np.int64)
            lists = [pa.ListArray.from_arrays(offsets.astype(np.int32), values) for values in (ids, labels)]
            stream.write_batch(pa.record_batch(lists, schema=schema))
    (folder / "samples").write_text(str(examples))
    return int(lengths.sum())


if __name__ == "__main__":
    sys.exit(main())
