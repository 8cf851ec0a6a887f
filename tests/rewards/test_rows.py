"""`python -m rewards grade` as a shell sees it: order, bad rows, pipes, interrupts, and constant memory."""

import io
import json
import os
import pty
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from rewards import rows
from rewards.process import RewardProcess

ROOT = Path(__file__).parents[2]
GRADE = [sys.executable, "-m", "rewards", "grade"]
BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


def math(gold: Any, response: str, **more: Any) -> str:
    return json.dumps({"kind": "math", "gold": gold, "response": response, **more})


RIGHT, WRONG = math("1/2", r"so \boxed{0.5}"), math(3, r"\boxed{4}")


def grade(*arguments: str, given: str | bytes = b"", **options: Any) -> subprocess.CompletedProcess[str]:
    data = given.encode() if isinstance(given, str) else given
    done = subprocess.run(
        [*GRADE, *arguments], input=data, capture_output=True, cwd=ROOT, env=BUFFERED, timeout=120, **options
    )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def verdicts(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts the command on a pipe; nothing of it outlives the test."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str, **options: Any) -> subprocess.Popen[bytes]:
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        started.append(subprocess.Popen([*GRADE, *arguments], cwd=ROOT, env=BUFFERED, **{**pipes, **options}))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_verdict_for_each_row_in_order(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join([RIGHT, WRONG, math("1/2", "?", id=["a", 7])]))
    done = grade(str(tmp_path / "rows.jsonl"))
    assert (done.returncode, done.stderr) == (0, "3 rows: 1 right, 2 wrong\n")
    found = verdicts(done.stdout)
    assert [(v["line"], v["outcome"]) for v in found] == [(1, "right"), (2, "wrong"), (3, "wrong")]
    assert found[2]["id"] == ["a", 7]
    assert all(v["reason"] and v["ms"] >= 0 and "answer" in v and "error" not in v for v in found)


def test_code_rows_are_graded() -> None:
    program = "```python\nprint(sum(map(int, input().split())))\n```"
    row = {"kind": "code", "response": program, "tests": [{"input": "1 2\n", "output": "3\n"}]}
    function = {
        "kind": "code",
        "response": "def add(a, b): return a - b",
        "tests": [{"assert": "assert add(1, 2) == 3"}],
    }
    done = grade("-", given=f"{json.dumps(row)}\n{json.dumps(function)}\n")
    if "sandbox-unavailable" in done.stdout:
        pytest.skip("no isolation for code on this machine: python -m rewards doctor")
    assert [(v["outcome"], v["passed"], v["total"]) for v in verdicts(done.stdout)] == [
        ("right", 1, 1),
        ("wrong", 0, 1),
    ]


@pytest.mark.parametrize(
    ("row", "error"),
    [
        (b'{"kind": "math"', "not JSON: Expecting ',' delimiter at character 16"),
        (b"[1]", 'a row is an object like {"kind": "math", ...}, not a list'),
        (b'{"gold": "1", "response": ""}', 'kind is missing: give "math" or "code"'),
        (b'{"kind": "sums"}', 'kind="sums": give "math" or "code"'),
        (b'{"kind": "math", "response": ""}', "gold is missing: give a string or a finite number"),
        (b'{"kind": "math", "gold": "1"}', "response is missing: give a string"),
        (b'{"kind": "math", "gold": NaN, "response": ""}', "NaN is no JSON number"),
        (b'{"kind": "math", "gold": 1e999, "response": ""}', "gold=Infinity: give a string or a finite number"),
        (b'{"kind": "math", "gold": true, "response": ""}', "gold=true: give a string or a finite number"),
        (b'{"kind": "math", "gold": "1", "response": ["1"]}', 'response=["1"]: give a string'),
        (b'{"kind": "math", "gold": "1", "response": "\xff"}', "byte 43 is not UTF-8"),
        (b"[" * 100_000, "not a row: nested too deeply"),
        (b'{"kind": "code", "response": ""}', "tests is missing: give a list of tests, one at least"),
        (b'{"kind": "code", "response": "", "tests": {}}', "tests={}: give a list of tests, one at least"),
        (b'{"kind": "code", "response": "", "tests": []}', "tests=[]: give a list of tests, one at least"),
        (b'{"kind": "code", "response": "", "tests": [4]}', "tests=[4]: give a list of tests, one at least"),
        (b'{"kind": "code", "tests": [{"assert": "f() == 1"}]}', "response is missing: give a string"),
        (b'{"kind": "\\u001b[2J\\ud800"}', 'kind="\\u001b[2J\\ud800": give "math" or "code"'),
    ],
)
def test_a_bad_row_keeps_its_place_and_says_why(row: bytes, error: str) -> None:
    lines = list(rows.read_lines(io.BytesIO(RIGHT.encode() + b"\n\n" + row + b"\n" + WRONG.encode())))
    (first,), (bad,), (last,) = rows.grade_lines(lines, workers=1)
    assert (first["outcome"], last["outcome"], last["line"]) == ("right", "wrong", 4)
    assert bad == {"line": 3, "outcome": "unknown", "reason": "bad-row", "answer": None, "ms": 0.0, "error": error}


def test_bad_rows_are_reported_with_their_lines_and_the_exit_code_is_2() -> None:
    done = grade("-", given=f"{RIGHT}\nnonsense\n{RIGHT}\n")
    assert done.returncode == 2
    assert done.stderr == ("stdin:2: not JSON: Expecting value at character 0\n3 rows: 2 right, 1 bad\n")
    assert [v["outcome"] for v in verdicts(done.stdout)] == ["right", "unknown", "right"]


def test_a_test_that_nobody_can_read_is_a_bad_row() -> None:
    row = {"kind": "code", "response": "def f(): return 1", "tests": [{"asert": "assert f() == 1"}]}
    verdict = rows.grade_line(1, json.dumps(row).encode())
    assert (verdict["reason"], verdict["outcome"]) == ("bad-row", "unknown")
    assert "asert" in verdict["error"] and "give" in verdict["error"]


def test_a_row_of_100_megabytes_is_read_past() -> None:
    long = b'{"kind": "math", "response": "' + b"x" * (100 << 20) + b'"}\n'
    done = grade("-", given=long + RIGHT.encode())
    assert [v["outcome"] for v in verdicts(done.stdout)] == ["unknown", "right"]
    assert done.stderr.startswith("stdin:1: the row is longer than 64 MiB")
    assert done.returncode == 2


def test_a_missing_file_is_named() -> None:
    done = grade("gone.jsonl")
    assert done.returncode == 2
    assert done.stderr == "gone.jsonl: No such file or directory; give a JSONL file of rows, or - for stdin\n"


def test_a_verdict_comes_before_the_next_row_is_written(start: Callable[..., subprocess.Popen[bytes]]) -> None:
    process = start("-")
    assert process.stdin and process.stdout
    for row, outcome in ((RIGHT, "right"), (WRONG, "wrong")):
        process.stdin.write(row.encode() + b"\n")
        process.stdin.flush()
        assert select.select([process.stdout], [], [], 60)[0], "no verdict while stdin is open"
        assert json.loads(process.stdout.readline())["outcome"] == outcome


def test_the_first_verdict_comes_at_once(start: Callable[..., subprocess.Popen[bytes]]) -> None:
    """Within 0.3 s of processor time: what the clock says is also up to what else runs."""
    process = start("-")
    assert process.stdin and process.stdout
    process.stdin.write(RIGHT.encode() + b"\n")
    process.stdin.flush()
    process.stdout.readline()
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    assert (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") < 0.3


@pytest.mark.parametrize("rows_before", [1, 20_000])
def test_a_closed_pipe_ends_it_quietly(start: Callable[..., subprocess.Popen[bytes]], rows_before: int) -> None:
    process = start("-", "--workers", "2")
    assert process.stdin and process.stdout and process.stderr
    feeder = threading.Thread(target=_feed, args=(process.stdin,), daemon=True)
    feeder.start()
    for _ in range(rows_before):
        process.stdout.readline()
    process.stdout.close()
    assert process.wait(30) == 141
    assert process.stderr.read() == b""


def _feed(pipe: Any) -> None:
    try:
        while True:
            pipe.write((RIGHT + "\n").encode() * 100)
    except OSError:
        pass


def test_ctrl_c_ends_it_quietly_and_leaves_no_process(start: Callable[..., subprocess.Popen[bytes]]) -> None:
    process = start("-", "--workers", "2")
    assert process.stdin and process.stdout and process.stderr
    threading.Thread(target=_feed, args=(process.stdin,), daemon=True).start()
    deadline = time.monotonic() + 60
    while len(workers := _children(process.pid)) < 2:
        assert time.monotonic() < deadline and process.stdout.read1(1 << 16), "no workers after a second of work"
    reader = threading.Thread(target=process.stdout.read, daemon=True)
    reader.start()
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert process.stderr.read() == b""
    assert [pid for pid in workers if Path(f"/proc/{pid}").exists()] == []


def _children(pid: int) -> list[int]:
    return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in _read(task / "children").split()]


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # a thread that ended meanwhile
        return ""


def test_workers_give_the_same_verdicts_in_the_same_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "PAYS_AFTER", 0.0)
    monkeypatch.setattr(rows, "IN_FLIGHT_BYTES", 20_000)
    text = "\n".join(math(i, rf"\boxed{{{i + i % 3}}}") if i % 7 else "nonsense" for i in range(500))
    found = [v for ready in rows.grade_lines(rows.read_lines(io.BytesIO(text.encode())), workers=2) for v in ready]
    assert [v["line"] for v in found] == list(range(1, 501))
    expected = ["unknown" if i % 7 == 0 else "wrong" if i % 3 else "right" for i in range(500)]
    assert [v["outcome"] for v in found] == expected


def test_no_more_is_read_ahead_than_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "PAYS_AFTER", 0.0)
    monkeypatch.setattr(rows, "IN_FLIGHT_BYTES", 100_000)
    taken = 0

    def lines() -> Iterator[rows.Line]:
        nonlocal taken
        for taken in range(1, 10_000):
            yield taken, RIGHT.encode()

    verdicts = rows.grade_lines(lines(), workers=2)
    next(verdicts), next(verdicts)
    time.sleep(0.5)  # nobody takes verdicts: whatever reads ahead comes to its end
    assert 10 < taken < 200
    verdicts.close()


def test_a_file_that_fails_while_it_is_read_ahead_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "PAYS_AFTER", 0.0)

    def lines() -> Iterator[rows.Line]:
        yield 1, RIGHT.encode()
        yield 2, RIGHT.encode()
        raise OSError("the disk is gone")

    found = []
    with pytest.raises(OSError, match="the disk is gone"):
        for ready in rows.grade_lines(lines(), workers=2):
            found += ready
    assert [v["outcome"] for v in found] == ["right", "right"]


@pytest.mark.parametrize(("seconds", "largest"), [(0.06, 1), (0.0, rows.MAX_BATCH)])
def test_slow_rows_are_taken_one_by_one_and_fast_ones_many_at_once(seconds: float, largest: int) -> None:
    def reward(lines: list[tuple[int, bytes]], log_extra: Any, **_: Any) -> list[float]:
        time.sleep(seconds * len(lines))
        log_extra("verdicts", [{"batch": len(lines)} for _ in lines])
        return [0.0] * len(lines)

    found = serve(reward, [b""] * (10 if seconds else 1000))
    assert max(verdict["batch"] for verdict in found) == largest


def serve(reward: Any, lines: list[bytes]) -> list[dict[str, Any]]:
    """What a worker that runs `reward` makes of lines that all wait for it."""
    work: queue.SimpleQueue[Any] = queue.SimpleQueue()
    futures: list[Future[dict[str, Any]]] = [Future() for _ in lines]
    for number, (line, future) in enumerate(zip(lines, futures, strict=True)):
        work.put(((number, line), future))
    process = RewardProcess(reward, name="test")
    threading.Thread(target=rows._serve, args=(process, work, 1), daemon=True).start()
    found = [future.result(60) for future in futures]
    process.interrupt()
    process.kill()
    return found


def test_a_row_that_kills_its_worker_is_unknown_and_its_batch_is_not() -> None:
    def deadly(lines: list[tuple[int, bytes]], log_extra: Any, **_: Any) -> list[float]:
        if any(line == b"die" for _, line in lines):
            os._exit(1)
        log_extra("verdicts", [{"line": number, "outcome": "right"} for number, _ in lines])
        return [0.0] * len(lines)

    found = serve(deadly, [b"live", b"live", b"die", b"live", b"live"])
    assert [v["outcome"] for v in found] == ["right", "right", "unknown", "right", "right"]
    assert "died" in found[2]["error"]


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """A file of 200 MB passes through less than 80 MB."""
    measure = (
        "import pathlib, re, sys; from rewards.__main__ import main; code = main(sys.argv[1:])\n"
        "print(re.search(r'VmHWM:\\s*(\\d+)', pathlib.Path('/proc/self/status').read_text())[1], file=sys.stderr)\n"
        "sys.exit(code)"
    )
    row = math("1", r"\boxed{2}" + "x" * 5000) + "\n"
    (tmp_path / "rows.jsonl").write_text(row * 40_000)
    command = [sys.executable, "-c", measure, "grade", str(tmp_path / "rows.jsonl"), "--workers", "2"]
    with (tmp_path / "out").open("wb") as out:
        done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0
    assert int(done.stderr.split()[-1]) < 80 * 1024


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here to stand for a full disk")
def test_a_full_disk_is_an_error_of_its_own() -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run([*GRADE, "-"], input=RIGHT.encode(), stdout=full, stderr=subprocess.PIPE, cwd=ROOT)
    assert done.returncode == 74
    assert done.stderr == b"stdout: No space left on device after 0 rows\n"


def test_progress_only_on_a_terminal_and_only_after_two_seconds() -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen([*GRADE, "-"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=theirs, cwd=ROOT)
    os.close(theirs)
    assert process.stdin
    began, written, shown = time.monotonic(), 0, b""
    while b"rows," not in shown and time.monotonic() < began + 60:  # a busy machine is slow to start it
        process.stdin.write(RIGHT.encode() + b"\n")
        process.stdin.flush()
        written += 1
        while select.select([ours], [], [], 0.5)[0]:
            shown += os.read(ours, 4096)
    assert time.monotonic() > began + 2
    process.stdin.close()
    process.wait(60)
    while select.select([ours], [], [], 1)[0]:
        try:
            shown += os.read(ours, 4096)
        except OSError:  # Linux says so when the other side is closed
            break
    os.close(ours)
    assert shown.count(b"rows,") == 1
    assert shown.endswith(f"\r\x1b[K{written} rows: {written} right\r\n".encode())
