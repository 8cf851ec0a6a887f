"""Raw rows -> a shard: an Arrow IPC file with the token ids and masks of those that became samples, and back.

A shard's columns are `ids`, `trained` (where each stretch of targets begins and ends, in tokens of the sample) and
`line`; the rows that couldn't be used are in its metadata. Its name holds its number and the hash of its bytes, so that
a file found under it is whole and right, or isn't used. Left out: which shards there are (sft/store.py).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash
from transformers import PreTrainedTokenizerBase

from runtime.errors import UserError
from runtime.rows import BadRow, excerpt
from runtime.settings import require
from sft.chat import Sample, Turns, encode_conversations, encode_example
from sft.sources import Text, conversation

BATCH = 128
"""Rows that are encoded at once; ids are Python's integers meanwhile, nine times their size here."""

Ids = npt.NDArray[np.int32]
Row = tuple[int, object]
"""Line in the source, and the row as it stands there: bytes of JSON or an object."""
Chunk = tuple[int, list[Row]]
"""Number of the shard, and its rows."""
Reject = tuple[int, str, str]
"""Line, reason, excerpt."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What samples depend on besides rows and tokenizer."""

    max_length: int
    """Most tokens of a sample."""
    train_turns: Turns = "all"
    """Of a conversation, train every assistant turn or the last one."""
    too_long: Literal["reject", "truncate"] = "reject"
    """Longer samples: "reject" sets them aside, "truncate" cuts them, which takes from a reasoning trace its answer and
    the end token and so teaches never to finish."""
    unreviewed: Literal["reject", "keep"] = "reject"
    """Rows whose column `reviewed` is false: "reject" sets them aside."""

    def __post_init__(self) -> None:
        require(self.max_length >= 2, f"max_length={self.max_length}: a sample has a prompt and a target: at least 2")


def encode_chunk(tokenizer: PreTrainedTokenizerBase, chunk: Chunk, settings: Settings) -> tuple[str, bytes]:
    """A shard's name and bytes, a pure function of its arguments."""
    number, rows = chunk
    samples: list[tuple[Ids, list[int]]] = []
    lines: list[int] = []
    rejects: list[Reject] = []
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        for (line, raw), made in zip(batch, _samples(tokenizer, [raw for _, raw in batch], settings), strict=True):
            if isinstance(made, _Bad):
                rejects.append((line, made.reason, made.detail + excerpt(raw)))
            else:
                samples.append((np.array(made[0], np.int32), _stretches(made[1])))
                lines.append(line)
    return write_shard(number, samples, lines, rejects)


def _stretches(trained: Sequence[bool]) -> list[int]:
    """Begin and end, begin and end, ... of what is trained."""
    mask, found, end = bytes(trained), list[int](), 0
    while (begin := mask.find(1, end)) >= 0:
        end = mask.find(0, begin)
        end = len(mask) if end < 0 else end
        found += [begin, end]
    return found


def write_shard(
    number: int, samples: Sequence[tuple[Ids, list[int]]], lines: Sequence[int], rejects: Sequence[Reject] = ()
) -> tuple[str, bytes]:
    """Name and bytes of a shard with these samples: ids, and where their stretches of targets begin and end."""
    offsets = np.cumsum([0, *(len(ids) for ids, _ in samples)], dtype=np.int32)
    columns = {
        "ids": pa.ListArray.from_arrays(offsets, np.concatenate([np.empty(0, np.int32), *(ids for ids, _ in samples)])),
        "trained": pa.array([stretches for _, stretches in samples], pa.list_(pa.int32())),
        "line": pa.array(lines, pa.int64()),
    }
    batch = pa.record_batch(columns).replace_schema_metadata({"rejects": json.dumps(rejects)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    data = sink.getvalue().to_pybytes()
    return f"{number:06d}-{xxhash.xxh3_128_hexdigest(data)}.arrow", data


class _Bad(NamedTuple):
    """Why a row is no sample."""

    reason: str
    detail: str = ""
    """What to show before the row."""


def _samples(tokenizer: PreTrainedTokenizerBase, rows: Sequence[object], settings: Settings) -> list[Sample | _Bad]:
    """What each raw row becomes."""
    samples: dict[int, Sample | _Bad] = {}
    conversations: dict[Turns, dict[int, list[dict[str, Any]]]] = {"all": {}, "last": {}}
    for i, row in enumerate(rows):
        try:
            example = conversation(row, unreviewed=settings.unreviewed)
        except BadRow as bad:
            samples[i] = _Bad(bad.reason)
            continue
        if isinstance(example, Text):
            samples[i] = encode_example(tokenizer, example.prompt, example.completion)
        else:
            turns = example.train_turns if settings.train_turns == "all" else "last"
            conversations[turns][i] = example.messages
    for turns, these in conversations.items():
        samples.update(zip(these, _encode(tokenizer, list(these.values()), turns), strict=True))
    return [_fitted(samples[i], settings) for i in range(len(rows))]


def _encode(
    tokenizer: PreTrainedTokenizerBase, conversations: list[list[dict[str, Any]]], turns: Turns
) -> Sequence[Sample | _Bad]:
    try:
        return encode_conversations(tokenizer, conversations, train_turns=turns)
    except UserError as error:
        if len(conversations) == 1:
            return [_Bad("the chat template refuses it", f"{error}: ")]
        return [sample for one in conversations for sample in _encode(tokenizer, [one], turns)]


def _fitted(sample: Sample | _Bad, settings: Settings) -> Sample | _Bad:
    if isinstance(sample, _Bad):
        return sample
    ids, trained = sample
    if len(ids) > settings.max_length:
        if settings.too_long == "reject":
            return _Bad(f"longer than {settings.max_length} tokens")
        ids, trained = ids[: settings.max_length], trained[: settings.max_length]
    return (ids, trained) if any(trained) else _Bad("no trained token")


class Index(NamedTuple):
    """Where the samples of a shard are, n of them."""

    ids_at: int
    """Byte of the file where the ids of all begin, end to end."""
    offsets: Ids
    """(n + 1,) where each sample begins, in tokens."""
    trained: Ids
    """Begin and end of every stretch of targets, in tokens of its sample."""
    trained_offsets: Ids
    """(n + 1,) where each sample's begin in `trained`."""
    lines: npt.NDArray[np.int64]
    """(n,) line in the source."""


class Facts(NamedTuple):
    """What a shard says of itself."""

    samples: int
    """Rows that became samples."""
    tokens: int
    """Of all samples."""
    rejects: list[Reject]
    """Rows that didn't."""


def read_index(path: Path) -> Index:
    """Where to find the samples of a shard."""
    with pa.memory_map(str(path)) as file:
        begins = file.read_buffer(1).address
        ids, trained, lines = pa.ipc.open_file(file).get_batch(0).columns
        ids_at = ids.values.buffers()[1].address - begins
        arrays = (ids.offsets, trained.values, trained.offsets, lines)
        return Index(ids_at, *(array.to_numpy().copy() for array in arrays))


def read_facts(path: Path) -> Facts:
    """How much a shard holds, and what it doesn't."""
    with pa.memory_map(str(path)) as file:
        batch = pa.ipc.open_file(file).get_batch(0)
        return Facts(batch.num_rows, len(batch.column("ids").values), json.loads(batch.schema.metadata[b"rejects"]))


def shard_number(name: str) -> int:
    """Its place among the shards of a source."""
    return int(name.split("-")[0])


def is_whole(path: Path) -> bool:
    """Whether a shard is there with the bytes that its name promises."""
    digest = xxhash.xxh3_128()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    except FileNotFoundError:
        return False
    return path.stem.endswith(f"-{digest.hexdigest()}")
