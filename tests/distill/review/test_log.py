"""The log: what was acknowledged is in it after any kill, what wasn't is cut off, damage is an error."""

import errno
import json
import os
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest

from distill.review.log import Log, Record, read_log
from runtime.errors import DiskError, UserError

ROOT = Path(__file__).parents[3]


def record(number: int, text: str | None = None) -> Record:
    return Record(
        number=number, key=f"k{number}", time="2026-01-01T00:00:00.000+00:00", reviewer="Ana \u202e\n", row="../a",
        digest="0" * 16, action="accept" if text is None else "edit", text=text,
    )  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A log of three records."""
    with Log(tmp_path / "deep" / "log.jsonl") as log:
        for number in (1, 2, 3):
            log.append(record(number, "Ünï\r\n\x1b" if number == 2 else None))
    return log.path


def test_what_is_appended_is_read_back_as_json_lines_with_their_crc(path: Path) -> None:
    wants = [record(1), record(2, "Ünï\r\n\x1b"), record(3)]
    assert read_log(path) == wants
    with Log(path) as log:
        assert log.records == wants
    data = path.read_bytes()
    assert data.isascii() and data.count(b"\n") == 3 and b"\x1b" not in data
    for line in data.splitlines():
        crc = json.loads(line)["crc"]  # any reader of JSON can
        assert int(crc, 16) == zlib.crc32(line[: line.rindex(b', "crc": ')])
    assert read_log(path.with_name("none")) == []


def test_a_torn_tail_is_cut_off_wherever_it_was_torn(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = path.read_bytes()
    begins = data.rindex(b"\n", 0, len(data) - 1) + 1
    for length in range(begins, len(data)):
        path.write_bytes(data[:length])
        assert len(read_log(path)) == 2 and path.stat().st_size == length  # reading repairs nothing
        with Log(path) as log:
            assert len(log.records) == 2
            assert path.read_bytes() == data[:begins]
            log.append(record(3))
        assert path.read_bytes() == data
    assert f"cut off {len(data) - begins - 1} bytes" in caplog.text
    path.write_bytes(data + b"\0" * 4096)  # a power cut on some file systems
    assert len(read_log(path)) == 3


@pytest.mark.parametrize("line", [0, 1, 2])
def test_a_damaged_line_is_named_and_nothing_is_lost_quietly(path: Path, line: int) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    lines[line] = lines[line].replace(b'"../a"', b'"../b"')
    path.write_bytes(b"".join(lines))
    with pytest.raises(UserError, match=rf"line {line + 1} is damaged: its checksum is wrong.*head -n {line}"):
        Log(path)
    assert path.read_bytes() == b"".join(lines)


def test_a_line_that_is_missing_or_twice_is_damage(path: Path) -> None:
    first, second, third = path.read_bytes().splitlines(keepends=True)
    for lines in ([first, third], [first, second, second, third], [second]):
        path.write_bytes(b"".join(lines))
        with pytest.raises(UserError, match="is damaged: it has number"):
            read_log(path)


def test_one_process_at_a_time(path: Path) -> None:
    with Log(path):
        assert len(read_log(path)) == 3
        with pytest.raises(UserError, match="another process has it open"):
            Log(path)
    with Log(path):
        pass


@pytest.mark.parametrize("fails", ["write", "fsync"])
def test_what_could_not_be_saved_does_not_count_and_the_next_try_does(path: Path, monkeypatch, fails: str) -> None:
    before = path.read_bytes()

    def full(*args: object) -> None:
        if fails == "write":
            os.write(log._file.fileno(), b'{"number": 4, "k')
        raise OSError(errno.ENOSPC, "No space left on device")

    with Log(path) as log:
        with monkeypatch.context() as patch:
            patch.setattr("distill.review.log.write_all" if fails == "write" else "os.fsync", full)
            with pytest.raises(DiskError, match=r"log\.jsonl: No space left on device; free space"):
                log.append(record(4))
        assert len(log.records) == 3
        log.append(record(4, "another"))
    assert read_log(path)[3] == record(4, "another") and path.read_bytes().startswith(before)


WRITER = """
import sys
from pathlib import Path
from distill.review.log import Log, Record
with Log(Path(sys.argv[1])) as log:
    while True:
        number = len(log.records) + 1
        log.append(Record(number=number, key=str(number), time="", reviewer="a", row="b", digest="", action="edit",
                          text="x" * (number % 5) * 3000))
        print(number, flush=True)
"""


def test_no_acknowledged_record_is_lost_by_a_kill_at_any_moment(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    saved = 0
    for kill in range(8):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], cwd=ROOT, stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            acknowledged = [int(writer.stdout.readline())]
            time.sleep(0.003 * kill**2)
            writer.kill()
            acknowledged += map(int, writer.stdout.read().split())
        assert acknowledged[0] == saved + 1  # it went on where the last one was killed
        saved = len(read_log(path))
        assert saved - acknowledged[-1] in (0, 1)  # one may be on disk and not yet said to be
