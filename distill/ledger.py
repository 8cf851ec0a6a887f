"""Everything a run has found out, in one SQLite file: what is committed is never lost, and never made again.

Problems, and rows that are set aside, are written once, before anybody is asked; then samples, their findings and the
choices among them, in this order and by one process, each in a transaction that is on the disk when the call returns.
Whatever its key says is missing is what a resumed run still has to do. Left out: people's decisions about a row
(distill/review), which are theirs to keep.
"""

import contextlib
import errno
import json
import os
import shutil
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

from distill.problems import Aside
from distill.types import Choice, Finding, Key, Problem, Sample, Teacher
from runtime.errors import DiskError, UserError
from runtime.failpoints import failpoint

FORMAT = 1
SCHEMA = """
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE aside (source TEXT NOT NULL, line INTEGER NOT NULL, reason TEXT NOT NULL, detail TEXT NOT NULL);
CREATE TABLE problems (id TEXT NOT NULL UNIQUE, position INTEGER PRIMARY KEY, domain TEXT NOT NULL,
    prompt TEXT NOT NULL, answer TEXT NOT NULL, response TEXT, columns TEXT NOT NULL);
CREATE TABLE teachers (id TEXT PRIMARY KEY, model TEXT NOT NULL, weights_hash TEXT, settings TEXT NOT NULL);
CREATE TABLE samples (problem INTEGER NOT NULL REFERENCES problems, kind TEXT NOT NULL, number INTEGER NOT NULL,
    text TEXT NOT NULL, tokens INTEGER NOT NULL, finish_reason TEXT NOT NULL, seed INTEGER NOT NULL,
    teacher TEXT NOT NULL REFERENCES teachers, error TEXT NOT NULL, PRIMARY KEY (problem, kind, number));
CREATE TABLE findings (problem INTEGER NOT NULL, kind TEXT NOT NULL, number INTEGER NOT NULL,
    outcome TEXT NOT NULL, reason TEXT NOT NULL, answer TEXT, complaints TEXT NOT NULL, score REAL,
    detail TEXT NOT NULL, PRIMARY KEY (problem, kind, number),
    FOREIGN KEY (problem, kind, number) REFERENCES samples);
CREATE TABLE choices (problem INTEGER NOT NULL, kind TEXT NOT NULL, number INTEGER NOT NULL,
    kept INTEGER NOT NULL, reason TEXT NOT NULL, PRIMARY KEY (problem, kind, number),
    FOREIGN KEY (problem, kind, number) REFERENCES findings);
CREATE TABLE retried (problem INTEGER NOT NULL, kind TEXT NOT NULL, number INTEGER NOT NULL, error TEXT NOT NULL);
"""
KEY = ("problem", "kind", "number")
AS_JSON = ("prompt", "columns", "settings", "complaints")
"""Fields kept as JSON; tables have the order of their dataclass's fields."""
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Row:
    """An answer with all that is known of it."""

    problem: Problem
    sample: Sample
    teacher: Teacher
    finding: Finding | None
    choice: Choice | None


class Place(NamedTuple):
    """What is planned by, for every problem."""

    position: int
    domain: str
    answered: bool
    """Whether it came with an answer."""


class Ledger:
    """The open file. Its one writer holds the lock of the run folder."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        """Raises UserError for a file that isn't there (to read), or is no ledger of this format."""
        self.path = path
        if read_only and not path.is_file():
            raise UserError(f"{path}: no such ledger; give the run folder of python -m recipes.distill")
        with self._faults():
            mode = "ro" if read_only else "rwc"
            uri = f"{path.absolute().as_uri()}?mode={mode}"
            self._db = sqlite3.connect(uri, uri=True, isolation_level=None)
            try:
                self._db.execute("PRAGMA foreign_keys = ON")
                if not read_only:
                    self._db.execute("PRAGMA journal_mode = WAL")
                    self._db.execute("PRAGMA synchronous = FULL")
                self._check_format(read_only)
            except BaseException:
                self._db.close()
                raise

    def _check_format(self, read_only: bool) -> None:
        (version,) = self._one("PRAGMA user_version")
        if version == 0 and not read_only:
            self._db.executescript(f"BEGIN IMMEDIATE; {SCHEMA} PRAGMA user_version = {FORMAT}; COMMIT;")
        elif version != FORMAT:
            raise UserError(f"{self.path}: a ledger of format {version}, not {FORMAT}; use another --run_dir")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._db.close()

    # Once, at the beginning.

    def begin(self, settings: Mapping[str, Any], problems: Sequence[Problem], aside: Sequence[Aside]) -> None:
        """Write down what the run is about."""
        with self._transaction("begin"):
            values = [(name, json.dumps(value, sort_keys=True)) for name, value in settings.items()]
            self._insert("settings", values)
            self._insert("aside", [_encoded(row) for row in aside])
            self._insert("problems", [_encoded(problem) for problem in problems])

    def settings(self) -> dict[str, Any]:
        """Those of the first start; empty before it."""
        return {name: json.loads(value) for name, value in self._all("SELECT name, value FROM settings ORDER BY name")}

    def aside(self) -> dict[str, int]:
        """How many rows were set aside, by reason."""
        return dict(self._all("SELECT reason, count(*) FROM aside GROUP BY reason ORDER BY count(*) DESC, reason"))

    def places(self) -> list[Place]:
        """Every problem, in the order of their positions."""
        rows = self._all("SELECT position, domain, response IS NOT NULL FROM problems ORDER BY position")
        return [Place(position, domain, bool(answered)) for position, domain, answered in rows]

    # As the run goes on.

    def add_teacher(self, teacher: Teacher) -> None:
        """Before its first sample; again is no matter."""
        if teacher.id not in self.teachers():
            with self._transaction("teacher"):
                self._insert("teachers", [_encoded(teacher)])

    def add_samples(self, samples: Sequence[Sample]) -> None:
        """From then on these are never made again."""
        with self._transaction("samples"):
            self._insert("samples", [_encoded(sample) for sample in samples])

    def add_findings(self, findings: Mapping[Key, Finding]) -> None:
        """What graders found."""
        with self._transaction("findings"):
            self._insert("findings", [(*key, *_encoded(finding)) for key, finding in findings.items()])

    def add_choices(self, choices: Mapping[Key, Choice]) -> None:
        """What is kept, and why the rest isn't."""
        with self._transaction("choices"):
            self._insert("choices", [(*key, *_encoded(choice)) for key, choice in choices.items()])

    def forget_unknown(self) -> tuple[int, int]:
        """Make room for another try: (answers that a teacher didn't give, answers that no grader could judge)."""
        failed = "SELECT problem, kind, number FROM samples WHERE finish_reason = 'error'"
        unknown = "SELECT problem, kind, number FROM findings WHERE outcome = 'unknown' AND reason <> 'not-graded'"
        with self._transaction("forget"):
            # A choice is among all answers of a kind.
            affected = f"SELECT problem, kind FROM ({failed} UNION {unknown})"
            self._db.execute(f"DELETE FROM choices WHERE (problem, kind) IN ({affected})")
            self._db.execute(f"DELETE FROM findings WHERE (problem, kind, number) IN ({failed})")
            ungraded = self._db.execute(f"DELETE FROM findings WHERE (problem, kind, number) IN ({unknown})").rowcount
            why = "SELECT problem, kind, number, error FROM samples WHERE finish_reason = 'error'"
            self._db.execute(f"INSERT INTO retried {why}")
            unanswered = self._db.execute("DELETE FROM samples WHERE finish_reason = 'error'").rowcount
        return unanswered, ungraded

    # What is there.

    def problems(self, positions: Sequence[int]) -> list[Problem]:
        """In the order of their positions."""
        return [_decoded(Problem, row) for row in self._at("problems", positions)]

    def samples(self, positions: Sequence[int]) -> dict[Key, Sample]:
        """Every answer to these problems, in the order of their keys."""
        return {row[:3]: _decoded(Sample, row) for row in self._at("samples", positions)}

    def findings(self, positions: Sequence[int]) -> dict[Key, Finding]:
        """What was found about answers to these problems."""
        return {row[:3]: _decoded(Finding, row[3:]) for row in self._at("findings", positions)}

    def choices(self, positions: Sequence[int]) -> dict[Key, Choice]:
        """What was chosen among answers to these problems."""
        return {row[:3]: _decoded(Choice, row[3:]) for row in self._at("choices", positions)}

    def settled(self) -> dict[int, int]:
        """Position -> how many of its answers were chosen among."""
        return dict(self._all("SELECT problem, count(*) FROM choices GROUP BY problem"))

    def teachers(self) -> dict[str, Teacher]:
        """By id, in its order."""
        return {row[0]: _decoded(Teacher, row) for row in self._all("SELECT * FROM teachers ORDER BY id")}

    def retried(self, key: Key) -> list[str]:
        """Why earlier tries at an answer failed."""
        rows = self._all("SELECT error FROM retried WHERE (problem, kind, number) = (?, ?, ?) ORDER BY rowid", key)
        return [error for (error,) in rows]

    def rows(self, where: str = "TRUE", values: Sequence[Any] = ()) -> Iterator[Row]:
        """Every answer with all that is known of it, by position, kind and index. where: an SQL condition."""
        teachers = self.teachers()
        query = f"""
            SELECT p.*, s.*, f.outcome, f.reason, f.answer, f.complaints, f.score, f.detail, c.kept, c.reason
            FROM problems p JOIN samples s ON s.problem = p.position
            LEFT JOIN findings f ON (f.problem, f.kind, f.number) = (s.problem, s.kind, s.number)
            LEFT JOIN choices c ON (c.problem, c.kind, c.number) = (s.problem, s.kind, s.number)
            WHERE {where} ORDER BY s.problem, s.kind, s.number"""
        with self._faults():
            for row in self._db.execute(query, values):
                sample, finding, choice = _decoded(Sample, row[7:16]), row[16:22], row[22:]
                yield Row(
                    problem=_decoded(Problem, row[:7]),
                    sample=sample,
                    teacher=teachers[sample.teacher],
                    finding=None if finding[0] is None else _decoded(Finding, finding),
                    choice=None if choice[0] is None else _decoded(Choice, choice),
                )

    def find(self, problem: str, kind: str, index: int) -> Row | None:
        """The answer of that name."""
        return next(self.rows("p.id = ? AND s.kind = ? AND s.number = ?", (problem, kind, index)), None)

    # SQL.

    @contextlib.contextmanager
    def _transaction(self, name: str) -> Iterator[None]:
        """All of it or nothing; on the disk when this ends."""
        with self._faults():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                failpoint(f"distill/before-{name}")
                self._db.execute("COMMIT")
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
        failpoint(f"distill/after-{name}")

    def _insert(self, table: str, rows: Sequence[Sequence[Any]]) -> None:
        if rows:
            self._db.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(rows[0]))})", rows)

    def _at(self, table: str, positions: Sequence[int]) -> list[tuple[Any, ...]]:
        order = ("position",) if table == "problems" else KEY
        query = (
            f"SELECT * FROM {table} WHERE {order[0]} IN (SELECT value FROM json_each(?)) ORDER BY {', '.join(order)}"
        )
        return self._all(query, (json.dumps(list(positions)),))

    def _one(self, query: str) -> tuple[Any, ...]:
        return next(iter(self._db.execute(query)))

    def _all(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        with self._faults():
            return self._db.execute(query, values).fetchall()

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        """A full or failing disk as a DiskError, a file that is no ledger as a UserError."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            # SQLite says "I/O error" or "can't open" where a full disk has no room for its shared memory.
            full = code == sqlite3.SQLITE_FULL or shutil.disk_usage(self.path.parent).free < 1 << 18
            if code == sqlite3.SQLITE_IOERR or (full and code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN)):
                number = errno.ENOSPC if full else errno.EIO
                raise DiskError(number, os.strerror(number), str(self.path)) from error
            if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_CANTOPEN):
                raise UserError(f"{self.path}: damaged, or no ledger ({error}); put back a copy of it") from error
            raise


def _encoded(thing: Any) -> tuple[Any, ...]:
    """A dataclass as a row, in the order of its fields."""
    return tuple(
        json.dumps(getattr(thing, f.name), sort_keys=True, default=str) if f.name in AS_JSON else getattr(thing, f.name)
        for f in fields(thing)
    )


def _decoded(kind: type[T], row: Sequence[Any]) -> T:
    names = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    pairs = zip(names, row, strict=True)
    return kind(**{name: json.loads(value) if name in AS_JSON else value for name, value in pairs})
