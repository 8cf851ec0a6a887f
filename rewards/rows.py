"""Rows of JSONL in, one verdict a line out, in order, in constant memory: `python -m rewards grade`.

A row is `{"kind": "math", "gold", "response"}` or `{"kind": "code", "response", "tests"}`; an `id` is passed on.
What comes out is a verdict's fields after `line`, the row's line number. A row that can't be graded is unknown with
the reason `bad-row` and says why in `error`, so that verdicts stay one for each row. Left out: how answers are graded
(rewards/maths/grade.py, rewards/code_tests.py).
"""

import contextlib
import json
import math
import os
import queue
import stat
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future
from typing import Any, BinaryIO

from rewards.process import RewardProcess, WorkerError
from rewards.verdict import Verdict

MAX_ROW_BYTES = 64 << 20
"""A longer row is bad, and read past without keeping it."""
PAYS_AFTER = 1.0
"""Seconds of grading after which worker processes are worth their start."""
MAX_BATCH, BATCH_SECONDS = 32, 0.05
"""Rows a worker takes at once: as many as it grades in that time, so that slow ones are shared and shown one by one."""
IN_FLIGHT_BYTES = 16 << 20
"""Of rows that were read and whose verdict is not written yet; one larger row travels alone."""
TIME_LIMIT = 24 * 3600.0
"""Seconds for a batch: graders keep their own, much shorter limits."""

Line = tuple[int, bytes | None]
"""Line number and content; None if it was longer than a row may be."""


def grade_file(name: str, *, workers: int) -> int:
    """Grade the rows of a file, or of stdin for "-", onto stdout; the exit code: 0, 2 if any row was bad, 74.

    Raises KeyboardInterrupt and BrokenPipeError, with every worker ended.
    """
    try:
        # Not sys.stdin: a thread that waits in it at exit would hold the lock the interpreter needs to close it.
        stream = open(0 if name == "-" else name, "rb", closefd=name != "-")
    except OSError as error:
        print(f"{name}: {error.strerror}; give a JSONL file of rows, or - for stdin", file=sys.stderr)
        return 2
    progress = _Progress(stream)
    outcomes: Counter[str] = Counter()
    with contextlib.closing(grade_lines(read_lines(stream), workers=workers)) as verdicts:
        for ready in verdicts:
            for verdict in ready:
                if fault := verdict.get("error"):
                    progress.clear()
                    print(f"{'stdin' if name == '-' else name}:{verdict['line']}: {fault}", file=sys.stderr)
                outcomes["bad" if fault else verdict["outcome"]] += 1
            try:
                print("\n".join(map(json.dumps, ready)), flush=True)
            except BrokenPipeError:
                raise
            except OSError as error:
                print(f"stdout: {error.strerror} after {outcomes.total() - len(ready)} rows", file=sys.stderr)
                return 74
            progress.show(outcomes.total())
    progress.clear()
    parts = ", ".join(f"{outcomes[key]:,} {key}" for key in ("right", "wrong", "unknown", "bad") if outcomes[key])
    print(f"{outcomes.total():,} rows{': ' if parts else ''}{parts}", file=sys.stderr)
    return 2 if outcomes["bad"] else 0


def read_lines(stream: BinaryIO) -> Iterator[Line]:
    """The lines that aren't blank, with their numbers from 1."""
    number = 0
    while line := stream.readline(MAX_ROW_BYTES + 1):
        number += 1
        too_long = len(line) > MAX_ROW_BYTES
        while too_long and line and not line.endswith(b"\n"):
            line = stream.readline(1 << 20)
        if too_long or line.strip():
            yield number, None if too_long else line


def grade_lines(lines: Iterable[Line], *, workers: int) -> Generator[list[dict[str, Any]], None, None]:
    """Verdicts of lines in order, as soon as they are there: a list of those that are there together."""
    lines, spent = iter(lines), 0.0
    for line in lines:
        began = time.monotonic()
        verdict = grade_line(*line)
        spent += time.monotonic() - began
        yield [verdict]
        if workers > 1 and spent > PAYS_AFTER:
            yield from _in_parallel(lines, workers)


def grade_line(number: int, line: bytes | None) -> dict[str, Any]:
    """The verdict of one line as a JSON object; bad rows become verdicts too, and no exception leaves."""
    row: dict[str, Any] = {}
    try:
        row = parse_row(line)
        return _result(number, row, _grade(row))
    except Exception as error:  # hostile data in a long job: the fault is this row's alone
        verdict = Verdict(outcome="unknown", reason="bad-row")
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        return {**_result(number, row, verdict), "error": shown(f"{kind}{error}")}


def grade_batch(lines: list[Line], log_extra: Any, **_: Any) -> list[float]:
    """What a worker process runs: a reward function whose verdicts travel as a column."""
    log_extra("verdicts", [grade_line(*line) for line in lines])
    return [0.0] * len(lines)


def parse_row(line: bytes | None) -> dict[str, Any]:
    """The object a line holds. Raises ValueError with what is wrong with it."""
    if line is None:
        raise ValueError(f"the row is longer than {MAX_ROW_BYTES >> 20} MiB: split it, or leave tests out")

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON number")

    try:
        row = json.loads(line.decode("utf-8-sig"), parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise ValueError("not a row: nested too deeply") from None
    if not isinstance(row, dict):
        raise ValueError(f'a row is an object like {{"kind": "math", ...}}, not a {type(row).__name__}')
    return row


def _grade(row: dict[str, Any]) -> Verdict:
    kind = row.get("kind")
    if kind == "math":
        from rewards.maths.grade import grade_math

        gold = _field(row, "gold", "a string or a finite number", str, int, float)
        return grade_math(gold, _field(row, "response", "a string", str))
    if kind == "code":
        from rewards.code_tests import grade_code, read_test

        tests = _field(row, "tests", "a list of tests, one at least", list)
        if not tests or not all(isinstance(test, dict) for test in tests):
            raise ValueError(f"tests={_short(tests)}: give a list of tests, one at least")
        for test in tests:
            read_test(test)  # a test nobody can read is the row's fault, not an unknown outcome
        return grade_code(_field(row, "response", "a string", str), tests)
    given = f"kind={_short(kind)}" if "kind" in row else "kind is missing"
    raise ValueError(f'{given}: give "math" or "code"')


def _field(row: dict[str, Any], name: str, what: str, *types: type) -> Any:
    if name not in row:
        raise ValueError(f"{name} is missing: give {what}")
    value = row[name]
    if type(value) not in types or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"{name}={_short(value)}: give {what}")
    return value


def shown(text: str) -> str:
    """The start of a text on one line, where nothing in it acts on a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:300]) + "..." * (len(text) > 300)


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _result(number: int, row: dict[str, Any], verdict: Verdict) -> dict[str, Any]:
    return {"line": number, **({"id": row["id"]} if "id" in row else {}), **verdict.as_json()}


def _in_parallel(lines: Iterator[Line], workers: int) -> Iterator[list[dict[str, Any]]]:
    """Verdicts in order from worker processes; a thread reads ahead, one thread serves each process."""
    work: queue.SimpleQueue[tuple[Line, Future[dict[str, Any]]]] = queue.SimpleQueue()
    pending: deque[tuple[Future[dict[str, Any]], int]] = deque()
    changed = threading.Condition()
    in_flight, ended = 0, False

    def read() -> None:
        nonlocal in_flight, ended
        try:
            for line in lines:
                verdict: Future[dict[str, Any]] = Future()
                size = len(line[1] or b"") + 2048  # and what Python keeps for it
                with changed:
                    while in_flight and in_flight + size > IN_FLIGHT_BYTES:
                        changed.wait()
                    in_flight += size
                    pending.append((verdict, size))
                    changed.notify()
                work.put((line, verdict))
        except Exception as error:  # the disk or the pipe: raised where the verdicts are read
            failed: Future[dict[str, Any]] = Future()
            failed.set_exception(error)
            pending.append((failed, 0))
        with changed:
            ended = True
            changed.notify()

    processes = [RewardProcess("rewards.rows:grade_batch", name="grade") for _ in range(workers)]
    for process in processes:
        threading.Thread(target=_serve, args=(process, work, workers), daemon=True).start()
    threading.Thread(target=read, daemon=True).start()
    try:
        while True:
            with changed:
                changed.wait_for(lambda: pending or ended)
            if not pending:
                return
            ready, freed = [pending[0][0].result()], pending.popleft()[1]
            while pending and pending[0][0].done() and not pending[0][0].exception():
                verdict, size = pending.popleft()
                ready.append(verdict.result())
                freed += size
            with changed:
                in_flight -= freed
                changed.notify()
            yield ready
    finally:
        for process in processes:
            process.interrupt()
            process.kill()


def _serve(
    process: RewardProcess, work: "queue.SimpleQueue[tuple[Line, Future[dict[str, Any]]]]", workers: int
) -> None:
    """Take what is waiting, but leave the others their share; a batch that kills the worker goes row by row."""
    size = 1
    while True:
        batch = [work.get()]
        began = time.monotonic()
        share = min(size, work.qsize() // workers)
        with contextlib.suppress(queue.Empty):
            while len(batch) < share:
                batch.append(work.get_nowait())
        try:
            verdicts = _call(process, [line for line, _ in batch])
            for i, (line, future) in enumerate(batch):
                result = verdicts[i : i + 1] if verdicts else _call(process, [line])
                future.set_result(result[0] if result else _died(line[0]))
            rate = len(batch) / max(time.monotonic() - began, 1e-6)
            size = max(1, min(MAX_BATCH, int(BATCH_SECONDS * rate)))
        except Exception as error:  # no process can be started: raised where the verdicts are read
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)


def _call(process: RewardProcess, lines: list[Line]) -> list[dict[str, Any]] | None:
    try:
        reply = process.call({"lines": lines}, rows=len(lines), step=0, time_limit=TIME_LIMIT)
    except WorkerError:
        return None
    verdicts: list[dict[str, Any]] = reply["columns"]["verdicts"]
    return verdicts


def _died(number: int) -> dict[str, Any]:
    verdict = Verdict(outcome="unknown", reason="bad-row").as_json()
    return {"line": number, **verdict, "error": "the process that graded it died: out of memory?"}


class _Progress:
    """A line on stderr that is written over, from the third second on, if stderr is a terminal."""

    def __init__(self, stream: BinaryIO) -> None:
        self._on = sys.stderr.isatty()
        self._began = time.monotonic()
        self._next = self._began + 2.0
        self._stream = stream
        about = os.fstat(stream.fileno())
        self._bytes = about.st_size if stat.S_ISREG(about.st_mode) else 0

    def show(self, rows: int) -> None:
        now = time.monotonic()
        if not self._on or now < self._next:
            return
        self._next = now + 0.2
        share = f", {os.lseek(self._stream.fileno(), 0, os.SEEK_CUR) / self._bytes:.0%} read" if self._bytes else ""
        rate = rows / (now - self._began)
        print(f"\r\x1b[K{rows:,} rows, {rate:,.0f}/s{share}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self._on:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
