"""Real hangs, in processes of their own: asleep, in C, and in C with Python's lock held."""

import logging
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from runtime.watchdog import Watchdog

ROOT = Path(__file__).parents[2]

HANG = """
import ctypes, logging, sys, time
from runtime.watchdog import Watchdog

def stuck(seconds): {call}

logging.basicConfig(format="%(message)s")
with Watchdog(sys.argv[1], 0.4, {options}) as watchdog, watchdog.phase("sampling", component="vLLM engine"):
    stuck({seconds})
print("went on", flush=True)
"""
SLEEP = "time.sleep(seconds)"
IN_C = "ctypes.CDLL(None).usleep(int(1e6 * seconds))"
LOCK_HELD = "ctypes.PyDLL(None).usleep(int(1e6 * seconds))"


def hang(folder: Path, call: str, seconds: float, options: str = "") -> subprocess.CompletedProcess[str]:
    code = HANG.format(call=call, seconds=seconds, options=options)
    return subprocess.run(
        [sys.executable, "-c", code, str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=30
    )


def stacks(folder: Path) -> list[str]:
    return [path.read_text() for path in sorted(folder.glob("stacks-*.txt"))]


@pytest.mark.parametrize("call", [SLEEP, IN_C])
def test_hang_is_named_and_the_stacks_written_at_doubling_intervals(tmp_path: Path, call: str) -> None:
    done = hang(tmp_path, call, 2.4)
    assert done.returncode == 0 and done.stdout == "went on\n"
    said = re.findall(
        r"nothing has moved for (\d+) s: sampling \(vLLM engine\); every thread's stack is in (.*)", done.stderr
    )
    assert [Path(path).name for _, path in said] == ["stacks-1.txt", "stacks-2.txt", "stacks-3.txt"]  # 0.4, 0.8, 1.6 s
    assert len(stacks(tmp_path)) == 3
    for text in stacks(tmp_path):
        assert text.startswith("nothing has moved for ") and "in stuck" in text and "Thread 0x" in text


def test_hang_that_holds_pythons_lock_puts_its_stacks_on_stderr(tmp_path: Path) -> None:
    done = hang(tmp_path, LOCK_HELD, 1.5)
    assert done.returncode == 0
    assert "Timeout (0:00:00." in done.stderr and "in stuck" in done.stderr


@pytest.mark.parametrize("call", [SLEEP, IN_C, LOCK_HELD])
def test_abort_ends_the_process_after_the_stacks(tmp_path: Path, call: str) -> None:
    began = time.monotonic()
    done = hang(tmp_path, call, 25, "abort_after=0.9")
    assert done.returncode == 1 and done.stdout == ""
    assert time.monotonic() - began < 20  # not only once the call has come back
    if call == LOCK_HELD:
        assert "in stuck" in done.stderr
    else:
        assert "; ending the process" in done.stderr
        assert len(stacks(tmp_path)) == 3 and all("in stuck" in text for text in stacks(tmp_path))


def test_stacks_go_to_stderr_where_the_folder_is_gone(tmp_path: Path) -> None:
    done = hang(tmp_path / "gone", SLEEP, 0.6)
    assert "every thread's stack is above: " in done.stderr and "in stuck" in done.stderr


def test_what_moves_is_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with Watchdog(tmp_path, 1.0) as watchdog:
        for _ in range(6):
            with watchdog.phase("sampling"):
                time.sleep(0.2)
        for _ in range(6):
            time.sleep(0.2)
            watchdog.beat()
    assert stacks(tmp_path) == [] and caplog.text == "" and capfd.readouterr().err == ""


def test_inner_phase_counts_then_the_outer_one_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def wait_for(reports: int) -> None:
        deadline = time.monotonic() + 20
        while len(stacks(tmp_path)) < reports and time.monotonic() < deadline:
            time.sleep(0.01)

    with caplog.at_level(logging.WARNING), Watchdog(tmp_path, 0.3) as watchdog:
        with watchdog.phase("evaluating"):
            with watchdog.phase("scoring", component="reward accuracy"):
                wait_for(1)
            wait_for(2)
        wait_for(3)
    first = [text.splitlines()[0].partition(": ")[2] for text in stacks(tmp_path)]
    assert first == ["scoring (reward accuracy)", "evaluating", "between phases"]
    assert "moving again, after" in caplog.text


def test_earlier_attempts_stacks_are_kept(tmp_path: Path) -> None:
    (tmp_path / "stacks-1.txt").write_text("of an earlier attempt")
    hang(tmp_path, SLEEP, 0.6)
    earlier, now = stacks(tmp_path)
    assert earlier == "of an earlier attempt" and "in stuck" in now


def test_nothing_is_left_running(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = threading.active_count()
    with Watchdog(tmp_path, 0.2):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
    time.sleep(0.5)  # what faulthandler was told to write by then is cancelled
    assert stacks(tmp_path) == [] and capfd.readouterr().err == ""


def test_limit_zero_is_off(tmp_path: Path) -> None:
    before = threading.active_count()
    with Watchdog(tmp_path, 0) as watchdog, watchdog.phase("sampling"):
        assert threading.active_count() == before


def test_limits_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"limit_seconds=-1: give seconds, or 0"):
        Watchdog(tmp_path, -1)
    with pytest.raises(ValueError, match=r"abort_after=5: less than limit_seconds=10"):
        Watchdog(tmp_path, 10, abort_after=5)
