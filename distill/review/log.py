"""What reviewers decide -> a file to which lines are only ever added, and back; a line is on disk before it counts.

A line is a JSON object in ASCII whose last field is the CRC-32 of all before it: what a kill or a power cut left
unfinished is known and cut off, and damage before the end is an error. One process at a time writes.
"""

import fcntl
import json
import logging
import os
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, TypeAlias

from runtime.errors import UserError
from runtime.failpoints import failpoint
from runtime.files import fsync, make_folder, write_all, writing

logger = logging.getLogger(__name__)

Action: TypeAlias = Literal["accept", "edit", "reject", "undo"]
CRC = b', "crc": "'


@dataclass(frozen=True, kw_only=True)
class Record:
    """One line of the log."""

    number: int
    """1, 2, ... without a gap."""
    key: str
    """Of the submission: the same key again is the same submission."""
    time: str
    """UTC, ISO 8601."""
    reviewer: str
    row: str
    """The row's id."""
    digest: str
    """Of the prompt and the answer that were judged (Item.digest)."""
    action: Action
    text: str | None = None
    """Of an edit: the answer as the reviewer wants it."""
    diff: str | None = None
    """Of an edit: what changed, as a unified diff."""
    undoes: int | None = None
    """Of an undo: number of the record that no longer counts."""
    source: str = "page"
    """Where it was decided."""


class Log:
    """Context manager: the log, open for this process alone. `records` are those that are on disk."""

    def __init__(self, path: Path) -> None:
        """Open or begin a log. Raises UserError where another process has it open or a line is damaged."""
        self.path = path
        with writing(path):
            make_folder(path.parent)
            self._file = path.open("ab", buffering=0)
            try:
                self.records, self._end = self._take()
            except BaseException:
                self._file.close()
                raise

    def _take(self) -> tuple[list[Record], int]:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{self.path}: another process has it open; stop that review, or use its page") from error
        fsync(self.path.parent)
        data = self.path.read_bytes()
        records, end = _parse(data, self.path)
        if end < len(data):
            logger.warning("%s: cut off %d bytes of a decision that was never saved", self.path, len(data) - end)
            os.ftruncate(self._file.fileno(), end)
            os.fsync(self._file.fileno())
        return records, end

    def append(self, record: Record) -> None:
        """Add a record; when this returns it is on disk. Raises DiskError, and then it doesn't count."""
        line = _line(record)
        with writing(self.path):
            os.ftruncate(self._file.fileno(), self._end)  # what a full disk left of the last attempt
            failpoint("review/before-write")
            write_all(self._file, line)
            failpoint("review/before-fsync")
            os.fsync(self._file.fileno())
        self._end += len(line)
        self.records.append(record)
        failpoint("review/saved")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()


def read_log(path: Path) -> list[Record]:
    """The records of a log, also of one that is being written; none where there is no file."""
    try:
        return _parse(path.read_bytes(), path)[0]
    except FileNotFoundError:
        return []


def _line(record: Record) -> bytes:
    body = json.dumps({key: value for key, value in asdict(record).items() if value is not None})[:-1].encode()
    return body + CRC + f'{zlib.crc32(body):08x}"}}\n'.encode()


def _parse(data: bytes, path: Path) -> tuple[list[Record], int]:
    """The records, and where the last one ends: behind it is at most an unfinished line."""
    records: list[Record] = []
    *lines, _ = data.split(b"\n")
    for line in lines:
        body, _, crc = line.rpartition(CRC)
        if crc != f'{zlib.crc32(body):08x}"}}'.encode():
            raise _damage(path, len(records) + 1, "its checksum is wrong")
        fields = json.loads(body + b"}")
        if fields.get("number") != len(records) + 1:
            raise _damage(path, len(records) + 1, f"it has number {fields.get('number')}")
        records.append(Record(**fields))
    return records, sum(len(line) + 1 for line in lines)


def _damage(path: Path, line: int, what: str) -> UserError:
    return UserError(
        f"{path}: line {line} is damaged: {what}; put back a copy, or go on without the rest: head -n {line - 1}"
    )
