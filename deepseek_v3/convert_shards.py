"""A folder and a direction -> the shards to write, and each of them to disk, a few rows of a tensor at a time.

What is held in memory is some million elements, however large tensors and files are. safetensors' own writer takes
all tensors of a file at once; here the header is written first, then rows in whatever order they come, and
safetensors' reader looks the file over before it gets its name.

8 bits and back: codes of 8-bit weights survive bf16 whenever each block's largest is 448, as quantising leaves it (or
all are tiny): bf16 moves value and scale by less than 1 part in 256 each, and the nearest other code is 1 in 16 away.
Scales survive exactly if 448 times the scale is a bf16 number: those made from bf16 weights are, so quantising is
idempotent on them; others move by at most 1 part in 256.
"""

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from deepseek_v3.convert_folder import DTYPES, Folder, read_header
from deepseek_v3.convert_tensors import (
    CheckpointFault,
    Placed,
    expected_tensors,
    official_layout,
    scale_of,
)
from deepseek_v3.fp8.reference import BLOCK, blocks, dequantise_weight, quantise_weight

Direction = Literal["bf16", "fp8", "official", "hf"]

ELEMENTS_AT_ONCE = 1 << 20
"""About as many, in whole blocks of rows, are read, converted and written at a time."""


@dataclass(frozen=True)
class Tensors:
    """One or two tensors of a shard, made together."""

    written: dict[str, tuple[str, tuple[int, ...]]]
    """Name -> dtype, shape."""
    rows: Callable[[], Iterator[tuple[str, int, Tensor]]]
    """(name, row, the rows from there on), in any order."""

    @property
    def bytes(self) -> int:
        return sum(_bytes(dtype, shape) for dtype, shape in self.written.values())


@dataclass(frozen=True)
class Shard:
    """A file to be written."""

    name: str
    tensors: list[Tensors]

    @property
    def bytes(self) -> int:
        return sum(tensors.bytes for tensors in self.tensors)


def plan(folder: Folder, to: Direction, *, ranks: int, shard_bytes: int) -> list[Shard]:
    """Which tensors go to which file; the same for the same folder, so that a conversion can be taken up again."""
    if to == "official":
        layout = official_layout(folder.config, folder.expected, ranks)
        by_rank: list[list[Tensors]] = [[] for _ in range(ranks)]
        for name in folder.held:
            for part, rank in enumerate(layout[name].ranks):
                by_rank[rank].append(_part(folder, name, layout[name], part))
        return [Shard(f"model{rank}-mp{ranks}.safetensors", tensors) for rank, tensors in enumerate(by_rank)]
    tensors = [_as_they_are(folder, name) for name in folder.held] if to == "hf" else _in_dtype(folder, fp8=to == "fp8")
    filled: list[list[Tensors]] = [[]]
    size = 0
    for one in tensors:
        if filled[-1] and size + one.bytes > shard_bytes:
            filled.append([])
            size = 0
        filled[-1].append(one)
        size += one.bytes
    return [Shard(f"model-{i:05d}-of-{len(filled):05d}.safetensors", part) for i, part in enumerate(filled, start=1)]


def write_shard(path: Path, shard: Shard, done: Callable[[int], object]) -> None:
    """Write a file aside, have safetensors' reader check it, and rename it. `done` is told the bytes as they come."""
    written = {name: of for tensors in shard.tensors for name, of in tensors.written.items()}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    end = sofar = 0
    # The widest dtype first: readers want every tensor aligned to its elements.
    for name, (dtype, shape) in sorted(written.items(), key=lambda item: -DTYPES[item[1][0]].itemsize):
        offsets[name], end = end, end + _bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offsets[name], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as aside:
        with aside.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for tensors in shard.tensors:
                for name, row, rows in tensors.rows():
                    data = rows.contiguous().view(torch.uint8).numpy().data
                    file.seek(8 + len(text) + offsets[name] + row * (rows.nbytes // len(rows)))
                    file.write(data)
                    done(rows.nbytes)
                    sofar += rows.nbytes
        assert sofar == end, f"{path}: {sofar} of {end} bytes were made"
        try:
            whole = {held.name: (held.dtype, held.shape) for held in read_header(aside)} == written
        except SafetensorError as error:
            raise OSError(errno.EIO, f"what was written can't be read back ({error})", str(path)) from error
        if not whole:
            raise OSError(errno.EIO, "what was written reads back otherwise", str(path))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` for the block to write: then fsynced and renamed over it, and the folder fsynced."""
    aside = path.with_name(f".{path.name}.tmp")
    try:
        yield aside
        _fsync(aside)
        aside.replace(path)
        _fsync(path.parent)
    except OSError as error:
        error.filename = error.filename or str(path)  # a failing write() names no file
        raise
    finally:
        aside.unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return DTYPES[dtype].itemsize * torch.Size(shape).numel()


def _stretches(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """The rows of a tensor in stretches of about ELEMENTS_AT_ONCE elements, and of whole blocks."""
    step = max(1, ELEMENTS_AT_ONCE // torch.Size(shape[1:]).numel() // BLOCK) * BLOCK
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def _as_they_are(folder: Folder, name: str) -> Tensors:
    dtype, shape = folder.held[name][0].dtype, folder.expected[name].shape
    return Tensors({name: (dtype, shape)}, lambda: ((name, a, folder.rows(name, a, b)) for a, b in _stretches(shape)))


def _part(folder: Folder, name: str, placed: Placed, part: int) -> Tensors:
    """A rank's part of a tensor."""
    shape = placed.part(folder.expected[name].shape)
    first = part * shape[placed.dim] if placed.dim is not None else 0

    def rows() -> Iterator[tuple[str, int, Tensor]]:
        for start, stop in _stretches(shape):
            if placed.dim == 1:
                yield placed.name, start, folder.rows(name, start, stop)[:, first : first + shape[1]]
            else:
                yield placed.name, start, folder.rows(name, first + start, first + stop)

    return Tensors({placed.name: (folder.held[name][0].dtype, shape)}, rows)


def _in_dtype(folder: Folder, *, fp8: bool) -> Iterator[Tensors]:
    """Every tensor as an FP8 or a bf16 checkpoint has it."""
    expected = expected_tensors(folder.config, fp8=fp8)
    for name in folder.held:
        if name not in expected:  # a scale, on the way to bf16
            continue
        parts = [part for part in (name, scale_of(name)) if part in expected]
        written = {part: (expected[part].dtypes[0], expected[part].shape) for part in parts}
        yield Tensors(written, partial(_converted, folder, name, written))


def _converted(
    folder: Folder, name: str, written: dict[str, tuple[str, tuple[int, ...]]]
) -> Iterator[tuple[str, int, Tensor]]:
    dtype, shape = written[name]
    scale = scale_of(name)
    for start, stop in _stretches(shape):
        w = folder.rows(name, start, stop)
        block = start // BLOCK
        try:
            if scale in written:
                q, scale_inv = quantise_weight(w)
                yield name, start, q
                yield scale, block, scale_inv
                continue
            if scale in folder.held:
                w = dequantise_weight(w, folder.rows(scale, block, blocks(stop)))
            if not torch.stack(w.aminmax()).isfinite().all():
                raise ValueError("inf or NaN")
        except ValueError as error:
            raise CheckpointFault(
                f"{folder.held[name][0].file}: {name}, rows {start} to {stop - 1}: {error}; "
                "download the file again, or find out what training made of it"
            ) from error
        yield name, start, w.to(DTYPES[dtype])
